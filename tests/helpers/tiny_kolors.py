"""The tiny pipeline of Kolors, whose tokenizer needs sentencepiece."""

import io
import tempfile
from functools import cache
from pathlib import Path

import torch
from diffusers import DDIMScheduler, KolorsPipeline, UNet2DConditionModel

from helpers.tiny_parts import autoencoder_kl


@cache
def _vocabulary() -> tempfile.TemporaryDirectory:
    """A folder with `tokenizer.model`, one token per letter, that is there until the process ends."""
    from sentencepiece import SentencePieceTrainer

    letters, model = "abcdefghijklmnopqrstuvwxyz", io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(letters)]),
        model_writer=model,
        model_type="char",
        vocab_size=len(letters) + 4,
        minloglevel=2,
    )
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def build_kolors() -> KolorsPipeline:
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    tokenizer = ChatGLMTokenizer(str(Path(_vocabulary().name) / "tokenizer.model"))
    text_encoder = ChatGLMModel(
        ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=tokenizer.vocab_size,
            hidden_size=16,
            ffn_hidden_size=16,
            kv_channels=8,
            num_attention_heads=2,
            seq_length=256,
            multi_query_attention=True,
            multi_query_group_num=1,
            original_rope=True,
            use_cache=False,
        )
    )
    # The class leaves its weights as they are in memory.
    for name, parameter in text_encoder.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.3)
    return KolorsPipeline(
        vae=autoencoder_kl(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 1),
            cross_attention_dim=24,
            encoder_hid_dim=16,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        # The published noise, which has 1100 times.
        scheduler=DDIMScheduler(
            num_train_timesteps=1100,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.014,
            steps_offset=1,
        ),
    )

"""The tiny pipeline of HunyuanVideo."""

from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace, Sequence
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from helpers.tiny_parts import clip_text_encoder, clip_tokenizer


def template_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter, and as many for the template before a prompt as the pipeline drops."""
    before, after = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")
    words = ["<pad>", "<s>", "<unk>", "\ue000", "\ue001", *"abcdefghijklmnopqrstuvwxyz ,"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    # One token more is at the very start.
    count = DEFAULT_PROMPT_TEMPLATE["crop_start"] - 1
    tokenizer.normalizer = Sequence([Replace(before, "\ue000" * count), Replace(after, "\ue001")])
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="right"
    )
    assert len(fast(before).input_ids) == DEFAULT_PROMPT_TEMPLATE["crop_start"]
    return fast


def build_hunyuan_video(guidance_embeds: bool = True) -> HunyuanVideoPipeline:
    tokenizer = template_tokenizer()
    # The pipeline reads the last state but two.
    text_encoder = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        guidance_embeds=guidance_embeds,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 4, 8),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    return HunyuanVideoPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=clip_text_encoder(positions=77),
        tokenizer_2=clip_tokenizer(),
        transformer=transformer,
        vae=vae,
        # As published.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )

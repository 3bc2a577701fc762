"""The tiny pipeline of CogView4."""

from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import GlmConfig, GlmModel, PreTrainedTokenizerFast

from helpers.tiny_parts import autoencoder_kl


def glm_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter, after two that GLM's puts before every text, also before the empty one."""
    special = ["<|endoftext|>", "[gMASK]", "<sop>"]
    letters = [*special, " ", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[], unk_token=special[0])
    )
    tokenizer.post_processor = TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[(token, letters.index(token)) for token in special[1:]]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[0], padding_side="left"
    )


def build_cogview4() -> CogView4Pipeline:
    """Eight pixels per latent: the pipeline takes multiples of sixteen pixels, whatever its VAE."""
    tokenizer = glm_tokenizer()
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=GlmModel(
            GlmConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ),
        vae=autoencoder_kl(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        transformer=CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=8,
        ),
        # As published.
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75
        ),
    )

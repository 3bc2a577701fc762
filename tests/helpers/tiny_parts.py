"""Parts that several tiny pipelines share: tokenizers of letters, text encoders and an autoencoder."""

from diffusers import AutoencoderKL
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from trl_diffusion_pref.shapes import pipeline_folder


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(pipeline_folder() / "tokenizer")


def clip_text_encoder(
    kind: type = CLIPTextModel, width: int = 32, layers: int = 2, positions: int = 16
) -> CLIPTextModel:
    """Two layers, since SDXL and SD 3 read the last but one."""
    tokenizer = clip_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=positions,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def t5_tokenizer() -> T5Tokenizer:
    """One token per letter."""
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=letters, extra_ids=0)


def t5_text_encoder(width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()


def umt5_text_encoder(width: int = 32) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def gemma_tokenizer() -> GemmaTokenizer:
    """One token per letter; what else there is becomes `<unk>`."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    letters = [*special, *"abcdefghijklmnopqrstuvwxyz"]
    return GemmaTokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token per byte, so that the 34 tokens which the pipeline drops are part of its template."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    return Qwen2Tokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])


def qwen_vl_text_encoder(
    tokenizer: Qwen2Tokenizer, vision: dict | None = None, **options
) -> Qwen2_5_VLForConditionalGeneration:
    """One layer each of the language model and of what sees images; `vision` are further options of the latter."""
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
                "rope_theta": 1000000.0,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
                **(vision or {}),
            },
            **options,
        )
    )


def autoencoder_kl(**options) -> AutoencoderKL:
    """Two pixels per latent."""
    defaults = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "sample_size": 16,
        "mid_block_add_attention": False,
        "scaling_factor": 0.7,
    }
    return AutoencoderKL(**{**defaults, **options})

"""The tiny pipeline of Lumina Image 2.0."""

from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from transformers import Gemma2Config, Gemma2Model

from helpers.tiny_parts import autoencoder_kl, gemma_tokenizer


def build_lumina2() -> Lumina2Pipeline:
    """Eight pixels per latent, which the pipeline takes for granted."""
    tokenizer = gemma_tokenizer()
    return Lumina2Pipeline(
        vae=autoencoder_kl(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4,
            shift_factor=0.3,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ),
        tokenizer=tokenizer,
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 8),
            axes_lens=(300, 32, 32),
            cap_feat_dim=16,
        ),
        # As published.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )

"""A tiny `ChromaPipeline`."""

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from helpers.tiny_parts import autoencoder_kl, t5_text_encoder, t5_tokenizer


def build_chroma() -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return ChromaPipeline(
        vae=autoencoder_kl(shift_factor=0.3, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=t5_text_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )

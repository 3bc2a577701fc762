"""A tiny `AuraFlowPipeline`."""

from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from helpers.tiny_parts import autoencoder_kl, t5_tokenizer, umt5_text_encoder


def build_auraflow() -> AuraFlowPipeline:
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        # Positions for the 1024 pixels that the pipeline generates whatever its parts are, at four pixels each.
        pos_embed_max_size=256**2,
    )
    for name, module in transformer.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear")):
            # Random gates are so near to zero that the blocks would hardly count.
            module.weight.data.mul_(10)
    return AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_text_encoder(),
        vae=autoencoder_kl(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )

"""The tiny pipeline of LTX-Video."""

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from torch import Tensor

from helpers.tiny_parts import t5_text_encoder, t5_tokenizer


def build_ltx(timestep_conditioning: bool = False) -> LTXPipeline:
    """The published 32 pixels and 8 frames per latent. `timestep_conditioning`: the VAE of 0.9.1 and later."""
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        timestep_conditioning=timestep_conditioning,
        scaling_factor=0.7,
    )
    vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, -0.4]))
    vae.latents_std.copy_(torch.tensor([1.5, 0.5, 2.0, 1.0]))
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    return LTXPipeline(
        vae=vae,
        text_encoder=t5_text_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
        # As published.
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
    )


def in_a_row(pipeline: LTXPipeline, latents: Tensor) -> Tensor:
    return pipeline._pack_latents(latents)


def out_of_a_row(pipeline: LTXPipeline, latents: Tensor) -> Tensor:
    """The inverse, for 9 frames of 32 x 64 pixels."""
    return pipeline._unpack_latents(latents, 2, 1, 2)

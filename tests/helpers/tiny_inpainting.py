"""Inpainting pipelines with random weights, and masks for them."""

from functools import partial

import numpy as np
from diffusers import (
    DDIMScheduler,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.flux import pipeline_flux_fill
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_inpaint
from PIL import Image as PILImage

from helpers.tiny_parts import autoencoder_kl, clip_text_encoder, clip_tokenizer


# They draw the masked image's latents from the VAE's posterior. With its mode they can be compared.
_MODULES = (pipeline_stable_diffusion_inpaint, pipeline_stable_diffusion_xl_inpaint, pipeline_flux_fill)
DRAWN_LATENTS = pipeline_stable_diffusion_inpaint.retrieve_latents
for _module in _MODULES:
    _module.retrieve_latents = partial(_module.retrieve_latents, sample_mode="argmax")


def build_stable_diffusion_inpaint() -> StableDiffusionInpaintPipeline:
    """16x16 images, 8x8 latents; nine channels, of the noisy latents, the mask and the masked image's latents."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=9,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    return StableDiffusionInpaintPipeline(
        vae=autoencoder_kl(),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl_inpaint_around(sdxl: StableDiffusionXLPipeline) -> StableDiffusionXLInpaintPipeline:
    """The same parts in the inpainting pipeline, and a UNet of nine channels."""
    unet = UNet2DConditionModel.from_config(sdxl.unet.config, in_channels=9)
    return StableDiffusionXLInpaintPipeline(**{**sdxl.components, "unet": unet}, add_watermarker=False)


def fill_around(flux: FluxPipeline) -> FluxFillPipeline:
    """The same parts in the inpainting pipeline, and a transformer that takes 4 pixels of the mask for each latent."""
    channels = flux.transformer.config.in_channels
    transformer = FluxTransformer2DModel.from_config(
        flux.transformer.config, in_channels=2 * channels + 4 * 4, out_channels=channels
    )
    others = ("image_encoder", "feature_extractor")
    parts = {name: part for name, part in flux.components.items() if name not in others}
    return FluxFillPipeline(**{**parts, "transformer": transformer})


def masks(size: tuple[int, int], count: int) -> list[PILImage.Image]:
    """Different masks of random greys, also of those beside the threshold.

    Args:
        size: Height and width.
    """
    greys = np.array([0, 127, 128, 255], dtype=np.uint8)
    return [PILImage.fromarray(mask) for mask in greys[np.random.default_rng(1).integers(0, 4, (count, *size))]]

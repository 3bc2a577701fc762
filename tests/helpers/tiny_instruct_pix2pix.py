"""InstructPix2Pix's pipeline with random weights, and images for it to edit."""

import numpy as np
from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image as PILImage

from helpers.tiny_parts import autoencoder_kl, clip_text_encoder, clip_tokenizer


def build_instruct_pix2pix() -> StableDiffusionInstructPix2PixPipeline:
    """16x16 images, 8x8 latents; eight channels, of the noisy latents and of the image's."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    return StableDiffusionInstructPix2PixPipeline(
        vae=autoencoder_kl(),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def images(size: tuple[int, int], count: int) -> list[PILImage.Image]:
    """Different images of random pixels, as bright or as dark as can be: any way to [-1, 1] is exact.

    Args:
        size: Height and width.
    """
    pixels = 255 * np.random.default_rng(0).integers(0, 2, (count, *size, 3), dtype=np.uint8)
    return [PILImage.fromarray(image) for image in pixels]

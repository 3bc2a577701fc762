"""Stable Diffusion inpainting: a UNet that gets a mask and the latents of the masked image beside the noisy ones."""

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from torch.nn import functional

from .inpainting import InpaintingFamily
from .stable_diffusion import StableDiffusionFamily


class UNetInpaintingFamily(InpaintingFamily):
    """Base of the families whose UNet takes latents, mask and masked image, in this order."""

    def mask_channels(self, pipeline: DiffusionPipeline) -> int:
        return 1

    def mask_of_latents(self, pipeline: DiffusionPipeline, mask: Tensor) -> Tensor:
        factor = self.pixels_per_latent(pipeline)
        return functional.interpolate(mask, size=(mask.shape[-2] // factor, mask.shape[-1] // factor))

    def unet_input(self, x_t: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Latents, mask and masked image."""
        beside = [conditioning[name].to(x_t.dtype) for name in ("mask_image", "image")]
        return torch.cat([x_t, *beside], dim=1)


class StableDiffusionInpaintFamily(UNetInpaintingFamily, StableDiffusionFamily):
    """`StableDiffusionInpaintPipeline` with an inpainting checkpoint, whose UNet takes nine channels."""

    pipeline_class = "StableDiffusionInpaintPipeline"

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        config = denoiser.config
        return (
            type(denoiser).__name__ == self.denoiser_class
            and config.addition_embed_type != "text_time"
            and config.in_channels == 2 * config.out_channels + 1
        )

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return super().predict(denoiser, self.unet_input(x_t, conditioning), timestep, conditioning)

"""Flux.1 Fill: Flux whose transformer gets a mask and the masked image's latents beside the noisy ones."""

import torch
from diffusers import FluxFillPipeline, ModelMixin
from torch import Tensor
from torch.nn import functional

from .flux import FluxFamily, takes_masked_image
from .inpainting import InpaintingFamily


class FluxFillFamily(InpaintingFamily, FluxFamily):
    """`FluxFillPipeline`, which also paints beyond an image's edges: that part is masked then.

    `FluxInpaintPipeline` has Flux's ordinary transformer and puts the noisy image back around the mask after every
    step, so it has no family: train `FluxPipeline`, and load the result there.
    """

    pipeline_class = "FluxFillPipeline"
    # It has guidance embeddings alone.
    guidance_layout = None

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        return type(denoiser).__name__ == self.denoiser_class and takes_masked_image(denoiser)

    def mask_channels(self, pipeline: FluxFillPipeline) -> int:
        return self.pixels_per_latent(pipeline) ** 2

    def mask_of_latents(self, pipeline: FluxFillPipeline, mask: Tensor) -> Tensor:
        """All pixels of the mask, those of a latent as its channels."""
        return functional.pixel_unshuffle(mask, self.pixels_per_latent(pipeline))

    def tokens(self, x_t: Tensor, conditioning: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        noisy, positions = super().tokens(x_t, conditioning)
        beside = [conditioning[name].to(x_t.dtype) for name in self.condition_images]
        packed = [FluxFillPipeline._pack_latents(tensor, *tensor.shape) for tensor in beside]
        return torch.cat([noisy, *packed], dim=2), positions

"""Stable Diffusion XL inpainting: SDXL whose UNet gets a mask and the masked image's latents beside the noisy ones."""

import torch
from diffusers import ModelMixin, StableDiffusionXLInpaintPipeline
from torch import Tensor, nn

from .autoencoders import encode_with_autoencoder_kl
from .base import call_default
from .stable_diffusion import square_side
from .stable_diffusion_inpaint import UNetInpaintingFamily
from .stable_diffusion_xl import StableDiffusionXLFamily


class StableDiffusionXLInpaintFamily(UNetInpaintingFamily, StableDiffusionXLFamily):
    """`StableDiffusionXLInpaintPipeline` with an inpainting checkpoint, whose UNet takes nine channels."""

    pipeline_class = "StableDiffusionXLInpaintPipeline"

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        config = denoiser.config
        return (
            type(denoiser).__name__ == self.denoiser_class
            and config.get("addition_embed_type") == "text_time"
            and config.in_channels == 2 * config.out_channels + 1
        )

    def check_complete(self, pipeline: StableDiffusionXLInpaintPipeline) -> None:
        if pipeline.config.requires_aesthetics_score:
            raise ValueError(
                f"This {type(pipeline).__name__} has requires_aesthetics_score=True, as SDXL's refiner: its sampler "
                "conditions each side of guidance on another score, and training knows none. Take a checkpoint "
                "without."
            )
        super().check_complete(pipeline)

    def resolution(self, pipeline: StableDiffusionXLInpaintPipeline) -> int:
        return square_side(pipeline.unet) * pipeline.vae_scale_factor

    def encode_masked(self, pipeline: StableDiffusionXLInpaintPipeline, pixels: Tensor) -> Tensor:
        """Without the statistics of channels that a VAE may have: the pipeline uses them for samples alone."""
        return encode_with_autoencoder_kl(pipeline.vae, pixels, in_float32=pipeline.vae.config.force_upcast)[0]

    def image_conditioning(
        self,
        pipeline: StableDiffusionXLInpaintPipeline,
        original_size: tuple[int, int],
        crop_top_left: tuple[int, int],
        target_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        original, top_left, target = tuple(original_size), tuple(crop_top_left), tuple(target_size)
        time_ids, _ = pipeline._get_add_time_ids(
            original,
            top_left,
            target,
            call_default(pipeline, "aesthetic_score"),
            call_default(pipeline, "negative_aesthetic_score"),
            negative_original_size=original,
            negative_crops_coords_top_left=top_left,
            negative_target_size=target,
            dtype=torch.float32,
            text_encoder_projection_dim=pipeline.text_encoder_2.config.projection_dim,
        )
        return {"time_ids": time_ids[0]}

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return super().predict(denoiser, self.unet_input(x_t, conditioning), timestep, conditioning)

"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, an `AutoencoderKL`."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from .base import Family, encode_with_autoencoder_kl, square_side


class StableDiffusionFamily(Family):
    """`StableDiffusionPipeline`."""

    pipeline_class = "StableDiffusionPipeline"
    denoiser_name = "unet"
    encoder_names = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")

    def resolution(self, pipeline: StableDiffusionPipeline) -> int:
        return square_side(pipeline.unet) * pipeline.vae_scale_factor

    def encode_prompts(self, pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            prompt_embeds, _ = pipeline.encode_prompt(
                list(prompts),
                device=self.text_device(pipeline),
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        return {"prompt_embeds": prompt_embeds.float()}

    def encode_images(self, pipeline: StableDiffusionPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return encode_with_autoencoder_kl(pipeline.vae, pixels)

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return denoiser(
            x_t,
            timestep,
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            return_dict=False,
        )[0]

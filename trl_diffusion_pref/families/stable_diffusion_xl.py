"""Stable Diffusion XL: two CLIP text encoders, pooled embeddings, conditioning on size and crop."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from .base import Family, encode_with_autoencoder_kl


class StableDiffusionXLFamily(Family):
    """`StableDiffusionXLPipeline`."""

    pipeline_class = "StableDiffusionXLPipeline"
    denoiser_name = "unet"
    encoder_names = ("vae", "text_encoder", "text_encoder_2")
    # examples/dreambooth/train_dreambooth_lora_sdxl.py
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")

    def resolution(self, pipeline: StableDiffusionXLPipeline) -> int:
        return pipeline.default_sample_size * pipeline.vae_scale_factor

    def encode_prompts(self, pipeline: StableDiffusionXLPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
                list(prompts),
                device=self.text_device(pipeline),
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        return {"prompt_embeds": prompt_embeds.float(), "pooled_prompt_embeds": pooled_prompt_embeds.float()}

    def encode_unconditional(self, pipeline: StableDiffusionXLPipeline) -> dict[str, Tensor]:
        """Zeros where the pipeline's config says so (`force_zeros_for_empty_prompt`), as SDXL's does."""
        encoded = self.encode_prompts(pipeline, [""])
        if not pipeline.config.force_zeros_for_empty_prompt:
            return encoded
        return {name: torch.zeros_like(tensor) for name, tensor in encoded.items()}

    def image_conditioning(
        self,
        pipeline: StableDiffusionXLPipeline,
        original_size: tuple[int, int],
        crop_top_left: tuple[int, int],
        target_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """`time_ids`, `(6,)`: original height and width, top and left of the crop, target height and width."""
        time_ids = pipeline._get_add_time_ids(
            tuple(original_size),
            tuple(crop_top_left),
            tuple(target_size),
            dtype=torch.float32,
            text_encoder_projection_dim=pipeline.text_encoder_2.config.projection_dim,
        )
        return {"time_ids": time_ids[0]}

    def encode_images(self, pipeline: StableDiffusionXLPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        config = pipeline.vae.config
        # The published VAE overflows in float16; the one that is repaired for it says force_upcast=False.
        mean, std = encode_with_autoencoder_kl(pipeline.vae, pixels, in_float32=config.force_upcast)
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return mean, std
        shift, scale = (
            torch.tensor(values, device=mean.device).reshape(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return (mean - shift * config.scaling_factor) / scale, std / scale

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return denoiser(
            x_t,
            timestep,
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            added_cond_kwargs={
                "text_embeds": conditioning["pooled_prompt_embeds"].to(x_t.dtype),
                "time_ids": conditioning["time_ids"].to(x_t.dtype),
            },
            return_dict=False,
        )[0]

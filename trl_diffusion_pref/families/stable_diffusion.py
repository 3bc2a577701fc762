"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, an `AutoencoderKL`."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, StableDiffusionPipeline
from torch import Tensor, nn

from .base import Family, GuidanceLayout, Recommended
from .kohya import DIFFUSERS_NAMES
from .records import PartConfig


class StableDiffusionFamily(Family):
    """`StableDiffusionPipeline`."""

    pipeline_class = "StableDiffusionPipeline"
    denoiser_class = "UNet2DConditionModel"
    denoiser_name = "unet"
    encoder_names = ("vae", "text_encoder")
    guidance_layout: GuidanceLayout | None = "batched"
    guided_pipelines: tuple[str, ...] = ("StableDiffusionImg2ImgPipeline",)
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    kohya = DIFFUSERS_NAMES
    # One pipeline class serves 1.x and 2.x.
    recommended = {
        "Diffusion-DPO": Recommended(
            {"beta": 5000.0, "learning_rate": 2e-5},
            "released code (arXiv 2311.12908): 1e-8 times 2,048 pairs a step, 2.048e-5; for Stable Diffusion 1.5, and "
            "nothing was published for 2.x",
        ),
        "Self-NPO": Recommended(
            {"learning_rate": 1e-6, "weight_decay": 1e-3, "guidance_scale": 0.0},
            "released Self-NPO code (arXiv 2505.11777), at 20 images a step and GPU; for Stable Diffusion 1.5, and "
            "nothing was published for 2.x",
        ),
        "Diffusion-KTO": Recommended(
            {"beta": 5000.0, "learning_rate": 1e-7},
            "the paper (arXiv 2404.04465), at 8 images a step; the released code's default beta is 1000; for Stable "
            "Diffusion 1.5, and nothing was published for 2.x",
        ),
    }

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        # The UNets of SDXL, InstructPix2Pix and inpainting are of the same class.
        if not super().takes_denoiser(denoiser):
            return False
        config, latent = denoiser.config, denoiser.config.out_channels
        return config.addition_embed_type != "text_time" and config.in_channels not in (2 * latent, 2 * latent + 1)

    def published_parts(self) -> dict[str, Any]:
        return {"tokenizer": PartConfig(model_max_length=77)}

    def distilled(self, pipeline: StableDiffusionPipeline) -> str | None:
        return distilled_unet(pipeline)

    def conditioning_shapes(self, pipeline: StableDiffusionPipeline) -> dict[str, tuple[int, ...]]:
        width = self.denoiser_config(pipeline).cross_attention_dim
        return {"prompt_embeds": (pipeline.tokenizer.model_max_length, width)}

    def resolution(self, pipeline: StableDiffusionPipeline) -> int:
        return square_side(pipeline.unet) * pipeline.vae_scale_factor

    def encode_prompts(self, pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            prompt_embeds, _ = pipeline.encode_prompt(
                list(prompts), self.text_device(pipeline), num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return {"prompt_embeds": prompt_embeds.float()}

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return denoiser(
            x_t,
            timestep,
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            return_dict=False,
        )[0]


def distilled_unet(pipeline: DiffusionPipeline) -> str | None:
    """What shows that a UNet of Stable Diffusion or SDXL was distilled to a few steps (Turbo, LCM, TCD, Lightning)."""
    if pipeline.unet.config.get("time_cond_proj_dim") is not None:
        return "its unet's config has time_cond_proj_dim, as latent consistency models have"
    scheduler = type(pipeline.scheduler).__name__
    if scheduler in ("LCMScheduler", "TCDScheduler"):
        return f"its scheduler is {scheduler}"
    # Models of v with zero terminal SNR ask for trailing times too; those that predict noise do so to take few steps.
    config = pipeline.scheduler.config
    trailing = config.get("timestep_spacing") == "trailing" and config.get("prediction_type") == "epsilon"
    if scheduler.startswith("Euler") and trailing:
        return f"its {scheduler} has timestep_spacing='trailing', as the Turbo checkpoints have"
    return None


def square_side(denoiser: ModelMixin) -> int:
    """Latents per side of the square images that a denoiser was made for: its config's `sample_size`.

    Raises:
        ValueError: The config has none, or has the sides of a rectangle.
    """
    size = denoiser.config.sample_size
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        raise ValueError(
            f"The {type(denoiser).__name__}'s config has sample_size={size!r}, which is no side of a square. Set "
            'resolution, such as 512 or "512x768".'
        )
    return sides.pop()

"""What a model family must say: how its pipeline encodes prompts and images, and how it calls its denoiser."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn


class Family(ABC):
    """One kind of pipeline. Stateless: every method gets the pipeline or denoiser it works on.

    Attributes:
        pipeline_class: Name of the diffusers class.
        denoiser_name: The pipeline's attribute that is trained, "unet" or "transformer".
        encoder_names: Attributes needed for encoding only; absent from the device during training.
        lora_target_modules: Default targets, those of diffusers' own training examples.
    """

    pipeline_class: str
    denoiser_name: str
    encoder_names: tuple[str, ...]
    lora_target_modules: tuple[str, ...]

    def denoiser(self, pipeline: DiffusionPipeline) -> nn.Module:
        """The module that is trained."""
        return getattr(pipeline, self.denoiser_name)

    def encoders(self, pipeline: DiffusionPipeline) -> list[nn.Module]:
        """The modules that encode prompts and images."""
        return [module for name in self.encoder_names if (module := getattr(pipeline, name, None)) is not None]

    @abstractmethod
    def resolution(self, pipeline: DiffusionPipeline) -> int:
        """Side length in pixels of the square images that the pipeline generates by default."""

    @abstractmethod
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of each prompt as the pipeline's own `__call__` computes it.

        Returns:
            Named tensors `(len(prompts), ...)`, float32, on the encoders' device.
        """

    @abstractmethod
    def encode_images(self, pipeline: DiffusionPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of the latents, in the scale that the denoiser sees.

        Args:
            pixels: `(B, 3, H, W)` float32 in [-1, 1].

        Returns:
            Two tensors `(B, C, h, w)` float32.
        """

    @abstractmethod
    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Calls the denoiser as the pipeline does, without guidance.

        Args:
            denoiser: Possibly wrapped (PEFT, DDP); its compute dtype is that of `x_t` unless autocast is on.
            x_t: `(B, ...)` noisy latents.
            timestep: `(B,)` from `NoiseProcess.model_time`.
            conditioning: From `encode_prompts`, one row per sample.
        """

    @abstractmethod
    def save_lora(
        self, pipeline: DiffusionPipeline, folder: str | Path, state_dict: dict[str, Tensor], metadata: dict[str, Any]
    ) -> None:
        """Writes `pytorch_lora_weights.safetensors` with adapter metadata, without which it loads at a wrong scale."""


def encode_with_autoencoder_kl(vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """`encode_images` for pipelines with an `AutoencoderKL`: `(z - shift_factor) * scaling_factor`."""
    with torch.no_grad():
        posterior = vae.encode(pixels.to(device=vae.device, dtype=vae.dtype)).latent_dist
    shift = vae.config.get("shift_factor") or 0.0
    scale = vae.config.scaling_factor
    return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

"""Wan (text to video): a UMT5 text encoder, a video DiT, a video autoencoder, rectified flow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, WanPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from .autoencoders import decode_with_channel_statistics, encode_with_channel_statistics
from .base import Recommended, call_default
from .kohya import KohyaNames, Rule
from .modalities import VideoFamily


# Of Wan 2.2 5B, which has a VAE of its own.
_CHANNELS_OF_5B, _PIXELS_PER_LATENT_OF_5B = 48, 16


class WanFamily(VideoFamily):
    """`WanPipeline` with one transformer (Wan 2.1), or with one for each of two ranges of noise (Wan 2.2 A14B).

    Wan 2.2 5B gives each token a time of its own; in text to video it is the same for all.
    """

    pipeline_class = "WanPipeline"
    denoiser_class = "WanTransformer3DModel"
    denoiser_name = "transformer"
    denoiser_names = ("transformer", "transformer_2")
    encoder_names: tuple[str, ...] = ("vae", "text_encoder")
    guidance_layout = "separate"
    # diffusers has no LoRA example for Wan; these are the attention layers that its other examples train.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    # With kohya's own prefix diffusers loads only files that have all layers of every block.
    kohya = KohyaNames(
        (
            Rule(r"(blocks\.\d+)\.attn1\.to_([qkv])", r"\1.self_attn.\2"),
            Rule(r"(blocks\.\d+)\.attn1\.to_out\.0", r"\1.self_attn.o"),
            Rule(r"(blocks\.\d+)\.attn2\.to_([qkv])", r"\1.cross_attn.\2"),
            Rule(r"(blocks\.\d+)\.attn2\.to_out\.0", r"\1.cross_attn.o"),
            Rule(r"(blocks\.\d+\.ffn)\.net\.0\.proj", r"\1.0"),
            Rule(r"(blocks\.\d+\.ffn)\.net\.2", r"\1.2"),
        ),
        prefix="diffusion_model.",
    )
    flow = True
    recommended = {
        "Diffusion-DPO": Recommended(
            {"beta": 500.0, "learning_rate": 5e-6},
            "Flow-DPO's paper (arXiv 2501.13918, Table 10), for a video model: LoRA of rank 64, 64 pairs a step",
        ),
        "Flow-RWR": Recommended(
            {"learning_rate": 5e-6},
            "the paper (arXiv 2501.13918, Table 10), for a video model: LoRA of rank 64, 64 samples a step",
        ),
    }

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        # With more channels it animates an image, or follows a control video.
        return super().takes_denoiser(denoiser) and denoiser.config.in_channels == denoiser.config.out_channels

    def denoiser(self, pipeline: WanPipeline) -> ModelMixin:
        """The transformer, or both.

        Raises:
            ValueError: The pipeline lacks a transformer, or has two and gives each token a time of its own.
        """
        if pipeline.config.expand_timesteps and pipeline.config.boundary_ratio is not None:
            raise ValueError(
                "This WanPipeline has two transformers (boundary_ratio) and gives each token a time of its own "
                "(expand_timesteps). Published ones have either: leave out the option that the transformers were not "
                "trained with."
            )
        return super().denoiser(pipeline)

    def time_ranges(self, pipeline: WanPipeline) -> dict[str, tuple[float, float]]:
        boundary = pipeline.config.boundary_ratio
        if boundary is None:
            return {"transformer": (0.0, 1.0)}
        return {"transformer": (boundary, 1.0), "transformer_2": (0.0, boundary)}

    def video_size(self, pipeline: WanPipeline) -> tuple[int, int, int]:
        frames, height, width = (call_default(pipeline, name) for name in ("num_frames", "height", "width"))
        return frames, height, width

    def conditioning_shapes(self, pipeline: WanPipeline) -> dict[str, tuple[int, ...]]:
        width = self.denoiser_config(pipeline).text_dim
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (call_default(pipeline, "max_sequence_length"), width)}
        return shapes | ({"time_weight": ()} if self._time_per_token(pipeline) else {})

    def encode_prompts(self, pipeline: WanPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Includes `time_weight`, `(len(prompts),)`, 1, by which the time is multiplied, if each token has its own."""
        conditioning = super().encode_prompts(pipeline, prompts)
        if self._time_per_token(pipeline):
            conditioning["time_weight"] = torch.ones(len(prompts), device=conditioning["prompt_embeds"].device)
        return conditioning

    def pixels_per_latent(self, pipeline: WanPipeline) -> int:
        return _PIXELS_PER_LATENT_OF_5B if self._is_5b_alone(pipeline) else super().pixels_per_latent(pipeline)

    def _time_per_token(self, pipeline: WanPipeline) -> bool:
        return bool(pipeline.config.expand_timesteps) or self._is_5b_alone(pipeline)

    def _is_5b_alone(self, pipeline: WanPipeline) -> bool:
        """Whether this is Wan 2.2 5B's transformer without its pipeline, which only its channels show."""
        return pipeline.vae is None and self.denoiser_config(pipeline).in_channels == _CHANNELS_OF_5B

    def tokenized_text(self, pipeline: WanPipeline, prompt: str) -> str:
        return prompt_clean(prompt)

    def encode_samples(self, pipeline: WanPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_frames(pipeline, pixels)
        return encode_with_channel_statistics(pipeline.vae, pixels)

    def decode_samples(self, pipeline: WanPipeline, latents: Tensor) -> Tensor:
        return decode_with_channel_statistics(pipeline.vae, latents).clamp(-1, 1)

    def inputs(self, x_t: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Any]:
        """The transformer's arguments that are about the video."""
        return {"hidden_states": x_t}

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        weight = conditioning.get("time_weight")
        if weight is not None:
            frames, height, width = x_t.shape[2:]
            # Two by two latents are one token.
            timestep = (weight * timestep)[:, None].expand(-1, frames * (height // 2) * (width // 2))
        return denoiser(
            **self.inputs(x_t, conditioning),
            timestep=timestep,
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            return_dict=False,
        )[0]

    def lora_arguments(self) -> dict[str, Any]:
        if self.denoiser_name == "transformer":
            return {}
        return {"weight_name": self.own_file(LORA_WEIGHT_NAME_SAFE), "load_into_transformer_2": True}

    def save_lora(
        self, pipeline: WanPipeline, folder: str | Path, state_dict: dict[str, Tensor], metadata: dict[str, Any]
    ) -> None:
        # Both transformers' files have one prefix, and `load_into_transformer_2` says to which one a file belongs.
        pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=state_dict,
            transformer_lora_adapter_metadata=metadata,
            weight_name=self.own_file(LORA_WEIGHT_NAME_SAFE),
        )

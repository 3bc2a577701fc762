"""Stable Diffusion XL: two CLIP text encoders, pooled embeddings, conditioning on size and crop."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin, StableDiffusionXLPipeline
from torch import Tensor, nn

from .autoencoders import channel_statistics, decode_finite, encode_with_autoencoder_kl
from .base import Family, Recommended
from .kohya import KohyaNames, Rule
from .records import PartConfig
from .stable_diffusion import distilled_unet


_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _in_block(match: re.Match[str], config: Mapping[str, Any]) -> str:
    """The authors count the layers of all blocks on one side of the middle, each block's sampling layer included."""
    side, block, kind, index, rest = match.groups()
    per_block, number = config["layers_per_block"] + 1, int(index)
    inner, rest = ("0", _RESNET[rest]) if kind == "resnets" else ("1", rest)
    if side == "mid":
        return f"middle_block.{2 * number if kind == 'resnets' else 1}.{rest}"
    first, name = (1, "input_blocks") if side == "down" else (0, "output_blocks")
    return f"{name}.{first + int(block) * per_block + number}.{inner}.{rest}"


class StableDiffusionXLFamily(Family):
    """`StableDiffusionXLPipeline`."""

    pipeline_class = "StableDiffusionXLPipeline"
    denoiser_class = "UNet2DConditionModel"
    denoiser_name = "unet"
    encoder_names: tuple[str, ...] = ("vae", "text_encoder", "text_encoder_2")
    guidance_layout = "batched"
    # arXiv 2307.01952, section 2.3 and appendix I.
    aspect_ratio_buckets = True
    # examples/dreambooth/train_dreambooth_lora_sdxl.py
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    kohya: ClassVar[KohyaNames | None] = KohyaNames(
        (
            Rule(r"(down|up|mid)_blocks?(?:\.(\d+))?\.(attentions)\.(\d+)\.(.+)", _in_block),
            Rule(rf"(down|up|mid)_blocks?(?:\.(\d+))?\.(resnets)\.(\d+)\.({'|'.join(_RESNET)})", _in_block),
        )
    )
    recommended = {
        "MaPO": Recommended(
            {"learning_rate": 1e-5},
            "released code's README (arXiv 2406.06424), constant, full and LoRA; the paper's second version has 1e-7, "
            "cosine, at 2,048 pairs a step",
        ),
        "Diffusion-DPO": Recommended(
            {"beta": 5000.0, "learning_rate": 2e-5},
            "released code (arXiv 2311.12908): 1e-8 times 2,048 pairs a step, 2.048e-5",
        ),
        "Self-NPO": Recommended(
            {"learning_rate": 1e-7, "weight_decay": 0.0, "guidance_scale": -4.0},
            "released Self-NPO code (arXiv 2505.11777), at 10 images a step and GPU",
        ),
    }

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        # The UNets of Stable Diffusion, of inpainting and of Kolors are of the same class.
        if not super().takes_denoiser(denoiser) or denoiser.config.get("encoder_hid_dim") is not None:
            return False
        config = denoiser.config
        return config.get("addition_embed_type") == "text_time" and config.in_channels != 2 * config.out_channels + 1

    def published_parts(self) -> dict[str, Any]:
        return {"tokenizer": PartConfig(model_max_length=77)}

    def distilled(self, pipeline: StableDiffusionXLPipeline) -> str | None:
        return distilled_unet(pipeline)

    def conditioning_shapes(self, pipeline: StableDiffusionXLPipeline) -> dict[str, tuple[int, ...]]:
        config = self.denoiser_config(pipeline)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {
            "prompt_embeds": (pipeline.tokenizer.model_max_length, config.cross_attention_dim),
            "pooled_prompt_embeds": (pooled,),
            "time_ids": (6,),
        }

    def encode_prompts(self, pipeline: StableDiffusionXLPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
                list(prompts), device=self.text_device(pipeline), do_classifier_free_guidance=False
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

    def encode_samples(self, pipeline: StableDiffusionXLPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        config = pipeline.vae.config
        # The published VAE overflows in float16; the one that is repaired for it says force_upcast=False.
        mean, std = encode_with_autoencoder_kl(pipeline.vae, pixels, in_float32=config.force_upcast)
        if not self._has_channel_statistics(pipeline):
            return mean, std
        shift, scale = channel_statistics(pipeline.vae, mean)
        return (mean - shift * config.scaling_factor) / scale, std / scale

    def decode_samples(self, pipeline: StableDiffusionXLPipeline, latents: Tensor) -> Tensor:
        config = pipeline.vae.config
        if self._has_channel_statistics(pipeline):
            shift, scale = channel_statistics(pipeline.vae, latents)
            latents = latents * scale + shift * config.scaling_factor
        pixels = decode_finite(pipeline.vae, latents / config.scaling_factor, in_float32=config.force_upcast)
        return pixels.clamp(-1, 1)

    @staticmethod
    def _has_channel_statistics(pipeline: StableDiffusionXLPipeline) -> bool:
        """As Playground 2.5 has."""
        config = pipeline.vae.config
        return config.get("latents_mean") is not None and config.get("latents_std") is not None

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

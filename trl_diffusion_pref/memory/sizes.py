"""Shapes of what the denoiser is given, told from configs: nothing is encoded."""

import inspect
from dataclasses import dataclass

import diffusers
from torch import nn

from ..families import Family
from ..families.base import model_inside
from ..trainer.base_config import DiffusionPreferenceConfig


# Latents per side where the denoiser's config does not say, as in Flux's and Qwen-Image's pipelines.
_SAMPLE_SIZE = 128


@dataclass(frozen=True)
class Sizes:
    """Shapes without the batch dimension: of the latents, and of the conditioning by name."""

    latents: tuple[int, ...]
    conditioning: dict[str, tuple[int, ...]]


def sizes_of(
    family: Family, denoiser: nn.Module, cfg: DiffusionPreferenceConfig, vae_factor: int, clip_length: int
) -> Sizes:
    """What the denoiser is given at the config's resolution.

    Args:
        vae_factor: Pixels per latent.
        clip_length: Tokens of CLIP's tokenizer.

    Raises:
        TypeError: An image family whose conditioning is not known here.
    """
    config = model_inside(denoiser).config
    side = config.get("sample_size") or _SAMPLE_SIZE
    sides = (side, side) if isinstance(side, int) else tuple(side)
    if cfg.resolution is not None:
        pixels = (cfg.resolution,) * 2 if isinstance(cfg.resolution, int) else cfg.resolution
        sides = tuple(side // vae_factor for side in pixels)
    latents, conditioning = (config.in_channels, *sides), {}
    match family.pipeline_class:
        case "StableDiffusionPipeline":
            conditioning = {"prompt_embeds": (clip_length, config.cross_attention_dim)}
        case "StableDiffusionXLPipeline":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            conditioning = {
                "prompt_embeds": (clip_length, config.cross_attention_dim),
                "pooled_prompt_embeds": (pooled,),
                "time_ids": (6,),
            }
        case "StableDiffusion3Pipeline":
            conditioning = {
                "prompt_embeds": (clip_length + _prompt_length(family), config.joint_attention_dim),
                "pooled_prompt_embeds": (config.pooled_projection_dim,),
            }
        case "FluxPipeline":
            latents = (config.in_channels // 4, *sides)
            conditioning = {
                "prompt_embeds": (_prompt_length(family), config.joint_attention_dim),
                "pooled_prompt_embeds": (config.pooled_projection_dim,),
                **({"guidance": ()} if config.guidance_embeds else {}),
            }
        case "QwenImagePipeline":
            latents = (config.in_channels // 4, *sides)
            length = _prompt_length(family)
            conditioning = {"prompt_embeds": (length, config.joint_attention_dim), "prompt_embeds_mask": (length,)}
        case "PixArtSigmaPipeline" | "SanaPipeline":
            length = _prompt_length(family)
            conditioning = {"prompt_embeds": (length, config.caption_channels), "prompt_attention_mask": (length,)}
        case _ if family.modality == "image":
            raise TypeError(
                f"The shapes that {family.pipeline_class} conditions on are not known here, so its memory cannot be "
                "estimated."
            )
    return Sizes(latents, conditioning)


def _prompt_length(family: Family) -> int:
    call = getattr(diffusers, family.pipeline_class).__call__
    return inspect.signature(call).parameters["max_sequence_length"].default

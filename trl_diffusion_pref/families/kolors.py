"""Kolors: a UNet as SDXL's, whose text encoder is a language model (ChatGLM)."""

import inspect
from typing import Any

import torch
from diffusers import KolorsPipeline, ModelMixin
from torch import Tensor

from .stable_diffusion_xl import StableDiffusionXLFamily


class KolorsFamily(StableDiffusionXLFamily):
    """`KolorsPipeline`, whose tokenizer needs sentencepiece (`pip install sentencepiece`).

    Without that package diffusers has a stand-in of this name, for which `family_named` raises an error.
    """

    pipeline_class = "KolorsPipeline"
    encoder_names = ("vae", "text_encoder")
    tokens_first = ("text_encoder",)
    # dreambooth/train_dreambooth_lora.py of Kolors' authors; diffusers has no example for it.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    # Blocks are counted as in SDXL's names, which only the loader of SDXL's pipelines can read.
    kohya = None
    # Nothing was published.
    recommended = {}

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        config = denoiser.config
        return (
            type(denoiser).__name__ == self.denoiser_class
            and config.get("addition_embed_type") == "text_time"
            and config.get("encoder_hid_dim") is not None
        )

    def published_parts(self) -> dict[str, Any]:
        return {}

    def conditioning_shapes(self, pipeline: KolorsPipeline) -> dict[str, tuple[int, ...]]:
        config = self.denoiser_config(pipeline)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {
            "prompt_embeds": (_prompt_length(pipeline), config.encoder_hid_dim),
            "pooled_prompt_embeds": (pooled,),
            "time_ids": (6,),
        }

    def token_limits(self, pipeline: KolorsPipeline) -> dict[str, int]:
        return {"tokenizer": _prompt_length(pipeline)}

    def image_conditioning(
        self,
        pipeline: KolorsPipeline,
        original_size: tuple[int, int],
        crop_top_left: tuple[int, int],
        target_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        return {"time_ids": torch.tensor([*original_size, *crop_top_left, *target_size], dtype=torch.float32)}

    @staticmethod
    def _has_channel_statistics(pipeline: KolorsPipeline) -> bool:
        # This pipeline decodes by the scale alone, whatever its VAE's config has.
        return False


def _prompt_length(pipeline: KolorsPipeline) -> int:
    """Tokens that every prompt is padded or cut to; the pipeline's call does not pass its own option on."""
    return inspect.signature(type(pipeline).encode_prompt).parameters["max_sequence_length"].default

"""What is trained, on the meta device: copied, or made from configs, and with its adapter as the trainers make it."""

import copy
import os
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ..data.cells import GENERATED
from ..families import Family, family_for, family_named
from ..trainer.base_config import DiffusionPreferenceConfig
from ..trainer.references import REFERENCE_ADAPTER
from ..trainer.trainable import carries_adapter, with_targets
from .sizes import Sizes, sizes_of


# Which pipeline a denoiser that comes alone belongs to. UNet2DConditionModel is in two.
_PIPELINES = {
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "PixArtTransformer2DModel": "PixArtSigmaPipeline",
    "SanaTransformer2DModel": "SanaPipeline",
    "QwenImageTransformer2DModel": "QwenImagePipeline",
}
# Of the published CLIP tokenizers, in tokens.
_CLIP_LENGTH = 77
# Pixels per latent of the published autoencoders.
_VAE_FACTORS = {"SanaPipeline": 32}
_VAE_FACTOR = 8


def on_meta(model: Any, cfg: DiffusionPreferenceConfig) -> tuple[Family, nn.Module, Sizes]:
    """The family, the denoiser without values, and the shapes that it is given, of what `estimate_memory` takes."""
    if isinstance(model, DiffusionPipeline):
        family = family_for(model)
        _check_images(family)
        denoiser = family.denoiser(model)
        tokenizer = getattr(model, "tokenizer", None)
        length = getattr(tokenizer, "model_max_length", _CLIP_LENGTH)
        return family, _meta_copy(denoiser), sizes_of(family, denoiser, cfg, model.vae_scale_factor, length)
    if isinstance(model, (str, os.PathLike)):
        return _from_configs(model, cfg)
    parts = model.modules() if isinstance(model, nn.Module) else ()
    inside = next((part for part in parts if isinstance(part, ModelMixin)), model)
    name = _PIPELINES.get(type(inside).__name__)
    if name is None:
        raise TypeError(
            f"model is a {type(inside).__name__}. Pass a pipeline, a Hub id, a folder, or a denoiser of one of these "
            f"classes: {', '.join(_PIPELINES)}."
        )
    if inside.config.get("addition_embed_type") == "text_time":
        name = "StableDiffusionXLPipeline"
    family = family_named(name)
    return family, _meta_copy(model), sizes_of(family, model, cfg, _VAE_FACTORS.get(name, _VAE_FACTOR), _CLIP_LENGTH)


def _from_configs(model: str | os.PathLike, cfg: DiffusionPreferenceConfig) -> tuple[Family, nn.Module, Sizes]:
    options = dict(cfg.model_init_kwargs or {})
    dtype = options.pop("dtype", None) or options.pop("torch_dtype", None) or torch.float32
    where = {name: options[name] for name in ("revision", "cache_dir", "token", "local_files_only") if name in options}
    index = DiffusionPipeline.load_config(model, **where)
    family = family_named(index["_class_name"])
    _check_images(family)
    kind = getattr(diffusers, index[family.denoiser_name][1])
    with torch.device("meta"):
        denoiser = kind.from_config(kind.load_config(model, subfolder=family.denoiser_name, **where))
    # Buffers that are computed from arrays are elsewhere. diffusers' to() warns where nothing is kept in float32.
    denoiser = nn.Module.to(denoiser, "meta", dtype)
    vae = getattr(diffusers, index["vae"][1]).load_config(model, subfolder="vae", **where)
    length = _CLIP_LENGTH
    if "tokenizer" in index:
        length = get_tokenizer_config(model, subfolder="tokenizer", **where).get("model_max_length", length)
    return family, denoiser, sizes_of(family, denoiser, cfg, vae_factor(vae), length)


def vae_factor(config: dict[str, Any]) -> int:
    """Pixels per latent, as the pipelines compute it."""
    if "temperal_downsample" in config:
        return 2 ** len(config["temperal_downsample"])
    return 2 ** (len(config.get("encoder_block_out_channels") or config["block_out_channels"]) - 1)


def _meta_copy(module: nn.Module) -> nn.Module:
    """A copy with tensors on the meta device, adapters and dtypes as they are."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def trainable(denoiser: nn.Module, family: Family, peft_config: LoraConfig | None) -> nn.Module:
    """With what the trainers train set to require gradients: a new adapter, one that it carries, or all of it."""
    carried = carries_adapter(denoiser)
    denoiser.requires_grad_(False)
    if peft_config is not None:
        peft_config = with_targets(peft_config, family)
        # How an adapter starts does not change its size, and some ways decompose the weights.
        peft_config.init_lora_weights = True
        with torch.device("meta"):
            return get_peft_model(denoiser, peft_config, low_cpu_mem_usage=True)
    for name, parameter in denoiser.named_parameters():
        # An earlier trainer's frozen reference is not trained.
        own = "lora_" in name and f".{REFERENCE_ADAPTER}." not in name
        parameter.requires_grad_(not carried or own)
    return denoiser


def _check_images(family: Family) -> None:
    if family.modality != "image":
        raise TypeError(
            f"{family.pipeline_class} generates {GENERATED[family.modality]}; memory can be estimated for images only."
        )

"""How much memory training will need, before any of it is allocated.

A step is run on the meta device, where tensors have shapes and no values, and the bytes of all that live at once are
counted. Knows the trainers by their configs alone.
"""

import copy
import inspect
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .families import Family, family_for, family_named
from .likelihood import denoising_error
from .trainer.base_config import DiffusionPreferenceConfig
from .trainer.diffusion_dpo_config import DiffusionDPOConfig
from .trainer.published import published
from .trainer.self_npo_config import SelfNPOConfig


_GIB = 2**30
# Below it bitsandbytes keeps states in float32 (its min_8bit_size), above in 8 bits with a float32 maximum per block.
_LEAST_8BIT_SIZE = 4096
_8BIT_BLOCK = 256
# States as large as the parameter: in its dtype, and in 8 bits.
_STATES = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adamw_apex_fused": 2,
    "paged_adamw_32bit": 2,
    "lion_32bit": 1,
    "paged_lion_32bit": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "sgd": 0,
}
_STATES_8BIT = {
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "rmsprop_bnb_8bit": 1,
}
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
# Pixels per latent of the published autoencoders, and latents per side where the denoiser's config does not say.
_VAE_FACTORS = {"SanaPipeline": 32}
_VAE_FACTOR = 8
_SAMPLE_SIZE = 128


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device in training; see `estimate_memory`.

    Args:
        weights: Of the denoiser, buffers and adapters included.
        parameters, trained_parameters: How many there are, and how many are trained.
        gradients: All of them together.
        optimizer_state: After the first step.
        reference: A second denoiser or adapter that the trainer holds: DPO's reference, Self-NPO's teacher.
        activations_with_checkpointing: The most that forward and backward hold at once beside gradients; None where
            the family cannot train with gradient checkpointing.
        activations_without_checkpointing: The same without.
        total_with_checkpointing, total_without_checkpointing: The most that is held at once. Less than the sum of the
            parts, because gradients come as activations go.
        checkpointing: What the config asks for; `activations` and `total` follow it.
        conditions: What was counted, in words.
    """

    weights: int
    parameters: int
    trained_parameters: int
    gradients: int
    optimizer_state: int
    reference: int
    activations_with_checkpointing: int | None
    activations_without_checkpointing: int
    total_with_checkpointing: int | None
    total_without_checkpointing: int
    checkpointing: bool
    conditions: str

    @property
    def activations(self) -> int:
        return self.activations_with_checkpointing if self.checkpointing else self.activations_without_checkpointing

    @property
    def total(self) -> int:
        return self.total_with_checkpointing if self.checkpointing else self.total_without_checkpointing

    def __str__(self) -> str:
        columns = ("checkpointing", "none") if self.total_with_checkpointing is not None else ("none",)
        lines = [
            self.conditions,
            f"{'GiB, by gradient checkpointing':32}" + "".join(f"{name:>15}" for name in columns),
        ]
        for name in ("weights", "gradients", "optimizer_state", "reference"):
            lines.append(f"{name.replace('_', ' '):32}" + f"{getattr(self, name) / _GIB:15.2f}" * len(columns))
        for label, field in (("activations", "activations"), ("total, the most held at once", "total")):
            values = (getattr(self, f"{field}_with_checkpointing"), getattr(self, f"{field}_without_checkpointing"))
            lines.append(f"{label:32}" + "".join(f"{value / _GIB:15.2f}" for value in values if value is not None))
        return "\n".join(lines)


def estimate_memory(
    model: str | os.PathLike | DiffusionPipeline | nn.Module,
    cfg: DiffusionPreferenceConfig,
    peft_config: LoraConfig | None = None,
) -> MemoryEstimate:
    """What training on one device will need, found without allocating weights.

    Counted are all tensors of a step at the config's batch size (a pair is two images), resolution, precision,
    gradient accumulation and optimiser, with the reference or teacher that the trainer of this config holds, and with
    attention in a kernel that keeps no matrix of weights. Left out: the accelerator's context, fragmentation and
    workspaces of kernels, encoding before training, evaluation, what DDP adds (gradients once more, in buckets), and
    what FSDP and DeepSpeed save.

    Args:
        model: What the trainers take: a pipeline, or a Hub id or folder, of which configs alone are read. Or a
            denoiser alone, on any device, taken to have the published text encoders and autoencoder. Not changed.
        cfg: The config of the trainer.
        peft_config: As for the trainer.

    Returns:
        Bytes; printed, a table.

    Raises:
        TypeError: `cfg` is no config of this package; a model of an unsupported class, or one for clips or sound.
        ValueError: An optimiser whose state is not known.

    Example:

    ```python
    from trl_diffusion_pref import DiffusionDPOConfig, estimate_memory

    cfg = DiffusionDPOConfig(output_dir="dpo", per_device_train_batch_size=1)
    print(estimate_memory("stabilityai/stable-diffusion-xl-base-1.0", cfg))
    ```
    """
    if not isinstance(cfg, DiffusionPreferenceConfig):
        raise TypeError(
            f"cfg is a {type(cfg).__name__}. Pass the config that the trainer will get: MaPOConfig, "
            "DiffusionDPOConfig or SelfNPOConfig."
        )
    family, denoiser, sizes = _on_meta(model, cfg)
    if family.modality != "image":
        raise TypeError(
            f"{family.pipeline_class} generates {family.modality}; memory can be estimated for images only."
        )
    carried = any(isinstance(part, BaseTunerLayer) for part in denoiser.modules())
    denoiser = _trainable(denoiser, family, peft_config, carried)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    # A new adapter is switched off to give the reference, one that was trained before needs a frozen copy.
    reference, extra = _reference(cfg, denoiser, trained, new_adapter=peft_config is not None)
    gradients, optimizer_state = _bytes(trained), _optimizer_bytes(cfg, trained)
    weights = _bytes([*denoiser.parameters(), *denoiser.buffers()])

    one_step = _Step(family, denoiser, cfg, sizes, extra)

    def step(checkpointing: bool) -> tuple[int, int]:
        peak, activations = one_step.run(checkpointing)
        return weights + reference + optimizer_state + max(peak, gradients), activations

    total, activations = step(False)
    total_checkpointed, activations_checkpointed = step(True) if family.gradient_checkpointing else (None, None)
    parameters, trained_parameters = _count(denoiser.parameters()), _count(trained)
    precision = "bf16" if cfg.bf16 else "fp16" if cfg.fp16 else "no"
    images = _images(cfg)
    checkpointing = bool(cfg.activation_checkpointing or cfg.gradient_checkpointing)
    return MemoryEstimate(
        weights=weights,
        parameters=parameters,
        trained_parameters=trained_parameters,
        gradients=gradients,
        optimizer_state=optimizer_state,
        reference=reference,
        activations_with_checkpointing=activations_checkpointed,
        activations_without_checkpointing=activations,
        total_with_checkpointing=total_checkpointed,
        total_without_checkpointing=total,
        checkpointing=checkpointing and family.gradient_checkpointing,
        conditions=(
            f"{family.pipeline_class}: {parameters / 1e6:,.1f} M parameters, {trained_parameters / 1e6:,.1f} M "
            f"trained,\nlatents {'x'.join(map(str, sizes.latents))}, {images} images at once, {precision} autocast, "
            f"{getattr(cfg.optim, 'value', cfg.optim)}"
        ),
    )


# ---- The model, on the meta device ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    """Shapes without the batch dimension: of the latents, and of the conditioning by name."""

    latents: tuple[int, ...]
    conditioning: dict[str, tuple[int, ...]]


def _on_meta(model: Any, cfg: DiffusionPreferenceConfig) -> tuple[Family, nn.Module, _Sizes]:
    if isinstance(model, DiffusionPipeline):
        family = family_for(model)
        denoiser = family.denoiser(model)
        tokenizer = getattr(model, "tokenizer", None)
        length = getattr(tokenizer, "model_max_length", _CLIP_LENGTH)
        return family, _meta_copy(denoiser), _sizes(family, denoiser, cfg, model.vae_scale_factor, length)
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
    return family, _meta_copy(model), _sizes(family, model, cfg, _VAE_FACTORS.get(name, _VAE_FACTOR), _CLIP_LENGTH)


def _from_configs(model: str | os.PathLike, cfg: DiffusionPreferenceConfig) -> tuple[Family, nn.Module, _Sizes]:
    options = dict(cfg.model_init_kwargs or {})
    dtype = options.pop("dtype", None) or options.pop("torch_dtype", None) or torch.float32
    where = {name: options[name] for name in ("revision", "cache_dir", "token", "local_files_only") if name in options}
    index = DiffusionPipeline.load_config(model, **where)
    family = family_named(index["_class_name"])
    kind = getattr(diffusers, index[family.denoiser_name][1])
    with torch.device("meta"):
        denoiser = kind.from_config(kind.load_config(model, subfolder=family.denoiser_name, **where))
    # Buffers that are computed from arrays are elsewhere. diffusers' to() warns where nothing is kept in float32.
    denoiser = nn.Module.to(denoiser, "meta", dtype)
    vae = getattr(diffusers, index["vae"][1]).load_config(model, subfolder="vae", **where)
    length = _CLIP_LENGTH
    if "tokenizer" in index:
        length = get_tokenizer_config(model, subfolder="tokenizer", **where).get("model_max_length", length)
    return family, denoiser, _sizes(family, denoiser, cfg, _vae_factor(vae), length)


def _vae_factor(config: dict[str, Any]) -> int:
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


def _sizes(
    family: Family, denoiser: nn.Module, cfg: DiffusionPreferenceConfig, vae_factor: int, clip_length: int
) -> _Sizes:
    config = next(part for part in denoiser.modules() if isinstance(part, ModelMixin)).config
    side = config.get("sample_size") or _SAMPLE_SIZE
    if cfg.resolution is not None:
        side = cfg.resolution // vae_factor
    latents, conditioning = (config.in_channels, side, side), {}
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
            latents = (config.in_channels // 4, side, side)
            conditioning = {
                "prompt_embeds": (_prompt_length(family), config.joint_attention_dim),
                "pooled_prompt_embeds": (config.pooled_projection_dim,),
                **({"guidance": ()} if config.guidance_embeds else {}),
            }
        case "QwenImagePipeline":
            latents = (config.in_channels // 4, side, side)
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
    return _Sizes(latents, conditioning)


def _prompt_length(family: Family) -> int:
    call = getattr(diffusers, family.pipeline_class).__call__
    return inspect.signature(call).parameters["max_sequence_length"].default


def _trainable(denoiser: nn.Module, family: Family, peft_config: LoraConfig | None, carried: bool) -> nn.Module:
    """As the trainers make it."""
    denoiser.requires_grad_(False)
    if peft_config is not None:
        peft_config = copy.deepcopy(peft_config)
        if peft_config.target_modules is None:
            peft_config.target_modules = list(family.lora_target_modules)
        # How an adapter starts does not change its size, and some ways decompose the weights.
        peft_config.init_lora_weights = True
        with torch.device("meta"):
            return get_peft_model(denoiser, peft_config, low_cpu_mem_usage=True)
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(not carried or "lora_" in name)
    return denoiser


# ---- Parts -----------------------------------------------------------------------------------------------------


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _images(cfg: DiffusionPreferenceConfig) -> int:
    """In one call of the trained denoiser; a pair is two."""
    return (1 if isinstance(cfg, SelfNPOConfig) else 2) * cfg.per_device_train_batch_size


def _optimizer_bytes(cfg: DiffusionPreferenceConfig, trained: list[nn.Parameter]) -> int:
    name = getattr(cfg.optim, "value", cfg.optim)
    if name in _STATES:
        return _STATES[name] * _bytes(trained)
    if name not in _STATES_8BIT:
        raise ValueError(
            f"optim={name!r}: how large its state is, is not known here. Estimate with one of "
            f"{', '.join([*_STATES, *_STATES_8BIT])}."
        )
    total = 0
    for parameter in trained:
        count = parameter.numel()
        eight_bit = count + -(-count // _8BIT_BLOCK) * 4
        total += _STATES_8BIT[name] * (eight_bit if count >= _LEAST_8BIT_SIZE else 4 * count)
    return total


def _reference(
    cfg: DiffusionPreferenceConfig, denoiser: nn.Module, trained: list[nn.Parameter], *, new_adapter: bool
) -> tuple[int, str]:
    """Bytes that a reference or teacher holds, and when it runs: "before" the trained model, "after" it or never."""
    lora = len(trained) < sum(1 for _ in denoiser.parameters())
    whole = _bytes([*denoiser.parameters(), *denoiser.buffers()])
    if isinstance(cfg, DiffusionDPOConfig):
        if cfg.reference == "precomputed":
            return 0, ""
        kind = cfg.reference
        if kind == "auto":
            kind = "copy" if not lora else "adapter_off" if new_adapter else "frozen_adapter"
        return {"copy": whole, "frozen_adapter": _bytes(trained), "adapter_off": 0}[kind], "after"
    if isinstance(cfg, SelfNPOConfig):
        moves = cfg.teacher == "ema"
        if lora:
            return (0 if new_adapter and not moves else _bytes(trained)), "before"
        # A moving teacher is kept in float32.
        return (4 * _count([*denoiser.parameters(), *denoiser.buffers()]) if moves else whole), "before"
    return 0, ""


# ---- A step ----------------------------------------------------------------------------------------------------


class _Step:
    """Forward and backward of one batch on the meta device."""

    def __init__(
        self, family: Family, denoiser: nn.Module, cfg: DiffusionPreferenceConfig, sizes: _Sizes, extra: str
    ) -> None:
        self.family, self.denoiser, self.cfg, self.sizes, self.extra = family, denoiser, cfg, sizes, extra
        base = denoiser.get_base_model() if isinstance(denoiser, PeftModel) else denoiser
        self.base = next(part for part in base.modules() if isinstance(part, ModelMixin))
        self.layouts: dict[tuple, list[tuple | None] | None] = {}
        self.dtype = torch.bfloat16 if cfg.bf16 else torch.float16 if cfg.fp16 else None

    def run(self, checkpointing: bool) -> tuple[int, int]:
        """The most that lives at once beside weights, gradients included, and without them."""
        if checkpointing:
            self.base.enable_gradient_checkpointing(self._checkpoint)
        else:
            self.base.disable_gradient_checkpointing()
        self.denoiser.train()
        for parameter in self.denoiser.parameters():
            parameter.grad = None
        live = _LiveBytes(self.denoiser, self.layouts)
        with torch.device("meta"), live:
            self._forward_and_backward(live)
            activations = live.peak_beside_gradients
            if self.cfg.gradient_accumulation_steps > 1:
                # From the second micro-batch on, gradients are there from the start.
                self._forward_and_backward(live)
        live.detach()
        for parameter in self.denoiser.parameters():
            parameter.grad = None
        return live.peak, activations

    def _checkpoint(self, module: nn.Module, *args: Any) -> Any:
        return checkpoint(module, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self._again()))

    @contextmanager
    def _again(self) -> Iterator[None]:
        # The backward pass runs outside the modes that surround it.
        with torch.device("meta"), _MetaModes(self.dtype):
            yield

    def _forward_and_backward(self, live: "_LiveBytes") -> None:
        size, images = self.sizes.latents, _images(self.cfg)
        # What a trainer holds of a batch: mean and deviation of each image's posterior, latents, noise, target.
        batch_tensors = [torch.empty(images, *size) for _ in range(5)]
        x_t, target = torch.empty(images, *size), batch_tensors[-1]
        conditioning = self._conditioning(images)
        with _MetaModes(self.dtype):
            if self.extra == "before":
                scale = self.cfg.guidance_scale
                if scale is None:
                    scale = published("Self-NPO", self.family.pipeline_class).values["guidance_scale"]
                self._without_gradients(x_t, conditioning, guided=scale not in (0.0, 1.0))
            prediction = self._predict(x_t, conditioning)
            if self.extra == "after":
                kept = self._without_gradients(x_t, conditioning)  # noqa: F841 - alive until the backward pass
            loss = denoising_error(prediction, target).mean()
            del prediction
        loss.backward()

    def _conditioning(self, images: int) -> dict[str, Tensor]:
        # Some families read the length of the longest prompt off its mask, which needs values.
        return {
            name: torch.ones(images, *shape, device="cpu" if name.endswith("_embeds_mask") else "meta")
            for name, shape in self.sizes.conditioning.items()
        }

    def _predict(self, x_t: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        times = torch.empty(len(x_t))
        return self.family.predict(self.denoiser, x_t.to(self.base.dtype), times, conditioning).float()

    def _without_gradients(self, x_t: Tensor, conditioning: dict[str, Tensor], guided: bool = False) -> Tensor:
        if guided:
            x_t = torch.cat([x_t] * 2)
            conditioning = {name: torch.cat([tensor] * 2) for name, tensor in conditioning.items()}
        with torch.no_grad():
            return self._predict(x_t, conditioning)


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside that exist at once; a module's own are left out.

    Args:
        module: Has its gradients counted by themselves.
        layouts: What operations gave, by what they were given. Shared by several steps, it spares most of the time:
            shapes on the meta device are found in Python, and blocks repeat.
    """

    def __init__(self, module: nn.Module, layouts: dict[tuple, list[tuple | None] | None]) -> None:
        super().__init__()
        self._layouts = layouts
        self.current = self.peak = self.gradients = self.peak_beside_gradients = 0
        tensors = [*module.parameters(), *module.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._accumulated)
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        self._with_gradient: set[int] = set()

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _accumulated(self, parameter: nn.Parameter) -> None:
        if id(parameter) not in self._with_gradient:
            self._with_gradient.add(id(parameter))
            self.gradients += parameter.grad.untyped_storage().nbytes()

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.current += size
        self.peak = max(self.peak, self.current)
        self.peak_beside_gradients = max(self.peak_beside_gradients, self.current - self.gradients)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        key = (function, _described(args), _described(tuple(kwargs.items())))
        layout = self._layouts.get(key)
        if layout is not None:
            made = tuple(part and torch.empty_strided(*part[:2], dtype=part[2], device="meta") for part in layout)
            result = made if len(made) > 1 else made[0]
        else:
            result = function(*args, **kwargs)
            self._layouts[key] = _layout(result, args)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result


def _described(value: Any) -> Any:
    """What of an operation's argument decides the layout of its result; can be hashed."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(_described(part) for part in value)
    return type(value), value


def _layout(result: Any, args: tuple) -> list[tuple | None] | None:
    """Sizes, strides and dtypes of new tensors on the meta device; None for other results, and for views."""
    parts = result if isinstance(result, tuple) else (result,)
    given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
    for part in parts:
        new = isinstance(part, Tensor) and part.device.type == "meta" and part.untyped_storage()._cdata not in given
        if not (new or (part is None and len(parts) > 1)):
            return None
    return [None if part is None else (part.shape, part.stride(), part.dtype) for part in parts]


class _FusedAttention(torch.autograd.Function):
    """Keeps what the fused kernels keep: queries, keys, values, the result and one float32 per query."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        # The kernels lay heads out next to each other, so that joining them needs no copy.
        result = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        logsumexp = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, logsumexp)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _MetaModes(TorchFunctionMode):
    """Fused attention and autocast, neither of which the meta device has.

    Autocast as on CUDA: products in `dtype`, normalisation and softmax in float32, and each trained weight's copy in
    `dtype` kept until the forward pass ends.
    """

    _LOWER = {
        functional.linear,
        functional.conv1d,
        functional.conv2d,
        functional.conv3d,
        functional.conv_transpose2d,
        functional.scaled_dot_product_attention,
        torch.matmul,
        torch.bmm,
        torch.mm,
        torch.addmm,
        torch.baddbmm,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.bmm,
    }
    _FLOAT32 = {
        functional.layer_norm,
        functional.group_norm,
        functional.rms_norm,
        functional.softmax,
        torch.softmax,
        Tensor.softmax,
        torch.pow,
        Tensor.pow,
        Tensor.__pow__,
        torch.rsqrt,
        torch.exp,
        Tensor.exp,
    }

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self._copies: dict[int, Tensor] = {}

    def __exit__(self, *error: Any) -> None:
        self._copies.clear()
        super().__exit__(*error)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad and dtype != torch.float32):
            return value.to(dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(dtype)
        return self._copies[id(value)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dtype is not None:
            dtype = self.dtype if function in self._LOWER else torch.float32 if function in self._FLOAT32 else None
            if dtype is not None:
                args, kwargs = tree_map(lambda value: self._cast(value, dtype), (args, kwargs))
        if function is functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return _FusedAttention.apply(named["query"], named["key"], named["value"])
        return function(*args, **kwargs)

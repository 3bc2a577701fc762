"""The estimate: what is added up, and how it is printed. Knows the trainers by their configs alone."""

import os
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn

from ..families.base import model_inside
from ..trainer.base_config import DiffusionPreferenceConfig
from ..trainer.trainable import has_gradient_checkpointing
from .held import bytes_of, count_of, optimizer_bytes, reference_of
from .meta_modes import DEVICE_TYPES
from .model import on_meta, trainable
from .step import Step, images_of


_GIB = 2**30


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
    device_type: str | None = None,
) -> MemoryEstimate:
    """What training on one device will need, found without allocating weights.

    Counted are all tensors of a step at the config's batch size (a pair is two images), resolution, precision,
    gradient accumulation and optimiser, with the reference or teacher that the trainer of this config holds, and with
    attention in a kernel that keeps no matrix of weights. Prompts count as long as the pipeline takes them;
    Qwen-Image, which trains with the batch's longest, needs less where all are short. Left out: the accelerator's
    context, fragmentation and workspaces of kernels, encoding before training, evaluation, what DDP adds (gradients
    once more, in buckets), and what FSDP and DeepSpeed save.

    Args:
        model: What the trainers take: a pipeline, or a Hub id or folder, of which configs alone are read. Or a
            denoiser alone, on any device, taken to have the published text encoders and autoencoder. Not changed.
        cfg: The config of the trainer.
        peft_config: As for the trainer.
        device_type: Whose autocast is counted, "cuda" or "cpu", which normalises in half precision where CUDA does in
            float32. Default: the CPU's with `cfg.use_cpu`, else CUDA's. A config with `bf16=True` can be made on a
            machine without a GPU with `use_cpu=True` alone; say "cuda" then.

    Returns:
        Bytes; printed, a table.

    Raises:
        TypeError: `cfg` is no config of this package; a model of an unsupported class, or one for clips or sound.
        ValueError: An optimiser whose state, or a device whose autocast is not known.

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
    # Not the device of this machine: the estimate is asked for before there is one.
    device_type = device_type or ("cpu" if cfg.use_cpu else "cuda")
    if device_type not in DEVICE_TYPES:
        raise ValueError(f"device_type={device_type!r}: autocast is known here of {' and '.join(DEVICE_TYPES)}.")
    family, denoiser, sizes = on_meta(model, cfg)
    denoiser = trainable(denoiser, family, peft_config)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    # A new adapter is switched off to give the reference, one that was trained before needs a frozen copy.
    reference, extra = reference_of(cfg, denoiser, trained, new_adapter=peft_config is not None)
    gradients, optimizer_state = bytes_of(trained), optimizer_bytes(cfg, trained)
    weights = bytes_of([*denoiser.parameters(), *denoiser.buffers()])

    one_step = Step(family, denoiser, cfg, sizes, extra, device_type)

    def step(checkpointing: bool) -> tuple[int, int]:
        peak, activations = one_step.run(checkpointing)
        return weights + reference + optimizer_state + max(peak, gradients), activations

    total, activations = step(False)
    can_checkpoint = family.gradient_checkpointing and has_gradient_checkpointing(model_inside(denoiser))
    total_checkpointed, activations_checkpointed = step(True) if can_checkpoint else (None, None)
    parameters, trained_parameters = count_of(denoiser.parameters()), count_of(trained)
    precision = f"{'bf16' if cfg.bf16 else 'fp16'} autocast ({device_type})" if cfg.bf16 or cfg.fp16 else "no autocast"
    images = images_of(cfg)
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
        checkpointing=checkpointing and can_checkpoint,
        conditions=(
            f"{family.pipeline_class}: {parameters / 1e6:,.1f} M parameters, {trained_parameters / 1e6:,.1f} M "
            f"trained,\nlatents {'x'.join(map(str, sizes.latents))}, {images} images at once, {precision}, "
            f"{getattr(cfg.optim, 'value', cfg.optim)}"
        ),
    )

"""The estimate: what is added up, and how it is printed. Knows the trainers by their configs alone."""

import os
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn

from ..algorithms import trainer_of
from ..training.config import DiffusionPreferenceConfig
from ..training.model_setup import has_gradient_checkpointing
from .autocast import DEVICE_TYPES
from .held import optimizer_bytes
from .model import pipeline_of
from .step import FakeStep


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
        average: The moving average of the trained weights, with `use_ema`.
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
    average: int
    activations_with_checkpointing: int | None
    activations_without_checkpointing: int
    total_with_checkpointing: int | None
    total_without_checkpointing: int
    checkpointing: bool
    conditions: str

    @property
    def activations(self) -> int:
        return (self.checkpointing and self.activations_with_checkpointing) or self.activations_without_checkpointing

    @property
    def total(self) -> int:
        return (self.checkpointing and self.total_with_checkpointing) or self.total_without_checkpointing

    def __str__(self) -> str:
        columns = ("checkpointing", "none") if self.total_with_checkpointing is not None else ("none",)
        lines = [
            self.conditions,
            f"{'GiB, by gradient checkpointing':32}" + "".join(f"{name:>15}" for name in columns),
        ]
        for name in ("weights", "gradients", "optimizer_state", "reference", *(["average"] if self.average else [])):
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

    The trainer's own step runs on fake tensors, which have shapes and dtypes and no values, under PyTorch's autocast
    of the target device, and all tensors that exist at once are counted: at the config's batch size (a pair is two
    samples), resolution, precision, gradient accumulation and optimiser, with the reference or teacher that the
    trainer holds, and with attention in a kernel that keeps no matrix. Prompts count with all tokens that the
    pipeline takes, which is too much for models that are trained with the batch's longest prompt. Not counted: the
    accelerator's context, fragmentation and workspaces of kernels, encoding before training, evaluation, what DDP
    adds (gradients a second time, in buckets), and what FSDP and DeepSpeed save.

    Args:
        model: What the trainers take: a pipeline, or a Hub id or folder, of which only configs are read. Or a
            denoiser alone, on any device, for which the published text encoders and autoencoder are assumed. It is
            not changed.
        cfg: The config of the trainer.
        peft_config: As for the trainer.
        device_type: The device to estimate for, "cuda" or "cpu"; their autocasts differ. Default: "cpu" with
            `cfg.use_cpu`, else "cuda". On a machine without a GPU a config with `bf16=True` needs `use_cpu=True`; pass
            "cuda" then.

    Returns:
        Bytes; printed, a table.

    Raises:
        TypeError: `cfg` belongs to no trainer, or `model` to no supported class.
        ValueError: An unknown device or optimiser, or an option that the trainer would not take.

    Example:

    ```python
    from trl_diffusion_pref import DiffusionDPOConfig, estimate_memory

    cfg = DiffusionDPOConfig(output_dir="dpo", per_device_train_batch_size=1)
    print(estimate_memory("stabilityai/stable-diffusion-xl-base-1.0", cfg))
    ```
    """
    kind = trainer_of(cfg)
    # Not the device of this machine: the estimate is asked for before there is one.
    device_type = device_type or ("cpu" if cfg.use_cpu else "cuda")
    if device_type not in DEVICE_TYPES:
        raise ValueError(f"device_type={device_type!r}: estimates are made for {' and '.join(DEVICE_TYPES)}.")
    args = cfg.own_copy()
    family, pipeline = pipeline_of(model, args)
    step = FakeStep(kind, pipeline, family, args, peft_config, device_type)
    gradients = sum(parameter.nbytes for parameter in step.trained)
    # In float32, whatever the weights are in.
    average = sum(4 * parameter.numel() for parameter in step.trained) if args.use_ema else 0
    with step.accelerator.fake_tensors:
        optimizer_state = optimizer_bytes(args, step.trained)

    def run(checkpointing: bool) -> tuple[int, int]:
        peak, activations = step.run(checkpointing)
        return step.weights + step.held + average + optimizer_state + max(peak, gradients), activations

    total, activations = run(False)
    can_checkpoint = family.gradient_checkpointing and has_gradient_checkpointing(step.base)
    total_checkpointed, activations_checkpointed = run(True) if can_checkpoint else (None, None)
    parameters, trained_parameters = step.parameters, sum(parameter.numel() for parameter in step.trained)
    latents = "x".join(map(str, step.encoder.latent_shape))
    precision = f"{'bf16' if cfg.bf16 else 'fp16'} autocast ({device_type})" if cfg.bf16 or cfg.fp16 else "no autocast"
    samples = max(step.trainer.layout.num_samples, 1) * args.per_device_train_batch_size
    checkpointing = bool(cfg.activation_checkpointing or cfg.gradient_checkpointing)
    return MemoryEstimate(
        weights=step.weights,
        parameters=parameters,
        trained_parameters=trained_parameters,
        gradients=gradients,
        optimizer_state=optimizer_state,
        reference=step.held,
        average=average,
        activations_with_checkpointing=activations_checkpointed,
        activations_without_checkpointing=activations,
        total_with_checkpointing=total_checkpointed,
        total_without_checkpointing=total,
        checkpointing=checkpointing and can_checkpoint,
        conditions=(
            f"{family.pipeline_class}: {parameters / 1e6:,.1f} M parameters, {trained_parameters / 1e6:,.1f} M "
            f"trained,\nlatents {latents}, {samples} samples at once, {precision}, "
            f"{getattr(cfg.optim, 'value', cfg.optim)}"
        ),
    )

"""The estimate: what is added up, and how it is printed. Knows the trainers by their configs alone."""

import os
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn

from ..algorithms import trainer_of
from ..training.blocks import has_gradient_checkpointing
from ..training.config import DiffusionPreferenceConfig
from .autocast import DEVICE_TYPES
from .cards import GIB
from .held import optimizer_bytes
from .model import pipeline_of
from .step import Counts, FakeStep


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
            lines.append(f"{name.replace('_', ' '):32}" + f"{getattr(self, name) / GIB:15.2f}" * len(columns))
        for label, field in (("activations", "activations"), ("total, the most held at once", "total")):
            values = (getattr(self, f"{field}_with_checkpointing"), getattr(self, f"{field}_without_checkpointing"))
            lines.append(f"{label:32}" + "".join(f"{value / GIB:15.2f}" for value in values if value is not None))
        return "\n".join(lines)


class CountedStep:
    """A training step of one config and what it holds, each part counted when it is first asked for.

    Args:
        model, cfg, peft_config, device_type: See `estimate_memory`.

    Raises:
        TypeError, ValueError: See `estimate_memory`.
    """

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline | nn.Module,
        cfg: DiffusionPreferenceConfig,
        peft_config: LoraConfig | None,
        device_type: str | None,
    ) -> None:
        kind = trainer_of(cfg)
        # Not the device of this machine: the estimate is asked for before there is one.
        self.device_type = device_type or ("cpu" if cfg.use_cpu else "cuda")
        if self.device_type not in DEVICE_TYPES:
            raise ValueError(f"device_type={self.device_type!r}: estimates are made for {' and '.join(DEVICE_TYPES)}.")
        self.cfg, self.args = cfg, cfg.own_copy()
        self.family, pipeline = pipeline_of(model, self.args)
        self.step = FakeStep(kind, pipeline, self.family, self.args, peft_config, self.device_type)
        self.gradients = sum(parameter.nbytes for parameter in self.step.trained)
        self.trained_parameters = sum(parameter.numel() for parameter in self.step.trained)
        # In float32, whatever the weights are in.
        self.average = 4 * self.trained_parameters if self.args.use_ema else 0
        self._states: dict[str, int] = {}
        self._runs: dict[tuple[bool, int], Counts] = {}

    @property
    def can_checkpoint(self) -> bool:
        return self.family.gradient_checkpointing and has_gradient_checkpointing(self.step.base)

    @property
    def checkpointing(self) -> bool:
        """Whether the config's run has gradient checkpointing."""
        return bool(self.cfg.activation_checkpointing or self.cfg.gradient_checkpointing) and self.can_checkpoint

    def optimizer_state(self, optim: str) -> int:
        """Bytes of an optimiser's state, of which `optim` is the name in the config."""
        if optim not in self._states:
            with self.args.changed(optim=optim), self.step.accelerator.fake_tensors:
                self._states[optim] = optimizer_bytes(self.args, self.step.trained)
        return self._states[optim]

    @property
    def optim(self) -> str:
        return getattr(self.args.optim, "value", self.args.optim)

    def counts(self, checkpointing: bool, batch_size: int) -> Counts:
        """Of one batch, forward and backward."""
        if (checkpointing, batch_size) not in self._runs:
            self._runs[checkpointing, batch_size] = self.step.run(checkpointing, batch_size)
        return self._runs[checkpointing, batch_size]

    def total(self, checkpointing: bool, optim: str, batch_size: int) -> int:
        """Bytes of training."""
        kept = self.step.weights + self.step.held + self.average + self.optimizer_state(optim)
        return kept + max(self.counts(checkpointing, batch_size).peak, self.gradients)

    @property
    def conditions(self) -> str:
        cfg, step = self.cfg, self.step
        latents = "x".join(map(str, step.encoder.latent_shape))
        half = f"{'bf16' if cfg.bf16 else 'fp16'} autocast ({self.device_type})"
        samples = max(step.trainer.layout.num_samples, 1) * self.args.per_device_train_batch_size
        return (
            f"{self.family.pipeline_class}: {step.parameters / 1e6:,.1f} M parameters, "
            f"{self.trained_parameters / 1e6:,.1f} M trained,\nlatents {latents}, {samples} samples at once, "
            f"{half if cfg.bf16 or cfg.fp16 else 'no autocast'}, {self.optim}"
        )


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
    counted = CountedStep(model, cfg, peft_config, device_type)
    step, optim, size = counted.step, counted.optim, cfg.per_device_train_batch_size
    total, activations = counted.total(False, optim, size), counted.counts(False, size).activations
    total_checkpointed = activations_checkpointed = None
    if counted.can_checkpoint:
        total_checkpointed, activations_checkpointed = (
            counted.total(True, optim, size),
            counted.counts(True, size).activations,
        )
    return MemoryEstimate(
        weights=step.weights,
        parameters=step.parameters,
        trained_parameters=counted.trained_parameters,
        gradients=counted.gradients,
        optimizer_state=counted.optimizer_state(optim),
        reference=step.held,
        average=counted.average,
        activations_with_checkpointing=activations_checkpointed,
        activations_without_checkpointing=activations,
        total_with_checkpointing=total_checkpointed,
        total_without_checkpointing=total,
        checkpointing=counted.checkpointing,
        conditions=counted.conditions,
    )

"""What a reward of noisy latents is given: the call of the denoiser that a pipeline makes at a step."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor


@dataclass(frozen=True)
class NoisyInputs:
    """What a reward of noisy latents is given: one call of the denoiser, with the prompt and not the negative prompt.

    Args:
        x_t: `(B, ...)` noisy latents with gradient, in the layout of the pipeline's loop (Flux' are packed), in the
            scale and dtype in which the denoiser gets them.
        time: `(B,)` float32 in [0, 1], as a share of the noisiest time.
        conditioning: The denoiser's other arguments by name; the prompt's embeddings are among them, as
            `encoder_hidden_states` in most.
        denoiser: The pipeline's that made the call.
        run: Calls a denoiser of the same architecture on all this, so that its output has a gradient to `x_t`.
    """

    x_t: Tensor
    time: Tensor
    conditioning: Mapping[str, Any]
    denoiser: ModelMixin
    run: Callable[[ModelMixin], object]


# One number for each sample, higher is better: `(B,)`, or several such objectives by name.
Reward: TypeAlias = Callable[[NoisyInputs], Tensor | Mapping[str, Tensor]]


@runtime_checkable
class TrainedReward(Protocol):
    """A reward that knows its objectives, and which pipelines it is for."""

    objectives: tuple[str, ...]

    def check(self, pipeline: DiffusionPipeline) -> None:
        """Raises a ValueError for a pipeline that it is not for."""

    def record(self) -> Mapping[str, Any]:
        """What tells it from other rewards; JSON."""


@dataclass(frozen=True)
class DenoiserCall:
    """The denoiser's call on the conditional side.

    Args:
        denoiser: The pipeline's.
        arguments: By name, the latents among them.
        latents: Name of the latents' argument.
    """

    denoiser: ModelMixin
    arguments: dict[str, Any]
    latents: str

    def inputs(self, leaf: Tensor, shape: torch.Size, time: Tensor) -> NoisyInputs:
        """The call on `leaf`, which holds the denoiser's first argument as one tensor.

        Args:
            shape: Of the noisy latents in the pipeline's loop, which are the first of what stands in `leaf`.
        """
        others = {name: value for name, value in self.arguments.items() if name != self.latents}

        def run(denoiser: ModelMixin) -> object:
            lists = isinstance(self.arguments[self.latents], list)
            return denoiser(**{self.latents: list(leaf.unbind()) if lists else leaf, **others})

        return NoisyInputs(noisy_part(leaf, shape), time, others, self.denoiser, run)

    @property
    def stacked(self) -> Tensor:
        """The denoiser's first argument as one tensor."""
        value = self.arguments[self.latents]
        return torch.stack(value) if isinstance(value, list) else value


def noisy_part(stacked: Tensor, shape: torch.Size) -> Tensor:
    """The noisy latents, of the loop's shape, within the denoiser's first argument: condition images stand after them.

    Raises:
        RuntimeError: The argument cannot hold latents of this shape.
    """
    if stacked.numel() == math.prod(shape):
        return stacked.reshape(shape)
    if stacked.ndim == len(shape) and all(own >= wanted for own, wanted in zip(stacked.shape, shape, strict=True)):
        return stacked[tuple(slice(wanted) for wanted in shape)]
    raise RuntimeError(
        f"The denoiser was called with latents of the shape {tuple(stacked.shape)}, and the scheduler got samples of "
        f"{tuple(shape)}, so the reward's gradient has no place in them. Sample without the reward guidance."
    )


def check_same(x_t: Tensor, sample: Tensor) -> None:
    """Raises unless the denoiser's latents are the scheduler's, up to the scale that solvers in sigma give them.

    Raises:
        RuntimeError: They are not.
    """
    x_t, sample = x_t.float(), sample.float()
    ratio = (x_t * sample).sum() / sample.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    if (x_t - ratio * sample).norm() > 0.05 * x_t.norm():
        raise RuntimeError(
            "The denoiser was not called on the latents that the scheduler got, so the reward's gradient would be "
            "of other samples. This pipeline cannot be guided by a reward."
        )

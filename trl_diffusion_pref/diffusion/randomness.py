"""Random numbers from generators we own, keyed by what they are for.

Each sample's numbers come from its own generator, so they depend neither on the batch's size nor on how it is split
over accumulation steps, nor on the device: four micro-batches of one get the numbers of one batch of four.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .noise import NoiseProcess


# What a sequence of numbers is for: the second entry of a key.
TRAINING, EVALUATION, REFERENCE, LIKELIHOOD, ORDER, CAPTION, ROLLOUT = range(7)
SampleKey = tuple[int, ...]


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator whose numbers depend on all parts of the key, such as (seed, TRAINING, 0, step, position)."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


class StepPositions:
    """Numbers the samples of an optimiser step over its micro-batches and processes, for the last entry of keys.

    Two processes with batches of two number them as one process does with batches of four, or with two batches of two.

    Args:
        batch_size: Rows of a full batch of one process.
        process: This process and how many there are.
    """

    def __init__(self, batch_size: int, process: tuple[int, int]) -> None:
        self.batch_size, self.process = batch_size, process
        self._step, self._batches = -1, 0

    def take(self, step: int, count: int) -> range:
        """The positions of the next micro-batch of a step, which has `count` samples."""
        index, processes = self.process
        before = self._batches if step == self._step else 0
        self._step, self._batches = step, before + bool(count)
        first = (before * processes + index) * self.batch_size
        return range(first, first + count)


@dataclass(frozen=True)
class RowDraws:
    """What is random about B rows of S samples.

    Args:
        timesteps: `(B,)`, shared by the samples of a row.
        noise: `(B, ...)`, shared likewise, or the first sample's where each has its own.
        other_noise: `(S - 1, B, ...)`, the others'; None where it is shared.
        posterior_noise: `(S, B, ...)`, for the posterior sample of each.
        uniform: `(B,)` in [0, 1), decides prompt dropout.
    """

    timesteps: Tensor
    noise: Tensor
    other_noise: Tensor | None
    posterior_noise: Tensor
    uniform: Tensor


def draw_rows(
    keys: Sequence[SampleKey],
    latent_shape: tuple[int, ...],
    num_samples: int,
    process: NoiseProcess,
    device: torch.device,
    *,
    own_noise: bool = False,
) -> RowDraws:
    """Draws for one batch, row i from `generator_for(*keys[i])`.

    Args:
        own_noise: Whether each of the S samples has its own noise.
    """
    timesteps, noise, other_noise, posterior_noise, uniform = [], [], [], [], []
    for key in keys:
        generator = generator_for(*key)
        timesteps.append(process.sample_timesteps(1, generator))
        noise.append(torch.randn(latent_shape, generator=generator))
        posterior_noise.append([torch.randn(latent_shape, generator=generator) for _ in range(num_samples)])
        uniform.append(torch.rand(1, generator=generator))
        # Last, so that all other numbers are those of shared noise.
        others = num_samples - 1 if own_noise else 0
        other_noise.append([torch.randn(latent_shape, generator=generator) for _ in range(others)])
    return RowDraws(
        timesteps=torch.cat(timesteps).to(device),
        noise=torch.stack(noise).to(device),
        other_noise=_samples_first(other_noise).to(device) if own_noise and num_samples > 1 else None,
        posterior_noise=_samples_first(posterior_noise).to(device),
        uniform=torch.cat(uniform).to(device),
    )


def _samples_first(of_rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """`(S, B, ...)` from the samples of each row."""
    return torch.stack([torch.stack(sample) for sample in zip(*of_rows, strict=True)])

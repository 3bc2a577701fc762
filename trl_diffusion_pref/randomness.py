"""Random numbers from generators we own, keyed by what they are for.

Each sample's numbers come from its own generator, so they depend neither on the batch's size nor on how it is split
over accumulation steps, nor on the device: four micro-batches of one see what one batch of four sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .noise import NoiseProcess


TRAINING, EVALUATION, REFERENCE, LIKELIHOOD = range(4)


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator whose numbers depend on all parts of the key, such as (seed, TRAINING, rank, step, position)."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


@dataclass(frozen=True)
class PairDraws:
    """What is random about B pairs.

    Args:
        timesteps: `(B,)`, shared by the two images of a pair.
        noise: `(B, ...)`, shared likewise.
        posterior_noise: Two `(B, ...)`, for the posterior samples of chosen and rejected.
        uniform: `(B,)` in [0, 1), decides prompt dropout.
    """

    timesteps: Tensor
    noise: Tensor
    posterior_noise: tuple[Tensor, Tensor]
    uniform: Tensor


def draw_pairs(
    keys: Sequence[tuple[int, ...]], latent_shape: tuple[int, ...], process: NoiseProcess, device: torch.device
) -> PairDraws:
    """Draws for one batch, pair i from `generator_for(*keys[i])`."""
    timesteps, noise, chosen, rejected, uniform = [], [], [], [], []
    for key in keys:
        generator = generator_for(*key)
        timesteps.append(process.sample_timesteps(1, generator))
        noise.append(torch.randn(latent_shape, generator=generator))
        chosen.append(torch.randn(latent_shape, generator=generator))
        rejected.append(torch.randn(latent_shape, generator=generator))
        uniform.append(torch.rand(1, generator=generator))
    return PairDraws(
        timesteps=torch.cat(timesteps).to(device),
        noise=torch.stack(noise).to(device),
        posterior_noise=(torch.stack(chosen).to(device), torch.stack(rejected).to(device)),
        uniform=torch.cat(uniform).to(device),
    )

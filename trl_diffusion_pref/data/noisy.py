"""Noisy versions of both images of each pair: what the denoiser is given and what its output is compared with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise import NoiseProcess
from ..randomness import PairDraws
from .collator import conditioning_of


@dataclass(frozen=True)
class NoisyPairs:
    """B pairs, stacked [chosen; rejected].

    Args:
        x_t: `(2B, ...)` float32.
        model_time: `(2B,)`, what the denoiser gets as timestep.
        target: `(2B, ...)` float32.
        conditioning: Named tensors `(2B, ...)`.
    """

    x_t: Tensor
    model_time: Tensor
    target: Tensor
    conditioning: dict[str, Tensor]


def corrupt_pairs(
    batch: dict[str, Tensor],
    draws: PairDraws,
    process: NoiseProcess,
    *,
    sample_posterior: bool = True,
    prompt_dropout: float = 0.0,
    empty_prompt: dict[str, Tensor] | None = None,
) -> NoisyPairs:
    """Corrupts a collated batch. Both images of a pair get the same noise, time and prompt.

    Args:
        batch: From `RowCollator`.
        draws: Of the same B pairs.
        sample_posterior: Whether latents are drawn from the VAE's posterior or its mean is taken.
        prompt_dropout: Share of pairs that get the empty prompt, decided by `draws.uniform`.
        empty_prompt: Its conditioning `(1, ...)`; needed where prompts are dropped. What is not in it, an image's own
            conditioning, stays.
    """
    x0 = pair_latents(batch, draws.posterior_noise if sample_posterior else None)
    noise = draws.noise.repeat(2, *[1] * (draws.noise.ndim - 1))
    t = draws.timesteps.repeat(2)
    conditioning = pair_conditioning(batch)
    if prompt_dropout:
        dropped = (draws.uniform < prompt_dropout).repeat(2)
        conditioning = drop_prompts(conditioning, dropped, empty_prompt)
    return NoisyPairs(process.corrupt(x0, noise, t), process.model_time(t), process.target(x0, noise, t), conditioning)


def drop_prompts(
    conditioning: dict[str, Tensor], dropped: Tensor, empty_prompt: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Conditioning `(B, ...)` with the empty prompt's, `(1, ...)`, in the rows where `dropped`, `(B,)`, is set.

    What the empty prompt does not have is an image's own, and stays.
    """
    return {
        name: torch.where(dropped.reshape(-1, *[1] * (tensor.ndim - 1)), empty_prompt[name].to(tensor), tensor)
        if name in empty_prompt
        else tensor
        for name, tensor in conditioning.items()
    }


def pair_latents(batch: dict[str, Tensor], posterior_noise: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Latents `(2B, ...)` of a batch: the posteriors' means, or samples where noise is given."""
    means = [batch["chosen_mean"].float(), batch["rejected_mean"].float()]
    if posterior_noise is None:
        return torch.cat(means)
    stds = (batch["chosen_std"].float(), batch["rejected_std"].float())
    return torch.cat([mean + std * noise for mean, std, noise in zip(means, stds, posterior_noise, strict=True)])


def pair_conditioning(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Conditioning `(2B, ...)` of a batch: the pair's prompt for both images, and what is each image's own."""
    chosen, rejected = (conditioning_of(batch, column) for column in ("chosen", "rejected"))
    return {name: torch.cat([tensor, rejected[name]]) for name, tensor in chosen.items()}

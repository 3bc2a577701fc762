"""A batch as a type, and what is made of it: noisy versions of its samples, for the denoiser and its target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..diffusion.noise import NoiseProcess
from ..diffusion.randomness import SampleKey, draw_rows
from ..families.conditions import LOSS_REGION
from .prompts import PromptTable


# What the columns of encoded rows begin with; `Collator` makes one mapping of each kind.
PROMPT, SAMPLE, CONDITION, SCALAR = "prompt/", "sample/", "condition/", "scalar/"
# The conditioning on the empty prompt that a row has of its own, since its text encoder sees its condition images.
EMPTY_PROMPT = "empty prompt/"
# The number of a row's prompt in the table, for rows that do not carry their own conditioning.
PROMPT_NUMBER = "prompt"
MEAN, STD = "latents/mean", "latents/std"


@dataclass(frozen=True)
class Posterior:
    """The VAE's posterior of each sample, `(S, B, ...)` float32: mean, and standard deviation where it is kept."""

    mean: Tensor
    std: Tensor | None

    def at(self, noise: Tensor | None) -> Tensor:
        """The mean, or a sample made with standard normal noise `(S, B, ...)`.

        Raises:
            ValueError: The standard deviation was not kept.
        """
        if noise is None:
            return self.mean.float()
        if self.std is None:
            raise ValueError("The samples were encoded without their standard deviation. Set latent_sampling='mean'.")
        return self.mean.float() + self.std.float() * noise


@dataclass(frozen=True)
class Batch:
    """B rows of S samples.

    Args:
        rows: `(B,)` int64, positions in the data set that was passed to the trainer.
        latents: Of the samples; None for layouts without samples.
        prompts: Conditioning on the row's prompt, by name, `(B, ...)`.
        sample_conditioning: Conditioning on how each sample was prepared, `(S, B, ...)`.
        conditions: Encoded condition images by column, and the region where errors count as `LOSS_REGION`, `(B, ...)`,
            shared by the row's samples.
        scalars: Columns of numbers, `(B,)` or, one per sample, `(B, S)`.
        empty_prompts: As `prompts`, on the empty prompt, where rows have one each; else `Mode.empty_prompt` is all
            rows'.
    """

    rows: Tensor
    latents: Posterior | None
    prompts: dict[str, Tensor]
    sample_conditioning: dict[str, Tensor]
    conditions: dict[str, Tensor]
    scalars: dict[str, Tensor]
    empty_prompts: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_collated(cls, collated: Mapping[str, Any]) -> "Batch":
        """The batch of a `Collator`'s mapping, in which B comes first, as loaders and accelerate want it.

        What is kept in half precision becomes float32 here, on the device.
        """
        latents = {name: tensor.float().transpose(0, 1) for name, tensor in collated["latents"].items()}
        return cls(
            rows=collated["row"],
            latents=Posterior(latents["mean"], latents.get("std")) if latents else None,
            prompts={name: tensor.float() for name, tensor in collated["prompts"].items()},
            sample_conditioning={name: tensor.float().transpose(0, 1) for name, tensor in collated["samples"].items()},
            conditions={name: tensor.float() for name, tensor in collated["conditions"].items()},
            scalars=dict(collated["scalars"]),
            empty_prompts={name: tensor.float() for name, tensor in collated.get("empty prompts", {}).items()},
        )

    @property
    def posterior(self) -> Posterior:
        """`latents`, of a layout with samples.

        Raises:
            ValueError: The layout has none.
        """
        if self.latents is None:
            raise ValueError("The batch has no latents, since its layout names no columns of samples.")
        return self.latents

    def in_reverse(self) -> "Batch":
        """The samples of each row in the reverse order: rejected before chosen."""
        latents = self.latents
        return replace(
            self,
            latents=latents and Posterior(latents.mean.flip(0), None if latents.std is None else latents.std.flip(0)),
            sample_conditioning={name: tensor.flip(0) for name, tensor in self.sample_conditioning.items()},
            scalars={name: tensor.flip(1) if tensor.ndim == 2 else tensor for name, tensor in self.scalars.items()},
        )

    def conditioning(self) -> dict[str, Tensor]:
        """Conditioning `(S B, ...)`, sample by sample: what is the row's, S times, and what is each sample's own."""
        count = 1 if self.latents is None else len(self.latents.mean)
        shared = {
            name: tensor.repeat(count, *[1] * (tensor.ndim - 1))
            for name, tensor in (self.prompts | self.conditions).items()
        }
        return shared | {name: tensor.flatten(0, 1) for name, tensor in self.sample_conditioning.items()}


@dataclass(frozen=True)
class Mode:
    """Everything in which evaluation differs from training, beside `model.eval()` and gradients.

    Args:
        training: Whether the step trains.
        keys: One per row, for `generator_for`: in training (seed, TRAINING, 0, step, position in the step), so that
            every step draws other noise, the same however its rows are split over processes and micro-batches; in
            evaluation (seed, EVALUATION, row), so that two evaluations draw the same.
        dataset: "train", or "eval" followed by the evaluation data set's name; None for one that only `evaluate` was
            given. What is stored by row (reference errors, the base's likelihoods) is found by it.
        prompt_dropout: Share of rows, in [0, 1), that get the empty prompt; 0 in evaluation.
        condition_dropout: Of those rows, the share whose condition images become zeros, in [0, 1].
        sample_posterior: Whether latents are drawn from the VAE's posterior or its mean is taken.
        empty_prompt: The unconditional side's conditioning, `(1, ...)`; None where no prompt is dropped.
    """

    training: bool
    keys: Sequence[SampleKey]
    dataset: str | None = None
    prompt_dropout: float = 0.0
    condition_dropout: float = 0.0
    sample_posterior: bool = True
    empty_prompt: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class NoisyBatch:
    """Noisy samples, stacked sample by sample: [chosen of all rows; rejected of all rows].

    Args:
        x_t: `(S B, ...)` float32.
        model_time: `(S B,)`, what the denoiser gets as timestep.
        target: `(S B, ...)` float32.
        conditioning: Named tensors `(S B, ...)`.
    """

    x_t: Tensor
    model_time: Tensor
    target: Tensor
    conditioning: dict[str, Tensor]


def corrupt(batch: Batch, mode: Mode, process: NoiseProcess, *, own_noise: bool = False) -> NoisyBatch:
    """Corrupts a batch. All samples of a row get the same noise, time and prompt.

    Args:
        own_noise: Gives each sample its own noise, the first of a row the one that all would get.
    """
    mean = batch.posterior.mean
    process = process.sized(tuple(mean.shape[2:]))
    draws = draw_rows(mode.keys, tuple(mean.shape[2:]), len(mean), process, mean.device, own_noise=own_noise)
    x0 = batch.posterior.at(draws.posterior_noise if mode.sample_posterior else None).flatten(0, 1)
    noise = draws.noise.repeat(len(mean), *[1] * (draws.noise.ndim - 1))
    if draws.other_noise is not None:
        noise = torch.cat([draws.noise, draws.other_noise.flatten(0, 1)])
    t = draws.timesteps.repeat(len(mean))
    conditioning = with_dropout(batch.conditioning(), draws.uniform.repeat(len(mean)), mode, batch)
    return NoisyBatch(process.corrupt(x0, noise, t), process.model_time(t), process.target(x0, noise, t), conditioning)


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of the first and of the second samples of pairs, `(B, ...)` each, from `(2B, ...)`."""
    first, second = values.chunk(2)
    return first, second


def with_dropout(conditioning: dict[str, Tensor], uniform: Tensor, mode: Mode, batch: Batch) -> dict[str, Tensor]:
    """Conditioning `(S B, ...)` without prompt, or without prompt and condition images, in the shares of `mode`.

    Args:
        conditioning: On the batch's rows, S times.
        uniform: `(S B,)`, one number in [0, 1) for each row, which decides for it.
        batch: Says what the rows' empty prompts and condition images are.
    """
    if mode.empty_prompt is None:
        return conditioning
    repeated = {
        name: tensor.repeat(len(uniform) // len(tensor), *[1] * (tensor.ndim - 1))
        for name, tensor in batch.empty_prompts.items()
    }
    conditioning = drop_prompts(conditioning, uniform < mode.prompt_dropout, repeated or mode.empty_prompt)
    images = batch.conditions.keys() - {LOSS_REGION}
    no_images = {name: torch.zeros_like(conditioning[name][:1]) for name in images}
    return drop_prompts(conditioning, uniform < mode.prompt_dropout * mode.condition_dropout, no_images)


def drop_prompts(
    conditioning: Mapping[str, Tensor], dropped: Tensor, empty_prompt: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Conditioning `(B, ...)` with the empty prompt's, `(1 or B, ...)`, in the rows where `dropped`, `(B,)`, is set.

    What the empty prompt does not have is a sample's own, and stays.
    """
    return {
        name: torch.where(dropped.reshape(-1, *[1] * (tensor.ndim - 1)), empty_prompt[name].to(tensor), tensor)
        if name in empty_prompt
        else tensor
        for name, tensor in conditioning.items()
    }


class Collator:
    """Stacks encoded rows.

    Args:
        prompts: Table of prompt embeddings.
    """

    def __init__(self, prompts: PromptTable) -> None:
        self.prompts = prompts

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A mapping that `Batch.from_collated` reads, every tensor with the B rows first.

        Returns:
            `row` `(B,)` int64; `latents`: `mean` and `std` `(B, S, ...)`, or nothing; `prompts`, `samples`,
            `conditions`, `scalars`, `empty prompts`: tensors by name; in the dtypes that they are kept in.
        """
        batch = grouped(rows)
        if not batch["prompts"]:
            batch["prompts"] = self.prompts.conditioning([row[PROMPT_NUMBER] for row in rows])
        return batch


def grouped(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`Collator`'s mapping, with the conditioning on prompts of the rows that carry their own."""

    def stacked(prefix: str) -> dict[str, Tensor]:
        names = [name for name in rows[0] if name.startswith(prefix)]
        return {name.removeprefix(prefix): torch.stack([row[name] for row in rows]) for name in names}

    rows = _padded(rows)
    return {
        "row": torch.tensor([int(row["row"]) for row in rows], dtype=torch.int64),
        "latents": stacked("latents/"),
        "prompts": stacked(PROMPT),
        "empty prompts": stacked(EMPTY_PROMPT),
        "samples": stacked(SAMPLE),
        "conditions": stacked(CONDITION),
        "scalars": stacked(SCALAR),
    }


def _padded(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Rows whose own conditioning on prompts, of as many tokens as a prompt has, is padded with zeros to the longest.

    The empty prompt's is as long, for one takes the place of the other. Masks say what is padding.
    """
    names = [name.removeprefix(PROMPT) for name in rows[0] if name.startswith(PROMPT) and rows[0][name].ndim]
    padded = [dict(row) for row in rows]
    for name in names:
        both = [prefix + name for prefix in (PROMPT, EMPTY_PROMPT) if prefix + name in rows[0]]
        longest = max(len(row[key]) for row in rows for key in both)
        for row in padded:
            for key in both:
                missing = longest - len(row[key])
                row[key] = torch.cat([row[key], row[key].new_zeros(missing, *row[key].shape[1:])])
    return padded

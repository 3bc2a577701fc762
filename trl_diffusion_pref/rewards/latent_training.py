"""Trains a reward of noisy latents on preference pairs (Flow-NRG, arXiv 2501.13918, section 4.3)."""

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..data import (
    PAIRS,
    Batch,
    DatasetEncoder,
    EncodedDataset,
    EncodingOptions,
    Mode,
    NoisyBatch,
    as_resolution,
    check_columns,
    corrupt,
    on_device,
)
from ..data.layouts import Between, Layout, column_names, with_condition_column
from ..diffusion.noise import NoiseProcess, RectifiedFlow, noise_process
from ..diffusion.randomness import EVALUATION, ORDER, TRAINING, generator_for
from ..families import Family, family_for
from .latent import LatentReward, RewardHead, new_settings


logger = logging.getLogger(__name__)

Pairs: TypeAlias = Dataset | EncodedDataset
# The share of pairs whose first sample is better, where it is not 1.
_SOFT_LABEL = "soft_label"


def train_latent_reward(
    pipeline: DiffusionPipeline,
    pairs: Pairs | Mapping[str, Pairs],
    *,
    blocks: int | None = None,
    hidden: int = 128,
    epochs: int = 4,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    seed: int = 0,
    resolution: int | str | tuple[int, int] | None = None,
    num_frames: int | None = None,
    cache_folder: str | Path | None = None,
) -> LatentReward:
    """Trains a head on the first blocks of a pipeline's denoiser to prefer the chosen samples of pairs.

    Both samples of a pair get the same noise and time, and the loss is Bradley and Terry's:
    `-log sigmoid(r(chosen) - r(rejected))`; a column `soft_label`, in [0, 1], is the share by which the chosen one is
    the better. Times are uniform over those at which the pipeline samples. The denoiser is not changed, and its
    adapters are switched off; unlike the paper, which trains its first blocks too.

    Args:
        pipeline: Where its denoiser is, the reward is trained.
        pairs: Columns `prompt`, `chosen` and `rejected`, or what [`encode_dataset`] made of them. For several
            objectives, such as quality and motion, the pairs of each by its name; single pairs are one for the
            objective "preference".
        blocks: How many of the denoiser's first blocks give the features, from 1 on; a UNet's are those on its way
            down. More know more of the sample and cost more at each step of sampling. Default: a third, rounded up.
        hidden: Width of the head, from 1 on.
        epochs: Passes over all pairs, from 1 on. Each draws new noise and times.
        batch_size: Pairs at once, from 1 on.
        learning_rate: Of AdamW, positive; it falls to 0 along a cosine.
        weight_decay: Of AdamW, from 0 on.
        seed: Of the head's first weights, the order, noise and times. The same seed gives the same reward.
        resolution: Side length in pixels, of videos the shorter side; or height and width; default what the pipeline
            generates. Samples are guided at this size.
        num_frames: Of videos; default what the pipeline generates.
        cache_folder: Keeps encoded pairs; default a temporary folder.

    Returns:
        The reward, for [`guidance.reward_guidance`]; it has `save` and `load`.

    Raises:
        ValueError: Pairs that cannot be used, an option out of its range, a pipeline with several denoisers, or a loss
            that is not finite.
        TypeError: An unsupported pipeline.

    Example:

    ```python
    reward = train_latent_reward(pipeline, {"quality": quality_pairs, "motion": motion_pairs})
    reward.save("my-reward")
    with reward_guidance(pipeline, reward, weights={"quality": 0.5, "motion": 0.5}):
        video = pipeline("a cat").frames[0]
    ```
    """
    counts = {"hidden": hidden, "epochs": epochs, "batch_size": batch_size}
    if wrong := next((name for name, value in counts.items() if value < 1), None):
        raise ValueError(f"{wrong}={counts[wrong]}: it must be 1 or more.")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate={learning_rate}: it must be a positive number.")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay={weight_decay}: it must be a number from 0 on.")
    named = _named(pairs)
    settings = new_settings(pipeline, list(named), blocks, hidden)
    with _Pairs(pipeline, named, batch_size, resolution, num_frames, cache_folder) as data:
        settings["latent_shapes"] = [list(data.latent_shape)]
        reward = _new_reward(data, settings, seed)
        reward.head.train().requires_grad_(True)
        steps = epochs * sum(len(data.batches(name)) for name in named)
        optimizer = torch.optim.AdamW(reward.head.parameters(), lr=learning_rate, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        step = 0
        for epoch in range(epochs):
            for name, rows in data.shuffled(seed, epoch):
                loss = _loss(data, reward, name, rows, seed, step)
                if not bool(loss.isfinite()):
                    raise ValueError(
                        f"The reward's loss is {loss.item()} at step {step + 1} of {steps}, on the pairs "
                        f"{', '.join(map(str, rows))} of {name!r}. Lower the learning rate ({learning_rate:g}), or "
                        "load the pipeline in a wider precision."
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
            logger.info(f"Epoch {epoch + 1} of {epochs} of the latent reward, last loss {loss.item():.4f}")
        reward.head.eval().requires_grad_(False)
    return reward


def latent_reward_accuracy(
    reward: LatentReward,
    pipeline: DiffusionPipeline,
    pairs: Pairs | Mapping[str, Pairs],
    *,
    levels: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    batch_size: int = 32,
    seed: int = 0,
    resolution: int | str | tuple[int, int] | None = None,
    num_frames: int | None = None,
    cache_folder: str | Path | None = None,
) -> dict[str, dict[float, float]]:
    """Shares of held-out pairs whose chosen sample a latent reward prefers, by objective and by noise level.

    Args:
        pairs: As for [`train_latent_reward`], of objectives that the reward has. Pairs whose `soft_label` is below 1/2
            count in reverse, and those with 1/2 not at all.
        levels: Times as shares of the noisiest, in [0, 1).
        batch_size, resolution, num_frames, cache_folder: As for [`train_latent_reward`].
        seed: Of the noise, which each pair's samples share.

    Returns:
        Shares in [0, 1], ties counted half.

    Raises:
        ValueError: An objective that the reward lacks, a level out of its range, or pairs that cannot be used.
    """
    named = _named(pairs, reward.objectives[0] if len(reward.objectives) == 1 else "preference")
    if unknown := sorted(set(named) - set(reward.objectives)):
        raise ValueError(f"The reward does not rate {', '.join(unknown)}, only {', '.join(reward.objectives)}.")
    if wrong := [level for level in levels if not 0 <= level < 1]:
        raise ValueError(f"levels has {wrong[0]}: each must be in [0, 1), a share of the noisiest time.")
    reward.check(pipeline)
    found: dict[str, dict[float, float]] = {name: {} for name in named}
    with _Pairs(pipeline, named, batch_size, resolution, num_frames, cache_folder, reward.denoiser) as data:
        for name in named:
            for level in levels:
                won, counted = 0.0, 0.0
                for rows in data.batches(name):
                    batch = data.batch(name, rows)
                    with torch.no_grad():
                        margin = _margin(data, reward, name, data.at_level(batch, level, seed))
                    better = (2 * _soft_labels(batch) - 1).sign()
                    won += float((((margin * better).sign() + 1) / 2 * better.abs()).sum())
                    counted += float(better.abs().sum())
                found[name][level] = won / counted if counted else math.nan
    return found


def _named(pairs: Pairs | Mapping[str, Pairs], single: str = "preference") -> dict[str, Pairs]:
    named = dict(pairs) if isinstance(pairs, Mapping) else {single: pairs}
    if not named:
        raise ValueError("pairs names no objective.")
    return named


def _new_reward(data: "_Pairs", settings: dict[str, Any], seed: int) -> LatentReward:
    """With the head's first weights; the widths of its input are those of the first pair's features."""
    name = next(iter(data.encoded))
    noisy = data.at_level(data.batch(name, [0]), 0.5, seed)
    probe = LatentReward(RewardHead((), len(settings["objectives"]), 1), settings)
    with torch.no_grad():
        streams = probe.streams(data.denoiser, lambda denoiser: data.predict(denoiser, noisy))
    settings["widths"] = [stream.shape[-1] for stream in streams]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = RewardHead(settings["widths"], len(settings["objectives"]), settings["hidden"])
    return LatentReward(head.to(data.denoiser.device), settings)


def _loss(data: "_Pairs", reward: LatentReward, name: str, rows: list[int], seed: int, step: int) -> Tensor:
    """Bradley and Terry's, with soft labels where the pairs have them."""
    batch = data.batch(name, rows)
    mode = Mode(training=True, keys=[(seed, TRAINING, 0, step, place) for place in range(len(rows))])
    margin = _margin(data, reward, name, corrupt(batch, mode, data.process))
    label = _soft_labels(batch)
    return -(label * logsigmoid(margin) + (1 - label) * logsigmoid(-margin)).mean()


def _margin(data: "_Pairs", reward: LatentReward, name: str, noisy: NoisyBatch) -> Tensor:
    """`r(chosen) - r(rejected)` of one objective, `(B,)`."""
    chosen, rejected = _scores(data, reward, name, noisy).chunk(2)
    return chosen - rejected


def _scores(data: "_Pairs", reward: LatentReward, name: str, noisy: NoisyBatch) -> Tensor:
    """One objective of noisy samples, `(S B,)`."""
    time = data.process.time_fraction(noisy.model_time)
    with torch.no_grad():
        streams = reward.streams(data.denoiser, lambda denoiser: data.predict(denoiser, noisy))
    if len(streams[0]) == len(time):
        return reward.rate(streams, time)[name]
    # CogView 4's denoiser is called once for each length of prompt, and the first call ended at the features.
    rows = [slice(row, row + 1) for row in range(len(time))]
    parts = [
        NoisyBatch(
            noisy.x_t[row],
            noisy.model_time[row],
            noisy.target[row],
            {key: tensor[row] for key, tensor in noisy.conditioning.items()},
        )
        for row in rows
    ]
    return torch.cat([_scores(data, reward, name, part) for part in parts])


def _soft_labels(batch: Batch) -> Tensor:
    """`(B,)` in [0, 1]."""
    return batch.scalars.get(_SOFT_LABEL, torch.ones(len(batch.rows), device=batch.rows.device))


class _Pairs:
    """The pairs of each objective, encoded, and the denoiser whose features are rated; a context manager.

    Args:
        denoiser: Default: the pipeline's.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        named: Mapping[str, Pairs],
        batch_size: int,
        resolution: int | str | tuple[int, int] | None,
        num_frames: int | None,
        cache_folder: str | Path | None,
        denoiser: ModelMixin | None = None,
    ) -> None:
        self.family: Family = family_for(pipeline)
        self.family.check_complete(pipeline)
        self.denoiser: ModelMixin = denoiser or self.family.denoiser(pipeline)
        self.batch_size = batch_size
        first, *others = [_columns(data, name, self.family) for name, data in named.items()]
        if any(other.conditions != first.conditions for other in others):
            raise ValueError("Some objectives' pairs have condition images and some have none. Use one kind.")
        self._temporary = tempfile.TemporaryDirectory()
        encoder = DatasetEncoder(
            pipeline,
            self.family,
            first,
            EncodingOptions(resolution=as_resolution(resolution), num_frames=num_frames),
            cache_folder=Path(cache_folder or self._temporary.name),
            batch_size=batch_size,
        )
        with on_device(pipeline, self.family, self.denoiser.device):
            encoder.add_prompts([with_condition_column(data, self.family) for data in _stored(named)])
            self.encoded: dict[str, EncodedDataset] = {
                name: encoder.encode(with_condition_column(data, self.family), f"the pairs of {name!r}")
                for name, data in named.items()
            }
            self.latent_shape = encoder.latent_shape
        self._collate = encoder.collator
        self.process = _uniform_process(pipeline, self.family, self.latent_shape)

    def __enter__(self) -> "_Pairs":
        self._training = self.denoiser.training
        self.denoiser.eval()
        return self

    def __exit__(self, *error: object) -> None:
        self.denoiser.train(self._training)
        self._temporary.cleanup()

    def batches(self, name: str, order: Sequence[int] | None = None) -> list[list[int]]:
        """The rows of an objective's pairs, in batches."""
        rows = list(range(len(self.encoded[name])) if order is None else order)
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    def shuffled(self, seed: int, epoch: int) -> list[tuple[str, list[int]]]:
        """The batches of all objectives, each of one, in the order of an epoch."""
        found: list[tuple[str, list[int]]] = []
        for number, (name, encoded) in enumerate(self.encoded.items()):
            order = torch.randperm(len(encoded), generator=generator_for(seed, ORDER, epoch, number))
            found += [(name, rows) for rows in self.batches(name, order.tolist())]
        order = torch.randperm(len(found), generator=generator_for(seed, ORDER, epoch, len(self.encoded)))
        return [found[place] for place in order.tolist()]

    def batch(self, name: str, rows: Sequence[int]) -> Batch:
        collated = self._collate([self.encoded[name][row] for row in rows])
        return Batch.from_collated(send_to_device(collated, self.denoiser.device))

    def predict(self, denoiser: ModelMixin, noisy: NoisyBatch) -> Tensor:
        return self.family.predict(denoiser, noisy.x_t.to(denoiser.dtype), noisy.model_time, noisy.conditioning)

    def at_level(self, batch: Batch, level: float, seed: int) -> NoisyBatch:
        """A batch at one time, its noise given by the seed and the row."""
        mean = batch.posterior.mean
        noise = torch.stack(
            [
                torch.randn(mean.shape[2:], generator=generator_for(seed, EVALUATION, row))
                for row in batch.rows.tolist()
            ]
        ).to(mean.device)
        t = self.process.times_at(torch.full((mean.shape[0] * mean.shape[1],), level, device=mean.device))
        x0, noise = mean.flatten(0, 1), torch.cat([noise] * len(mean))
        return NoisyBatch(
            self.process.corrupt(x0, noise, t),
            self.process.model_time(t),
            self.process.target(x0, noise, t),
            batch.conditioning(),
        )


def _stored(named: Mapping[str, Pairs]) -> list[Dataset]:
    return [data for data in named.values() if isinstance(data, Dataset)]


def _columns(data: Pairs, name: str, family: Family) -> Layout:
    """The columns that are read of an objective's pairs.

    Raises:
        ValueError, TypeError: They are not there, or these are no pairs.
    """
    layout = replace(PAIRS, optional_scalars=(_SOFT_LABEL,), ranges={_SOFT_LABEL: Between(0.0, 1.0)})
    if isinstance(data, EncodedDataset):
        return layout.conditioned_on(family, list(family.condition_images))
    if isinstance(data, Dataset):
        layout = layout.conditioned_on(family, column_names(with_condition_column(data, family)))
    check_columns(with_condition_column(data, family), f"pairs[{name!r}]", layout)
    return layout


def _uniform_process(pipeline: DiffusionPipeline, family: Family, latent_shape: tuple[int, ...]) -> NoiseProcess:
    """The pipeline's noise process, with the times at which its sampler calls the denoiser."""
    process = noise_process(pipeline.scheduler)
    if not isinstance(process, RectifiedFlow):
        return process
    # Only shifts that depend on the size need it, and latents of sound have none.
    tokens = family.image_tokens(latent_shape) if process.shift is None else None
    # The head must know all times; those in the middle, which training denoisers prefers, are not enough.
    return noise_process(pipeline.scheduler, tokens, timestep_sampling="uniform")

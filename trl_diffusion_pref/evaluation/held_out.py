"""How often a model prefers the chosen sample of a held-out pair, by the likelihood that it gives both samples.

Noise and times are fixed by the seed and the row, stratified over times and shared by the two samples, so that two
evaluations differ by the weights alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Batch
from ..diffusion.elbo import estimate_elbo
from ..diffusion.noise import NoiseProcess
from ..diffusion.randomness import LIKELIHOOD, generator_for


Predict = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
Region = Callable[[dict[str, Tensor]], Tensor | None]
_BOOTSTRAP_RESAMPLES = 2000


def wins(margins: Tensor) -> Tensor:
    """1 where the margin is positive, 0 where it is negative, 1/2 where it is 0."""
    return (margins.sign() + 1) / 2


def bootstrap_interval(values: np.ndarray, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `(N,)` values."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(_BOOTSTRAP_RESAMPLES)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def pair_elbos(
    predict: Predict,
    batch: Batch,
    process: NoiseProcess,
    *,
    seed: int,
    draws: int = 8,
    sampling: str = "stratified",
    weighting: str = "simple",
    shared: bool = True,
    region: Region | None = None,
) -> Tensor:
    """ELBO estimates `(B, 2)` of the chosen and rejected samples of a batch, at the posteriors' means.

    Args:
        predict: Called as `predict(x_t, model_time, conditioning)` with 2B samples.
        seed: Noise and times depend on (seed, row).
        draws, sampling, weighting: See `elbo.estimate_elbo`.
        shared: Whether both samples of a pair get the same noise and times.
        region: From conditioning, the part of samples whose likelihood is meant, see `elbo.denoising_error`.
    """
    rows = batch.rows.tolist()
    sides = [0] * len(rows) + ([0] if shared else [1]) * len(rows)
    generators = [generator_for(seed, LIKELIHOOD, row, side) for row, side in zip(rows + rows, sides, strict=True)]
    conditioning = batch.conditioning()
    with torch.no_grad():
        elbos = estimate_elbo(
            lambda x_t, model_time: predict(x_t, model_time, conditioning),
            batch.posterior.mean.float().flatten(0, 1),
            process,
            generators,
            draws=draws,
            sampling=sampling,
            weighting=weighting,
            region=region and region(conditioning),
        )
    return torch.stack(elbos.chunk(2), dim=1)


class HeldOutPreferences:
    """Accuracies on held-out pairs, with the starting weights' beside them at no cost per evaluation.

    Args:
        process: The model's noise process.
        seed, draws, region: Of the estimates, see `pair_elbos`.
    """

    def __init__(self, process: NoiseProcess, seed: int, draws: int, region: Region | None = None) -> None:
        self.process, self.seed, self.draws, self.region = process, seed, draws, region
        # ELBOs of the starting weights `(rows, 2)`, by data set.
        self.base: dict[str, Tensor] = {}

    def elbos(self, predict: Predict, batch: Batch) -> Tensor:
        """`(B, 2)`, of chosen and rejected."""
        return pair_elbos(predict, batch, self.process, seed=self.seed, draws=self.draws, region=self.region)

    def values(self, predict: Predict, batch: Batch, dataset: str | None) -> dict[str, Tensor]:
        """Metrics `(B,)` of each pair by their logged names; `dataset` finds the base's values."""
        elbos = self.elbos(predict, batch)
        values = {"likelihood_accuracy": wins(elbos[:, 0] - elbos[:, 1])}
        if dataset in self.base:
            base = self.base[dataset][batch.rows.cpu()].to(elbos.device)
            gains = elbos - base
            values["preference_accuracy"] = wins(gains[:, 0] - gains[:, 1])
            values["base_likelihood_accuracy"] = wins(base[:, 0] - base[:, 1])
        return values

    @staticmethod
    def interval(names: Sequence[str], values: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        """95 % interval of the preference accuracy, or without a base of the likelihood accuracy.

        Args:
            names: Of the columns of `values`, where several weights are evaluated each with a prefix.
            values: `(N, len(names))`.
            rows: `(N,)`; values are put in their order, so that the interval does not depend on how processes shared
                them.
        """
        intervals = {}
        for likelihood in [name for name in names if name.endswith("likelihood_accuracy") and "base_" not in name]:
            preference = likelihood.replace("likelihood", "preference")
            name = preference if preference in names else likelihood
            ordered = values[np.argsort(rows, kind="stable"), list(names).index(name)]
            intervals[f"{name}_low"], intervals[f"{name}_high"] = bootstrap_interval(ordered)
        return intervals

    def record(self, weights: str) -> dict[str, Any]:
        """What stored values of the base depend on, beside the data: the starting weights by their fingerprint."""
        return {
            "what": "likelihoods of the starting weights",
            "weights": weights,
            "noise process": self.process.describe(),
            "seed": self.seed,
            "draws": self.draws,
            **({} if self.region is None else {"region": "mask"}),
        }

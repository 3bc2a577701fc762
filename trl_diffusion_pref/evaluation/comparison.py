"""What a comparison of models found: scores, win rates, diversity and held-out accuracies, with intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .held_out import bootstrap_interval
from .preference import PreferenceAccuracy


# Prompts that the report names for each model and reward.
_NAMED = 5


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % bootstrap interval over prompts.

    Args:
        value: The mean.
        low, high: Of the interval.
        prompts: How many prompts it is taken over.
    """

    value: float
    low: float
    high: float
    prompts: int

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"

    @property
    def percent(self) -> str:
        """As percentages."""
        return f"{self.value:.0%} ({self.low:.0%} to {self.high:.0%})"


def estimate(by_prompt: np.ndarray) -> Estimate | None:
    """The mean of one value for each prompt, `(P,)`; NaN values are left out. None if no value is left.

    Samples of one prompt are alike, so that an interval over samples would be too narrow; prompts are resampled.
    """
    values = by_prompt[np.isfinite(by_prompt)]
    if not len(values):
        return None
    return Estimate(float(values.mean()), *bootstrap_interval(values), len(values))


def mean_by_prompt(values: np.ndarray) -> np.ndarray:
    """Means `(P,)` of `(P, S)` values over the finite ones; NaN for prompts without any."""
    finite = np.isfinite(values)
    counts = finite.sum(axis=1)
    sums = np.where(finite, values, 0.0).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


@dataclass(frozen=True)
class Comparison:
    """Models compared on the same prompts and seeds.

    Args:
        models: Names; the first one is the base, with which the others are compared.
        prompts: P of them.
        seeds: `(P, S)`, S for each prompt, the same for every model.
        modality: "image", "video" or "audio".
        scores: By model, then by reward: `(P, S)` float64; NaN for samples that are left out.
        diversity: By model: mean distance of two samples of the prompt, `(P,)`; empty with one seed.
        blank: By model: how many samples were blanked by a safety checker, and are left out.
        seconds: By model: seconds for one sample, where it was measured.
        accuracies: By model: held-out preference accuracy with the base as reference.
        options: What the samples were generated with.
    """

    models: list[str]
    prompts: list[str]
    seeds: list[list[int]]
    modality: str
    scores: Mapping[str, Mapping[str, np.ndarray]]
    diversity: Mapping[str, np.ndarray] = field(default_factory=dict)
    blank: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    accuracies: Mapping[str, PreferenceAccuracy] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.prompts), self.samples_per_prompt)
        for model in self.models:
            for reward, values in self.scores[model].items():
                if values.shape != shape:
                    raise ValueError(f"scores of {model!r} by {reward!r} have the shape {values.shape}, not {shape}.")

    @property
    def samples_per_prompt(self) -> int:
        """S."""
        return len(self.seeds[0])

    @property
    def base(self) -> str:
        """The model that the others are compared with."""
        return self.models[0]

    @property
    def size(self) -> str:
        """How many prompts and seeds, in words."""
        count = self.samples_per_prompt
        return f"{len(self.prompts)} prompt{'s' * (len(self.prompts) > 1)}, {count} seed{'s' * (count > 1)} each"

    @property
    def rewards(self) -> list[str]:
        """Names of the rewards."""
        return list(self.scores[self.base])

    def differences(self, model: str, reward: str) -> np.ndarray:
        """`(P, S)`: the model's score minus the base's on the same prompt and seed."""
        return self.scores[model][reward] - self.scores[self.base][reward]

    def score(self, model: str, reward: str) -> Estimate | None:
        """Mean score of a model."""
        return estimate(mean_by_prompt(self.scores[model][reward]))

    def difference(self, model: str, reward: str) -> Estimate | None:
        """Mean difference from the base."""
        return estimate(mean_by_prompt(self.differences(model, reward)))

    def win_rate(self, model: str, reward: str) -> Estimate | None:
        """Share of samples that score higher than the base's on the same prompt and seed; equal ones count half."""
        return estimate(mean_by_prompt((np.sign(self.differences(model, reward)) + 1) / 2))

    def worse(self, model: str, reward: str) -> list[tuple[str, float]]:
        """Prompts whose mean score fell, with the difference; the largest loss first."""
        means = mean_by_prompt(self.differences(model, reward))
        order = np.argsort(means, kind="stable")
        return [(self.prompts[index], float(means[index])) for index in order.tolist() if means[index] < 0]

    # ---- Reports -------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Everything as what JSON can hold; NaN becomes None."""
        models = {}
        for model in self.models:
            rewards = {}
            for reward in self.rewards:
                entry: dict[str, Any] = {"score": _plain(self.score(model, reward))}
                if model != self.base:
                    entry["difference"] = _plain(self.difference(model, reward))
                    entry["win rate"] = _plain(self.win_rate(model, reward))
                    entry["worse"] = [
                        {"prompt": prompt, "difference": loss} for prompt, loss in self.worse(model, reward)
                    ]
                entry["scores"] = _numbers(self.scores[model][reward])
                rewards[reward] = entry
            found = self.accuracies.get(model)
            models[model] = {
                "rewards": rewards,
                "diversity": _plain(self._diversity(model)),
                "blank samples": self.blank.get(model, 0),
                "seconds per sample": self.seconds.get(model),
                "held-out preference accuracy": None if found is None else asdict(found),
            }
        return {
            "base": self.base,
            "modality": self.modality,
            "prompts": self.prompts,
            "seeds": self.seeds,
            "options": dict(self.options),
            "models": models,
        }

    def _diversity(self, model: str) -> Estimate | None:
        return estimate(self.diversity[model]) if model in self.diversity else None

    def rows(self) -> list[dict[str, str]]:
        """The summary table: one row for each model, values as text by column."""
        table = []
        for model in self.models:
            row = {"model": model}
            for reward in self.rewards:
                row[reward] = _shown(self.score(model, reward))
                rate = self.win_rate(model, reward) if model != self.base else None
                row[f"{reward}: wins against {self.base}"] = rate.percent if rate else ""
            if self.diversity:
                row["diversity"] = _shown(self._diversity(model))
            if self.accuracies:
                found = self.accuracies.get(model)
                row["held-out preference accuracy"] = (
                    f"{found.accuracy:.0%} ({found.interval[0]:.0%} to {found.interval[1]:.0%})"
                    if found is not None and found.accuracy is not None
                    else ""
                )
            if any(self.blank.values()):
                row["blanked"] = str(self.blank.get(model, 0))
            if self.seconds:
                row[f"seconds per {self.modality}"] = f"{self.seconds[model]:.3g}" if model in self.seconds else ""
            table.append(row)
        return table

    def to_markdown(self) -> str:
        """A section for a model card: the summary, and the prompts that lost most."""
        table = self.rows()
        columns = list(table[0])
        lines = [
            f"{self.size}, the same for all models. Means with 95 % bootstrap intervals over prompts; equal scores "
            "count as half a win.",
            "",
            f"| {' | '.join(columns)} |",
            f"|{'---|' * len(columns)}",
            *(f"| {' | '.join(row[column] for column in columns)} |" for row in table),
        ]
        for model in self.models[1:]:
            for reward in self.rewards:
                worse = self.worse(model, reward)
                share = len(worse) / len(self.prompts)
                lines += ["", f"By {reward}, {model} became worse on {len(worse)} prompts ({share:.0%})."]
                lines += [f"* {_escaped(prompt)} ({loss:+.3g})" for prompt, loss in worse[:_NAMED]]
        return "\n".join(lines) + "\n"


def _shown(found: Estimate | None) -> str:
    return "" if found is None else str(found)


def _plain(found: Estimate | None) -> dict[str, float] | None:
    return None if found is None else asdict(found)


def _numbers(values: np.ndarray) -> list[list[float | None]]:
    return [[number if math.isfinite(number) else None for number in row] for row in values.tolist()]


def _escaped(text: str) -> str:
    """A prompt within Markdown: on one line, and without characters that would format it."""
    flat = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in flat)


def distances_within(features: Sequence[np.ndarray]) -> float:
    """Mean distance of two samples of a prompt, the root mean square of their difference; NaN for fewer than two."""
    if len(features) < 2:
        return math.nan
    found = [
        math.sqrt(float(np.square(one - other).mean()))
        for index, one in enumerate(features)
        for other in features[index + 1 :]
    ]
    return float(np.mean(found))

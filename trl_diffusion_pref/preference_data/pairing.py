"""From scores to preferences: probabilities, strengths, and which samples make a pair. Numbers alone, no samples."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np


Strategy = Literal["best_worst", "all"]
# Divides differences of scores before the sigmoid: one for all rewards, one by name of the reward, or None, see
# `temperatures_of`.
Temperature: TypeAlias = float | Mapping[str, float] | None

_NEWTON_STEPS, _TOLERANCE = 100, 1e-10
# Strengths of samples that always win would be infinite.
_CERTAIN = 1e-9


def spread(groups: Iterable[Sequence[float]]) -> float:
    """Standard deviation of scores within their groups, pooled: `sqrt(sum (s - mean of group)^2 / sum (n - 1))`.

    Args:
        groups: The scores of each prompt's samples.

    Returns:
        1 where there is no deviation at all.
    """
    squares, freedom = 0.0, 0
    for scores in groups:
        values = np.asarray(scores, dtype=np.float64)
        squares += float(np.square(values - values.mean()).sum()) if len(values) else 0.0
        freedom += max(len(values) - 1, 0)
    return float(np.sqrt(squares / freedom)) if squares > 0 else 1.0


def temperatures_of(temperature: Temperature, groups: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float]:
    """A temperature for each reward.

    Args:
        temperature: None: each reward's own `spread`, so that all rewards count alike whatever their scales.
        groups: By name of the reward, the scores of each prompt's samples.

    Raises:
        ValueError: A temperature that is not positive, of an unknown reward, or missing.
    """
    if temperature is None:
        return {name: spread(scores) for name, scores in groups.items()}
    given = dict(temperature) if isinstance(temperature, Mapping) else dict.fromkeys(groups, float(temperature))
    if given.keys() != groups.keys():
        raise ValueError(f"temperature is given for {', '.join(given)}, but the rewards are {', '.join(groups)}.")
    for name, value in given.items():
        if not (value > 0 and np.isfinite(value)):
            raise ValueError(f"temperature={value} of reward '{name}'; it must be positive and finite.")
    return {name: float(given[name]) for name in groups}


def preference_probabilities(scores: Mapping[str, Sequence[float]], temperatures: Mapping[str, float]) -> np.ndarray:
    """How likely each sample of a prompt is better than each other: the mean over rewards of sigmoid(difference / t).

    It is the Bradley-Terry model of each reward, averaged over rewards as in RankDPO (arXiv:2410.18013).

    Args:
        scores: By name of the reward, one number for each of k samples.
        temperatures: By name of the reward.

    Returns:
        `(k, k)` float64, entry (i, j) for i better than j; (j, i) is 1 minus it, and the diagonal 1/2.
    """
    parts = []
    for name, values in scores.items():
        difference = np.subtract.outer(np.asarray(values, np.float64), np.asarray(values, np.float64))
        # The sigmoid as a tangent, which does not overflow.
        parts.append((np.tanh(difference / temperatures[name] / 2) + 1) / 2)
    return np.mean(parts, axis=0)


def strengths(probabilities: np.ndarray) -> np.ndarray:
    """Bradley-Terry strengths: `sigmoid(strength_i - strength_j)` comes as near to the probabilities as it can.

    The maximum of the likelihood of one comparison per pair, by Newton's method. Where all probabilities come from one
    reward, strengths are its scores over the temperature, apart from a constant.

    Args:
        probabilities: `(k, k)`, see `preference_probabilities`.

    Returns:
        `(k,)` float64 with mean 0. Probabilities nearer to 0 or 1 than 1e-9 count as 1e-9 and 1 - 1e-9.
    """
    wanted = np.clip(probabilities, _CERTAIN, 1 - _CERTAIN)
    count = len(wanted)
    # From the mean of the log odds, which is the result for a single reward.
    values = np.log(wanted / (1 - wanted)).mean(axis=1)

    def log_likelihood(at: np.ndarray) -> float:
        return float(-(wanted * np.logaddexp(0, -np.subtract.outer(at, at))).sum())

    for _ in range(_NEWTON_STEPS):
        model = (np.tanh(np.subtract.outer(values, values) / 2) + 1) / 2
        gradient = (wanted - model).sum(axis=1)
        if np.abs(gradient).max() < _TOLERANCE:
            break
        weights = model * (1 - model)
        # The constant, which changes nothing, is fixed by the term of ones.
        curvature = np.diag(weights.sum(axis=1)) - weights + 1 / count
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while size > 1e-6 and log_likelihood(values + size * step) < log_likelihood(values):
            size /= 2
        values = values + size * step
    return values - values.mean()


def combined_scores(scores: Mapping[str, Sequence[float]], temperatures: Mapping[str, float]) -> list[float]:
    """One score for each sample of a prompt: the only reward's own, or the strengths of several."""
    if len(scores) == 1:
        return [float(value) for value in next(iter(scores.values()))]
    return strengths(preference_probabilities(scores, temperatures)).tolist()


def choose_pairs(
    scores: Sequence[float], strategy: Strategy, min_score_difference: float = 0.0, most: int | None = None
) -> tuple[list[tuple[int, int]], int, int]:
    """Which samples of a prompt make pairs.

    Args:
        scores: One for each of k samples; samples that are equally good stay in their order.
        strategy: "best_worst": the best with the worst. "all": each two, those with the largest difference first.
        min_score_difference: Pairs that differ by less are left out; equal scores never make a pair.
        most: How many pairs at most, those with the largest differences.

    Returns:
        Pairs (chosen, rejected); how many were left out for being too close, ties included; how many for `most`.
    """
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    candidates = [(better, worse) for place, better in enumerate(order) for worse in order[place + 1 :]]
    if strategy == "best_worst":
        candidates = [(order[0], order[-1])]
    candidates.sort(key=lambda pair: scores[pair[1]] - scores[pair[0]])
    differences = [scores[better] - scores[worse] for better, worse in candidates]
    kept = [
        pair
        for pair, difference in zip(candidates, differences, strict=True)
        # A difference of 0.3 - 0.2 is a little less than 0.1.
        if difference > 0 and difference >= min_score_difference * (1 - 1e-9)
    ]
    chosen = kept[:most]
    return chosen, len(candidates) - len(kept), len(kept) - len(chosen)


def check_pairing(strategy: str, min_score_difference: float, most: int | None) -> None:
    """Raises a ValueError for options that `choose_pairs` cannot use."""
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy={strategy!r} is none of {', '.join(get_args(Strategy))}.")
    if not (min_score_difference >= 0 and np.isfinite(min_score_difference)):
        raise ValueError(f"min_score_difference={min_score_difference} must be finite and at least 0.")
    if most is not None and most < 1:
        raise ValueError(f"max_pairs_per_prompt={most} must be at least 1, or None for all.")

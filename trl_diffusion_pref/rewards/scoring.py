"""Scores of samples by one or several rewards, checked: `score(rewards, prompts, samples, **columns)`."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch


# (prompts, samples, **columns) -> one number per sample, higher is better. A column is a list with one entry per
# sample, as TRL passes the other columns of a data set; any other value is passed on unchanged.
Reward: TypeAlias = Callable[..., Sequence[float]]
Rewards: TypeAlias = Reward | Iterable[Reward] | Mapping[str, Reward]


class RewardError(ValueError):
    """A reward could not score a sample; the message names both.

    Args:
        reward: Name of the reward.
        problem: What was wrong.
        sample: Position of the sample in the call, from 0, or None where no single one is to blame.
    """

    def __init__(self, reward: str, problem: str, sample: int | None = None) -> None:
        where = "" if sample is None else f", sample {sample}"
        super().__init__(f"reward '{reward}'{where}: {problem}")
        self.reward, self.problem, self.sample = reward, problem, sample


def reward_name(reward: Reward) -> str:
    """The name that a reward's values are logged under, as `scores/<name>`: its `__name__`, as in TRL.

    Raises:
        TypeError: It cannot be called, or has no name.
    """
    if not callable(reward):
        raise TypeError(f"a reward is a callable (prompts, samples, **columns) -> list of floats, got {reward!r}")
    name = getattr(reward, "__name__", None)
    if not name:
        # functools.partial and objects of a user's class have no name of their own.
        raise TypeError(
            f"the reward {reward!r} has no `__name__`. Set the attribute, or pass rewards by name: {{'name': reward}}."
        )
    return str(name)


def named_rewards(rewards: Rewards) -> dict[str, Reward]:
    """Rewards by name.

    Raises:
        ValueError: None at all, or two of one name.
        TypeError: See `reward_name`.
    """
    if isinstance(rewards, Mapping):
        named = [(str(name), reward) for name, reward in rewards.items()]
        for name, reward in named:
            if not callable(reward):
                raise TypeError(f"reward '{name}' is not callable: {reward!r}")
    else:
        listed = [rewards] if callable(rewards) else list(rewards)
        named = [(reward_name(reward), reward) for reward in listed]
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"two rewards are named {', '.join(map(repr, twice))}. Give each its own `name`, or pass rewards by name: "
            "{'name': reward}."
        )
    if not named:
        raise ValueError("no rewards to score with; pass at least one")
    return dict(named)


def score(rewards: Rewards, prompts: Sequence[str], samples: Sequence[Any], **columns: Any) -> dict[str, list[float]]:
    """Scores samples by each reward.

    Args:
        rewards: One reward, several, or several by name.
        prompts: One per sample.
        samples: Images, videos (lists of frames) or audio (`data.decode.audio.Waveform`, or a cell of an audio
            column), as the rewards take them.
        **columns: Passed to every reward; lists with one entry per sample, and other values.

    Returns:
        By name of the reward, one finite number per sample, in order.

    Raises:
        RewardError: A reward raises, or returns another number of values, NaN, infinity, or something that is not a
            number.
        ValueError: Another number of prompts than of samples, or wrong rewards, see `named_rewards`.
    """
    named = named_rewards(rewards)
    prompts, samples = list(prompts), list(samples)
    if len(prompts) != len(samples):
        raise ValueError(f"{len(prompts)} prompts for {len(samples)} samples; pass one prompt per sample")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {index} is a {type(prompt).__name__}, not a string: {prompt!r}")
    return {name: _checked_call(name, reward, prompts, samples, columns) for name, reward in named.items()}


def _checked_call(
    name: str, reward: Reward, prompts: list[str], samples: list[Any], columns: dict[str, Any]
) -> list[float]:
    if not samples:
        return []
    try:
        values = reward(prompts, samples, **columns)
    except RewardError:
        raise
    # A user's function may raise anything.
    except Exception as error:
        index = None
        # Scoring again would only fail again, and cost time, where memory or a server is the reason.
        if not isinstance(error, (MemoryError, OSError, torch.OutOfMemoryError)):
            index = _first_failing(reward, prompts, samples, columns)
        raise RewardError(name, f"raised {type(error).__name__}: {error}", index) from error
    return checked_scores(name, values, len(samples))


def _first_failing(reward: Reward, prompts: list[str], samples: list[Any], columns: dict[str, Any]) -> int | None:
    """The first sample for which the reward raises when it gets only a part of them, or None if only all fail."""
    first, last = 0, len(samples)
    while last - first > 1:
        middle = (first + last) // 2
        if _raises(reward, prompts, samples, columns, first, middle):
            last = middle
        elif _raises(reward, prompts, samples, columns, middle, last):
            first = middle
        else:
            return None
    return first


def _raises(
    reward: Reward, prompts: list[str], samples: list[Any], columns: dict[str, Any], first: int, last: int
) -> bool:
    part = column_slice(columns, len(samples), first, last)
    try:
        reward(prompts[first:last], samples[first:last], **part)
    except Exception:
        return True
    return False


def column_slice(columns: Mapping[str, Any], count: int, first: int, last: int) -> dict[str, Any]:
    """The columns of samples `first` to `last`; values other than lists with one entry per sample are unchanged."""
    return {
        name: value[first:last] if isinstance(value, (list, tuple)) and len(value) == count else value
        for name, value in columns.items()
    }


def checked_scores(name: str, values: Any, count: int) -> list[float]:
    """What a reward returned, as floats.

    Args:
        name: Of the reward.
        values: A list, tuple, array or tensor.
        count: Of the samples that it got.

    Raises:
        RewardError: See `score`.
    """
    if isinstance(values, (torch.Tensor, np.ndarray)):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise RewardError(name, f"returned a {type(values).__name__}, not a list with one number per sample")
    if len(values) != count:
        raise RewardError(name, f"returned {len(values)} value{'s' * (len(values) != 1)} for {count} samples")
    return [_checked_score(name, value, index) for index, value in enumerate(values)]


def _checked_score(name: str, value: Any, index: int) -> float:
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, Real):
        raise RewardError(name, f"returned {value!r} ({type(value).__name__}), not a number", index)
    number = float(value)
    if not math.isfinite(number):
        raise RewardError(name, f"returned {number}; a score must be finite", index)
    return number

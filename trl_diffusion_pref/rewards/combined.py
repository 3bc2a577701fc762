"""Several rewards as one: their weighted sum."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .scoring import Reward, named_rewards, reward_name, score


class CombinedReward:
    """The weighted sum of several rewards; see `combine`.

    Attributes:
        weights: By name of the reward.
    """

    def __init__(self, parts: Sequence[tuple[Reward, float]], name: str) -> None:
        self.name = self.__name__ = name
        self._rewards = named_rewards([reward for reward, _ in parts])
        self.weights = {reward_name(reward): float(weight) for reward, weight in parts}
        for part, weight in self.weights.items():
            if not math.isfinite(weight) or weight == 0:
                raise ValueError(f"the weight of reward '{part}' is {weight}; it must be finite and not zero")

    def __call__(self, prompts: Sequence[str], samples: Sequence[Any], **columns: Any) -> list[float]:
        """One number per sample.

        Raises:
            RewardError: See `score`; it names the part, not the sum.
        """
        scores = score(self._rewards, prompts, samples, **columns)
        return [
            math.fsum(self.weights[name] * values[index] for name, values in scores.items())
            for index in range(len(samples))
        ]


def combine(
    rewards: Mapping[Reward, float] | Iterable[tuple[Reward, float]], name: str = "combined"
) -> CombinedReward:
    """A reward that is the weighted sum of several.

    Rewards have different scales: PickScore differs by about 1 between two images of one prompt, HPSv2.1 by 0.01.
    Weights must make up for that.

    Args:
        rewards: Weights by reward, or pairs of a reward and its weight.
        name: Of the sum.

    Raises:
        ValueError: No rewards, two of one name, or a weight that is zero or not finite.
        TypeError: A reward that cannot be called, or has no name.
    """
    return CombinedReward(list(rewards.items() if isinstance(rewards, Mapping) else rewards), name)

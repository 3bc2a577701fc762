"""Reward-weighted regression (arXiv 2501.13918, equation 9): weights from rewards, and the weighted error."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


Weighting = Literal["exp", "softmax", "raw"]


@dataclass(frozen=True)
class RewardWeighting:
    """How a reward becomes a weight.

    Args:
        weighting: "exp", "softmax" or "raw"; see `reward_weights`.
        temperature: tau of "exp" and "softmax", positive.
        normalize_rewards: Whether rewards are standardised within their prompt's group first.
    """

    weighting: Weighting
    temperature: float = 1.0
    normalize_rewards: bool = False

    @property
    def needs_groups(self) -> bool:
        """Whether a weight depends on the other rewards of its prompt."""
        return self.weighting == "softmax" or self.normalize_rewards


def reward_weights(rewards: Tensor, groups: Tensor | None, options: RewardWeighting) -> Tensor:
    r"""The weight of each sample's error.

    - "exp", equation 9 of the paper, which prints no temperature: `exp(r / tau)`.
    - "softmax": `k exp(r / tau) / sum_j exp(r_j / tau)` over the k samples of the prompt, so that the mean over a
      prompt's samples is 1.
    - "raw", the released code: `r`.

    Args:
        rewards: `(N,)`, finite, of a floating dtype, in which weights are computed.
        groups: `(N,)` int64, equal for samples of one prompt, from 0 on; None where no weight needs them.

    Returns:
        `(N,)`. "exp" overflows to infinity above rewards of about 88 tau in float32, 709 tau in float64.
    """
    if options.normalize_rewards:
        assert groups is not None
        rewards = _standardised(rewards, groups)
    if options.weighting == "raw":
        return rewards
    scaled = rewards / options.temperature
    if options.weighting == "exp":
        return scaled.exp()
    assert groups is not None
    # The largest reward of each group is taken off, so that nothing overflows.
    shares = (scaled - _over_groups(scaled, groups, "amax")).exp()
    return shares / _over_groups(shares, groups, "mean")


def constant_groups(rewards: Tensor, groups: Tensor) -> Tensor:
    """`(N,)` bool: samples of groups in which all rewards are equal, groups of one sample included."""
    return _over_groups(rewards, groups, "amax") == _over_groups(rewards, groups, "amin")


def _standardised(rewards: Tensor, groups: Tensor) -> Tensor:
    """Rewards less their group's mean, over its standard deviation (divided by k, not k - 1); 0 in constant groups."""
    deviations = rewards - _over_groups(rewards, groups, "mean")
    spread = _over_groups(deviations.square(), groups, "mean").sqrt()
    # Not by the spread, which rounding can make positive where all are equal.
    constant = constant_groups(rewards, groups)
    return torch.where(constant, 0.0, deviations / torch.where(constant, 1.0, spread))


def _over_groups(values: Tensor, groups: Tensor, reduction: Literal["amax", "amin", "mean"]) -> Tensor:
    """`(N,)`: for each value the reduction over its group."""
    found = values.new_zeros(int(groups.max()) + 1)
    return found.scatter_reduce(0, groups, values, reduction, include_self=False)[groups]


def effective_share(weights: Tensor) -> float:
    """`(sum w)^2 / (N sum w^2)`, in (0, 1]: the share of samples that would count as much, if all weighed the same."""
    largest = weights.max()  # whose square might overflow
    scaled = weights / largest
    return float(scaled.sum().square() / (len(weights) * scaled.square().sum()))


def rwr_loss(error: Tensor, weight: Tensor) -> Tensor:
    """`w * l`, whose mean over the batch is the loss.

    Args:
        error: `(B,)` mean squared denoising errors l.
        weight: `(B,)`, at least 0.

    Returns:
        `(B,)` float32.
    """
    return weight.float() * error.float()

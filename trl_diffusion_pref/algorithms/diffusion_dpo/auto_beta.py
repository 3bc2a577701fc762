"""A beta that follows the margins, so that a run does not begin with the question how large it must be."""

import math
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback


# The betas among which one is chosen, 20 in each factor of 10.
LEAST, MOST = 1.0, 1e6
_BETAS = torch.logspace(math.log10(LEAST), math.log10(MOST), 121, dtype=torch.float64)
# About as many pairs count, the last ones. Fewer would make beta jump, and more would hold the beta of the small
# margins that pairs had some steps ago.
_PAIRS = 32
# How far beta may exceed the one that margins of these sizes would need if all were won.
_BEYOND_WON = 2.0


class AutomaticBeta(TrainerCallback):
    r"""Chooses the beta at which the mean gradient factor of the last steps' pairs is a target.

    With a pair's margin m at a beta of 1, `sigmoid(-beta m)` is the factor of its gradient in Diffusion-DPO: 1/2 at
    the start, near 0 for a pair that is won, near 1 for one that is lost. A beta that is too small leaves all factors
    at 1/2; one that is too large leaves gradients to the lost pairs alone.

    SimpleTuner sets `beta = -2 logit(target) / mean |2 m|`, with a running mean that decays by 0.99 a step: a pair of
    the mean size that is won then has the target's factor. The mean factor of all pairs is another number, since lost
    pairs have factors above 1/2, and a mean over a hundred steps lags behind margins that grow. Here the mean factor
    itself is followed, at 121 betas from 1 to a million, by a running mean over about the last 32 pairs, and at least
    those of one step; beta is where it crosses the target. Where it does not, because too many pairs are lost, as in
    a run's first steps, or crosses it too far out, beta is twice the one at which the factors would have the target's
    mean if all these pairs were won by as much.

    There is one beta for all micro-batches of a step and all processes. Margins that are 0 to the last bit, those of
    the first step, say nothing about beta and are left out; until there are others, beta is the given one.

    Args:
        start: Beta before the first margins.
        target: Mean gradient factor, in (0, 0.5).
    """

    description = "gradient factors of automatic beta"
    per_process = False

    def __init__(self, start: float, target: float) -> None:
        self.start, self.target = start, target
        self.reset()

    def reset(self) -> None:
        # Of the running mean: the curve of all pairs, and of all as if they were won, times the weight.
        self._curves = torch.zeros(2, len(_BETAS), dtype=torch.float64)
        self._weight = torch.zeros((), dtype=torch.float64)
        self._micro_batches: list[Tensor] = []
        self.beta = self.start

    def record(self, margins: Tensor) -> None:
        """Takes the margins of a training micro-batch of this process at a beta of 1, `(B,)`."""
        # First to the CPU: Apple's GPUs have no float64.
        self._micro_batches.append(margins.detach().cpu().double())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        margins = torch.cat(self._micro_batches)
        self._micro_batches.clear()
        margins = margins[margins != 0]
        sums = torch.stack([gradient_factors(margins), gradient_factors(margins.abs())])
        # As objects: numbers in float64, whatever the device.
        gathered = gather_object([(len(margins), sums.tolist())])
        count = sum(number for number, _ in gathered)
        if count:
            curves = torch.tensor([values for _, values in gathered], dtype=torch.float64).sum(dim=0) / count
            share = min(1.0, count / _PAIRS)
            self._curves += share * (curves - self._curves)
            self._weight += share * (1 - self._weight)
            self.beta = self._chosen()

    def _chosen(self) -> float:
        all_pairs, if_won = (self._curves / self._weight).unbind()
        return min(crossing(all_pairs, self.target), _BEYOND_WON * crossing(if_won, self.target), MOST)

    # ---- Checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        return {"curves": self._curves, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.reset()
        self._curves, self._weight = state["curves"].clone(), state["weight"].clone()
        if self._weight > 0:
            self.beta = self._chosen()

    def depends_on(self) -> dict[str, Any]:
        # Another target is read off the same curves.
        return {}


def gradient_factors(margins: Tensor) -> Tensor:
    """Sums of `sigmoid(-beta m)` over margins `(N,)` float64 at each of the betas, `(121,)`."""
    return torch.sigmoid(-margins[:, None] * _BETAS).sum(dim=0)


def crossing(curve: Tensor, target: float) -> float:
    """The least beta at which a curve over the betas, `(121,)`, is at most the target; infinite where it never is.

    Between two of the betas the curve is a straight line over their logarithm.
    """
    below = (curve <= target).nonzero()
    if not len(below):
        return math.inf
    index = int(below[0])
    if index == 0:
        return LEAST
    before, after = curve[index - 1].item(), curve[index].item()
    low, high = _BETAS[index - 1].item(), _BETAS[index].item()
    return low * (high / low) ** ((before - target) / (before - after))

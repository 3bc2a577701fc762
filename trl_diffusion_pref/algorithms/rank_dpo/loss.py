"""RankDPO (arXiv 2410.18013) and two losses on groups: pure functions of errors and scores, one value per ranking."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional


RankDPOLossType = Literal["rankdpo", "dgpo", "crd"]


@dataclass(frozen=True)
class RankDPOOptions:
    """The constants of the losses.

    Args:
        loss_type: Which loss, see `rank_loss`.
        beta: Strength of the tie to the reference, in the convention of Diffusion-DPO's authors' code, see
            `implicit_rewards`.
        given_fractions: Whether the scores are win fractions already, for "rankdpo" alone.

    Raises:
        ValueError: An unknown loss type, or a value outside its range.
    """

    loss_type: RankDPOLossType
    beta: float
    given_fractions: bool

    def __post_init__(self) -> None:
        if self.loss_type not in get_args(RankDPOLossType):
            raise ValueError(f"loss_type={self.loss_type!r} is none of {', '.join(get_args(RankDPOLossType))}.")
        if not 0 < self.beta < math.inf:
            raise ValueError(
                f"beta={self.beta}: it must be positive and finite; 0 would train nothing, less towards the samples "
                "with the lowest scores."
            )
        if self.given_fractions and self.loss_type != "rankdpo":
            raise ValueError(f"loss_type={self.loss_type!r} has no use for win fractions; it takes scores.")


def implicit_rewards(errors: Tensor, ref_errors: Tensor, beta: float) -> Tensor:
    """`u = -(beta/2) (l - r)` of each sample, Diffusion-DPO's implicit reward; two differ by DPO's logit.

    Args:
        errors: `(B, k)` mean squared denoising errors l of the model that is trained.
        ref_errors: `(B, k)` errors r of the reference, same noise and timesteps.
        beta: In the convention of the authors' code of Diffusion-DPO: errors are means over the latent's elements, and
            the 1/2 stands. RankDPO's paper prints no 1/2, so its beta is half of this one.

    Returns:
        `(B, k)` float32.
    """
    return -(beta / 2) * (errors.float() - ref_errors.float())


# ---- What the scores of a ranking ask for --------------------------------------------------------------------------


def win_fractions(scores: Tensor) -> Tensor:
    """RankDPO's phi: the share of a sample's comparisons with the other samples, by each reward, that it wins.

    Args:
        scores: `(R, B, k)` of R rewards, k >= 2, higher is better; equal ones count as half a win.

    Returns:
        `(B, k)` float32 in [0, 1], with mean 1/2.
    """
    scores = scores.float()
    difference = scores[..., :, None] - scores[..., None, :]
    # Halves, whose sum is exact, so that samples that win equally often have equal fractions. Of a sample against
    # itself there is one half too much.
    wins = ((difference > 0).float() + 0.5 * (difference == 0).float()).sum(dim=-1) - 0.5
    return wins.sum(dim=0) / (len(scores) * (scores.shape[-1] - 1))


def advantages(scores: Tensor) -> Tensor:
    """Scores less their mean in the ranking, over their standard deviation there; the mean over rewards.

    Args:
        scores: `(R, B, k)`; where all k are equal, all have 0.

    Returns:
        `(B, k)` float32, with mean 0. With two samples, the better one has 1 and the other -1.
    """
    centred = _centred(scores)
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt()
    return (centred / torch.where(deviation > 0, deviation, 1.0)).mean(dim=0)


def _centred(scores: Tensor) -> Tensor:
    """Less their mean over the last axis; exactly 0 where all are equal, which rounding might not leave."""
    scores = scores.float()
    differ = scores.amax(dim=-1, keepdim=True) > scores.amin(dim=-1, keepdim=True)
    return torch.where(differ, scores - scores.mean(dim=-1, keepdim=True), 0.0)


def wanted_values(scores: Tensor, options: RankDPOOptions) -> Tensor:
    """What a loss takes of the scores: win fractions, advantages, or centred scores.

    Args:
        scores: `(R, B, k)` of R rewards.

    Returns:
        `(B, k)` float32, by which the samples are in the order that the loss teaches.
    """
    if options.loss_type == "dgpo":
        return advantages(scores)
    if options.loss_type == "crd":
        return _centred(scores).mean(dim=0)
    return scores.float().mean(dim=0) if options.given_fractions else win_fractions(scores)


# ---- The losses ----------------------------------------------------------------------------------------------------


def pair_weights(fractions: Tensor) -> Tensor:
    """RankDPO's weights `|G_i - G_j| |1/D(tau_i) - 1/D(tau_j)|`, with `G = 2^phi - 1` and `D(tau) = log(1 + tau)`.

    tau is the sample's rank by phi, 1 is the best (Algorithm 2). Equally good samples share the mean of their ranks,
    which the paper leaves open: the weights then do not depend on the order in which they are stored.

    Args:
        fractions: phi, `(B, k)` in [0, 1].

    Returns:
        `(B, k, k)` float32, entry (i, j) where i is preferred to j, and 0 elsewhere.
    """
    gains = torch.exp2(fractions.float()) - 1
    difference = fractions[:, :, None] - fractions[:, None, :]
    better, equal = (difference < 0).float().sum(dim=-1), (difference == 0).float().sum(dim=-1)
    # A sample is one of those that are equal to it.
    ranks = 1 + better + (equal - 1) / 2
    inverse_discounts = 1 / torch.log1p(ranks)
    of_gains = (gains[:, :, None] - gains[:, None, :]).abs()
    of_ranks = (inverse_discounts[:, :, None] - inverse_discounts[:, None, :]).abs()
    return torch.where(difference > 0, of_gains * of_ranks, 0.0)


def rank_loss(rewards: Tensor, wanted: Tensor, options: RankDPOOptions) -> Tensor:
    r"""The loss of each ranking.

    With the implicit reward u of `implicit_rewards`:

    - `"rankdpo"` (arXiv 2410.18013, Algorithm 2): `-sum over pairs, i preferred to j, of Delta_ij log sigmoid(u_i -
      u_j)`, Delta from `pair_weights`. With two samples it is Diffusion-DPO's loss times Delta.
    - `"dgpo"` (arXiv 2510.08425): `-log sigmoid((2/k) sum_i A_i u_i)`, A from `advantages`: the better samples as a
      group against the others. With two samples it is Diffusion-DPO's loss.
    - `"crd"` (arXiv 2603.14128): `mean_i ((u_i - mean of u) - (s_i - mean of s))^2`, s the scores.

    Args:
        rewards: u, `(B, k)`.
        wanted: `(B, k)` from `wanted_values`.

    Returns:
        `(B,)` float32; 0 without a gradient where the samples are all equally good.
    """
    if options.loss_type == "rankdpo":
        logits = rewards[:, :, None] - rewards[:, None, :]
        return -(pair_weights(wanted) * functional.logsigmoid(logits)).sum(dim=(1, 2))
    if options.loss_type == "dgpo":
        loss = -functional.logsigmoid(2 * (wanted * rewards).mean(dim=1))
    else:
        loss = (rewards - rewards.mean(dim=1, keepdim=True) - wanted).square().mean(dim=1)
    ordered = wanted.amax(dim=1) > wanted.amin(dim=1)
    return torch.where(ordered, loss, 0.0)


def ranking_accuracy(rewards: Tensor, wanted: Tensor) -> Tensor:
    """Share of the pairs of unequally good samples whose better one has the larger implicit reward.

    Args:
        rewards, wanted: `(B, k)`.

    Returns:
        `(B,)` float32 in [0, 1]; NaN where all samples are equally good.
    """
    better = wanted[:, :, None] > wanted[:, None, :]
    right = better & (rewards[:, :, None] > rewards[:, None, :])
    return right.sum(dim=(1, 2)) / better.sum(dim=(1, 2))


def best_and_worst(values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of `values` over the best samples of each ranking, and over its worst ones.

    Args:
        values, wanted: `(B, k)`.

    Returns:
        `(B,)` each.
    """
    ends = (wanted == wanted.amax(dim=1, keepdim=True), wanted == wanted.amin(dim=1, keepdim=True))
    best, worst = ((values * end).sum(dim=1) / end.sum(dim=1) for end in ends)
    return best, worst

"""Diffusion-KTO's loss (arXiv 2404.04465): pure functions of denoising errors, one float32 value per sample."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional


KTOUtility = Literal["sigmoid", "loss_averse", "risk_seeking"]


@dataclass(frozen=True)
class DiffusionKTOOptions:
    """The constants of the loss.

    Args:
        utility: Which utility, see `diffusion_kto_loss`.
        beta: Strength of the tie to the reference, positive, in the authors' convention, which has no factor 1/2.
        desirable_weight, undesirable_weight: Of the losses of samples that were liked and of those that were not, from
            0 on and not both 0.

    Raises:
        ValueError: An unknown utility, or a value outside its range.
    """

    utility: KTOUtility
    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.utility not in get_args(KTOUtility):
            raise ValueError(f"utility={self.utility!r} is none of {', '.join(get_args(KTOUtility))}.")
        if not 0 < self.beta < math.inf:
            raise ValueError(
                f"beta={self.beta}: it must be positive and finite; 0 would train nothing, less towards the samples "
                "that were not liked."
            )
        for name in ("desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: it must be finite and at least 0.")
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ValueError("desirable_weight and undesirable_weight are both 0, so that nothing would be trained.")


def likelihood_gain(error: Tensor, ref_error: Tensor) -> Tensor:
    """`g = r - l`, `(B,)` float32: how much smaller the trained model's error is than the reference's.

    Args:
        error: `(B,)` mean squared denoising errors l of the model that is trained.
        ref_error: `(B,)` errors r of the reference, same noise and timesteps.
    """
    return ref_error.float() - error.float()


def diffusion_kto_loss(gain: Tensor, liked: Tensor, baseline: Tensor | float, options: DiffusionKTOOptions) -> Tensor:
    """What a sample falls short of the utility 1 by, weighted by its label (arXiv 2404.04465 and its released code).

    With `z = ±beta (g - baseline)`, + for samples that were liked and - for others, the loss is `w (1 - U(z))`:

    - "sigmoid": `U(z) = sigmoid(z)`, the paper's choice. Samples far on either side have little gradient.
    - "loss_averse": `U(z) = log sigmoid(z)`, concave: samples on the wrong side keep their full gradient.
    - "risk_seeking": `U(z) = -log sigmoid(-z)`, convex: samples on the right side keep theirs, so that nothing holds
      the loss back, which falls below any number.

    Args:
        gain: `(B,)`, see `likelihood_gain`.
        liked: `(B,)`, 1 for samples that were liked and 0 for others.
        baseline: The gain from which a sample counts as better than expected (the paper's Q_ref over beta), from 0 on.
            It gets no gradient.

    Returns:
        `(B,)` float32. At the reference, without baseline, "sigmoid" is 0.5 times the weight.
    """
    is_liked = liked > 0.5
    difference = gain.float() - (baseline.detach() if isinstance(baseline, Tensor) else baseline)
    z = options.beta * torch.where(is_liked, difference, -difference)
    if options.utility == "sigmoid":
        utility = torch.sigmoid(z)
    elif options.utility == "loss_averse":
        utility = functional.logsigmoid(z)
    else:
        utility = -functional.logsigmoid(-z)
    weight = torch.where(is_liked, options.desirable_weight, options.undesirable_weight)
    return weight * (1 - utility)

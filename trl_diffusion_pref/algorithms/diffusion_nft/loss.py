"""DiffusionNFT's loss (arXiv 2509.16117): towards liked samples, and away from disliked ones, with a bound."""

from dataclasses import dataclass

import torch
from torch import Tensor


# The released code's least weight of a side, below which errors are no longer divided by themselves.
_LEAST_WEIGHT = 1e-5


@dataclass(frozen=True)
class DiffusionNFTOptions:
    """The constants of the loss.

    Args:
        nft_beta: b, positive: how far the two sides lie from the old policy. The released code has 1 with a single
            reward and 0.1 with several.
        advantage_clip: Largest advantage, positive, 5 in the released code; also the factor of the loss.
        self_normalized: Whether each side's squared error is divided by the sample's mean absolute error, without
            gradient, as the released code does. Without it the loss is the paper's equation.

    Raises:
        ValueError: A value outside its range.
    """

    nft_beta: float = 1.0
    advantage_clip: float = 5.0
    self_normalized: bool = True

    def __post_init__(self) -> None:
        for name in ("nft_beta", "advantage_clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")


def diffusion_nft_loss(
    clean: Tensor,
    old_clean: Tensor,
    x0: Tensor,
    liked: Tensor,
    options: DiffusionNFTOptions,
    region: Tensor | None = None,
) -> Tensor:
    """`c/b (p mse(x0+, x0) / w+ + (1 - p) mse(x0-, x0) / w-)` of each sample.

    `x0+ = b clean + (1 - b) old_clean` and `x0- = (1 + b) old_clean - b clean`: clean latents are affine in the
    prediction, so mixing them is mixing the predictions, `v+ = b v + (1 - b) v_old` and `v- = (1 + b) v_old - b v`, of
    flows as of models that predict noise or v. w is each side's mean absolute error, at least 1e-5, without gradient.

    The term of disliked samples is least at `clean = old_clean + (old_clean - x0) / b`, a finite place, where DPO's
    has no minimum.

    Args:
        clean: `(B, ...)`, the trained model's estimates of the clean latents.
        old_clean: Likewise of the old policy: the one that generated the samples, or the reference.
        x0: `(B, ...)`, the samples' latents.
        liked: `(B,)`, p in [0, 1], how likely each sample is a liked one.
        options: The constants.
        region: Broadcasts to the latents; 1 where elements count, 0 elsewhere. Default: all count.

    Returns:
        `(B,)` float32, or float64 where the estimates are.

    Raises:
        ValueError: Shapes that differ.
    """
    if not clean.shape == old_clean.shape == x0.shape or liked.shape != clean.shape[:1]:
        raise ValueError(
            f"clean has shape {tuple(clean.shape)}, old_clean {tuple(old_clean.shape)}, x0 {tuple(x0.shape)} and "
            f"liked {tuple(liked.shape)}; the first three must be alike, with one number in liked for each sample."
        )
    b = options.nft_beta
    clean, old_clean, x0 = _wide(clean), _wide(old_clean.detach()), _wide(x0.detach())
    towards = _side(b * clean + (1 - b) * old_clean - x0, options, region)
    away = _side((1 + b) * old_clean - b * clean - x0, options, region)
    p = liked.to(towards)
    return options.advantage_clip / b * (p * towards + (1 - p) * away)


def liked_probability(advantages: Tensor, advantage_clip: float) -> Tensor:
    """`p = clip(A / (2 c) + 1/2, 0, 1)`: from advantages, normalised rewards of any shape, to [0, 1].

    The released code's c is 5, with which an advantage of one standard deviation is p = 0.6.
    """
    return (advantages / (2 * advantage_clip) + 0.5).clamp(0.0, 1.0)


def _side(difference: Tensor, options: DiffusionNFTOptions, region: Tensor | None) -> Tensor:
    """A side's squared error, divided by its mean absolute error where that is asked for, `(B,)`."""
    squared = _mean(difference.square(), region)
    if not options.self_normalized:
        return squared
    return squared / _mean(difference.detach().abs(), region).clamp_min(_LEAST_WEIGHT)


def _mean(values: Tensor, region: Tensor | None) -> Tensor:
    if region is None:
        return values.flatten(1).mean(dim=1)
    counted = region.to(values).expand_as(values).flatten(1)
    return (values.flatten(1) * counted).sum(dim=1) / counted.sum(dim=1)


def _wide(values: Tensor) -> Tensor:
    """In float32, or in float64 as they are."""
    return values if values.dtype == torch.float64 else values.float()

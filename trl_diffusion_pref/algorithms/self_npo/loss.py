"""Self-NPO's loss (arXiv 2505.11777) on clean latents."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor


SelfNPOLossType = Literal["huber", "l2"]


@dataclass(frozen=True)
class SelfNPOOptions:
    """The constants of the loss.

    Args:
        loss_type: "huber", the released code's pseudo-Huber loss `sqrt(d^2 + c^2) - c`, or "l2", the paper's squared
            error.
        huber_c: c, 1e-3 in the released code; "l2" has none.

    Raises:
        ValueError: An unknown loss type, or c that is not positive.
    """

    loss_type: SelfNPOLossType
    huber_c: float

    def __post_init__(self) -> None:
        if self.loss_type not in get_args(SelfNPOLossType):
            raise ValueError(f"loss_type={self.loss_type!r} is none of {', '.join(get_args(SelfNPOLossType))}.")
        if not 0 < self.huber_c < float("inf"):
            raise ValueError(f"huber_c={self.huber_c} must be positive.")


def self_npo_loss(
    predicted_x0: Tensor, target_x0: Tensor, options: SelfNPOOptions, region: Tensor | None = None
) -> Tensor:
    """Distance of the student's clean latents from the teacher's, the mean over a sample's elements.

    Args:
        predicted_x0, target_x0: `(B, ...)`, any floating dtype; the target carries no gradient.
        region: Broadcasts to them; 1 where elements count, 0 elsewhere. Default: all count.

    Returns:
        `(B,)` float32.

    Raises:
        ValueError: The shapes differ.
    """
    if predicted_x0.shape != target_x0.shape:
        raise ValueError(f"predicted_x0 has shape {tuple(predicted_x0.shape)}, target_x0 {tuple(target_x0.shape)}.")
    distance = (predicted_x0.float() - target_x0.detach().float()).square()
    if options.loss_type == "huber":
        distance = (distance + options.huber_c**2).sqrt() - options.huber_c
    if region is None:
        return distance.flatten(1).mean(dim=1)
    counted = region.float().expand_as(distance).flatten(1)
    return (distance.flatten(1) * counted).sum(dim=1) / counted.sum(dim=1)

"""MaPO's loss (arXiv 2406.06424): pure functions of denoising errors, one float32 value per pair."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional


MaPOLossType = Literal["mapo", "mapo_v2"]

# x / (e^x - 1) = 1 - x/2 + sum of B_2k x^2k / (2k)!; these are B_2k / (2k)! for k = 1..4
_BERNOULLI = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600)
_SERIES_UP_TO = 1.0


def likelihood_deficit(error: Tensor) -> Tensor:
    """`1 - phi(x)` with MaPO's `phi(x) = x / (e^x - 1)`, to full relative precision from 0 on.

    Near zero phi is 1 minus a little, and float32 keeps few digits of the little. MaPO compares two such values, so
    the little is what is computed: by its Bernoulli series up to x = 1 (truncation below 1e-7), directly above.

    Args:
        error: x >= 0, any shape.

    Returns:
        Same shape, float32, in [0, 1), increasing, with derivative 1/2 at 0.
    """
    near, series, large = _split(error)
    # x e^-x / (1 - e^-x) is the same fraction without an overflowing e^x
    direct = 1 - large * torch.exp(-large) / -torch.expm1(-large)
    return torch.where(near, series, direct)


def log_phi(error: Tensor) -> Tensor:
    """`log(x / (e^x - 1))`, finite for every float32 x >= 0, to full relative precision near 0."""
    near, series, large = _split(error)
    return torch.where(near, torch.log1p(-series), torch.log(large) - large - torch.log1p(-torch.exp(-large)))


def _split(error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the series holds, its value there, and arguments for the direct formula elsewhere."""
    x = error.float()
    near = x <= _SERIES_UP_TO
    # Both branches are evaluated, so each gets an argument at which its derivative is finite.
    small = torch.where(near, x, torch.zeros_like(x))
    square = small * small
    tail = torch.zeros_like(x)
    for coefficient in reversed(_BERNOULLI):
        tail = (tail + coefficient) * square
    return near, small / 2 - tail, torch.where(near, torch.full_like(x, 2 * _SERIES_UP_TO), x)


@dataclass(frozen=True)
class MaPOOptions:
    """The constants of the loss.

    Args:
        loss_type: "mapo", what the released code computes, or "mapo_v2", the paper's second version.
        beta: Weight of the margin term ("mapo", from 0 on) or exponent ("mapo_v2", above 0).
        snr_value: s of "mapo"; "mapo_v2" has none.
        num_train_timesteps: T of "mapo".

    Raises:
        ValueError: An unknown loss type, or a value outside its range.
    """

    loss_type: MaPOLossType
    beta: float
    snr_value: float
    num_train_timesteps: int

    def __post_init__(self) -> None:
        if self.loss_type not in get_args(MaPOLossType):
            raise ValueError(f"loss_type={self.loss_type!r} is none of {', '.join(get_args(MaPOLossType))}.")
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(
                f"beta={self.beta}: it must be a number from 0 on; a negative one would train towards the rejected "
                "samples."
            )
        if self.loss_type == "mapo_v2" and self.beta == 0:
            raise ValueError(
                "loss_type='mapo_v2' divides by beta, so beta=0 is impossible there; use loss_type='mapo' with beta=0 "
                "for supervised fine-tuning on the chosen samples."
            )
        if not (math.isfinite(self.snr_value) and self.snr_value > 0):
            raise ValueError(f"snr_value={self.snr_value}: it must be a positive number.")


def mapo_reward(error: Tensor, options: MaPOOptions) -> Tensor:
    """MaPO's score of a sample; two samples' scores differ by the argument of the log-sigmoid in `mapo_loss`.

    Args:
        error: `(B,)` mean squared denoising errors l.

    Returns:
        `(B,)` float32, falling as the error grows. "mapo": `T (phi(s l) - 1)`, from 0 down to -T (the -1 cancels in
        the difference and keeps the digits). "mapo_v2": `phi(l)^beta`, from 1 down to 0.
    """
    if options.loss_type == "mapo_v2":
        return torch.exp(options.beta * log_phi(error))
    return -options.num_train_timesteps * likelihood_deficit(options.snr_value * error.float())


def mapo_loss(
    chosen_error: Tensor, rejected_error: Tensor, options: MaPOOptions
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""Margin-aware preference optimisation, without a reference model.

    With `phi(x) = x / (e^x - 1)`, chosen error l_w and rejected error l_l:

    - "mapo", the released code: `l_w - beta log sigmoid(T (phi(s l_w) - phi(s l_l)))`. With `beta=0` this is
      supervised fine-tuning on the chosen samples.
    - "mapo_v2", equations 9 to 11 of the paper's second version:
      `l_w - (1 / beta) log sigmoid(phi(l_w)^beta - phi(l_l)^beta)`. Here beta is an exponent, searched by the authors
      in {8, 32, 64, 128, 1024}.

    Args:
        chosen_error, rejected_error: `(B,)`, mean squared denoising errors, from 0 on.

    Returns:
        `(B,)` float32, one loss per pair, and the rewards `mapo_reward` of chosen and rejected, `(B,)` each.
    """
    chosen, rejected = mapo_reward(chosen_error, options), mapo_reward(rejected_error, options)
    weight = 1 / options.beta if options.loss_type == "mapo_v2" else options.beta
    return chosen_error.float() - weight * functional.logsigmoid(chosen - rejected), (chosen, rejected)

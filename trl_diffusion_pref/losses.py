"""Losses on denoising errors: pure functions, one float32 value per pair, torch only.

The caller takes the mean over pairs. What produced the errors (which model, which noise process) is not known here.
"""

import torch
from torch import Tensor
from torch.nn import functional


MAPO_LOSS_TYPES = ("mapo", "mapo_v2")

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


def mapo_reward(
    error: Tensor,
    *,
    beta: float = 0.1,
    snr_value: float = 0.5,
    num_train_timesteps: int = 1000,
    loss_type: str = "mapo",
) -> Tensor:
    """MaPO's score of an image; two images' scores differ by the argument of the log-sigmoid in `mapo_loss`.

    Args:
        error: `(B,)` mean squared denoising errors l; the other arguments are those of `mapo_loss`.

    Returns:
        `(B,)` float32, falling as the error grows. `"mapo"`: `T (phi(s l) - 1)`, from 0 down to -T (the -1 cancels in
        the difference and keeps the digits). `"mapo_v2"`: `phi(l)^beta`, from 1 down to 0.
    """
    if loss_type == "mapo_v2":
        return torch.exp(beta * log_phi(error))
    return -num_train_timesteps * likelihood_deficit(snr_value * error.float())


def mapo_loss(
    chosen_error: Tensor,
    rejected_error: Tensor,
    *,
    beta: float = 0.1,
    snr_value: float = 0.5,
    num_train_timesteps: int = 1000,
    loss_type: str = "mapo",
) -> Tensor:
    r"""Margin-aware preference optimisation (arXiv 2406.06424), without a reference model.

    With `phi(x) = x / (e^x - 1)`, chosen error l_w and rejected error l_l:

    - `"mapo"`, the released code: `l_w - beta log sigmoid(T (phi(s l_w) - phi(s l_l)))`. With `beta=0` this is
      supervised fine-tuning on the chosen images.
    - `"mapo_v2"`, equations 9 to 11 of the paper's second version:
      `l_w - (1 / beta) log sigmoid(phi(l_w)^beta - phi(l_l)^beta)`. Here beta is an exponent, searched by the authors
      in {8, 32, 64, 128, 1024}; `snr_value` and `num_train_timesteps` play no part.

    Args:
        chosen_error: `(B,)`, mean squared denoising error of each chosen image, >= 0.
        rejected_error: `(B,)`, the same for the rejected images.
        beta: Weight of the margin term (`"mapo"`, >= 0) or exponent (`"mapo_v2"`, > 0).
        snr_value: s of `"mapo"`.
        num_train_timesteps: T of `"mapo"`.
        loss_type: `"mapo"` or `"mapo_v2"`.

    Returns:
        `(B,)` float32, one loss per pair.

    Raises:
        ValueError: Unknown loss type, or beta outside its range.
    """
    check_mapo_options(loss_type, beta)
    chosen, rejected = (
        mapo_reward(
            error, beta=beta, snr_value=snr_value, num_train_timesteps=num_train_timesteps, loss_type=loss_type
        )
        for error in (chosen_error, rejected_error)
    )
    weight = 1 / beta if loss_type == "mapo_v2" else beta
    return chosen_error.float() - weight * functional.logsigmoid(chosen - rejected)


def check_mapo_options(loss_type: str, beta: float) -> None:
    """Raises the ValueError that `mapo_loss` documents, so that a config can refuse them before training."""
    if loss_type not in MAPO_LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is none of {', '.join(MAPO_LOSS_TYPES)}.")
    if beta < 0:
        raise ValueError(f"beta={beta} is negative, which would train towards the rejected images; use beta >= 0.")
    if loss_type == "mapo_v2" and beta == 0:
        raise ValueError(
            "loss_type='mapo_v2' divides by beta, so beta=0 is impossible there; use loss_type='mapo' with beta=0 for "
            "supervised fine-tuning on the chosen images."
        )

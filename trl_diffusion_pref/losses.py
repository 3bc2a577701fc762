"""Losses on denoising errors: pure functions, one float32 value per pair, torch only.

The caller takes the mean over pairs. What produced the errors (which model, which noise process) is not known here.
"""

import math

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


DIFFUSION_DPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo", "dmpo", "irepo", "dspo", "dspo_sdxl")
# The released DSPO code for SDXL switches its objective where predictions are this far from the reference's.
_DSPO_SDXL_SWITCH = 0.1


def diffusion_dpo_logits(
    chosen_error: Tensor,
    rejected_error: Tensor,
    ref_chosen_error: Tensor,
    ref_rejected_error: Tensor,
    *,
    beta: float | Tensor = 5000.0,
    margin_clip: float | None = None,
) -> Tensor:
    """Implicit reward margin of each pair, `-(beta/2) ((l_w - l_l) - (r_w - r_l))` (arXiv 2311.12908, equation 46).

    Args:
        chosen_error, rejected_error: `(B,)` mean squared denoising errors l of the model that is trained.
        ref_chosen_error, ref_rejected_error: `(B,)` errors r of the reference, same noise and timesteps.
        beta: In the convention of the authors' code: errors are means over the latent's elements, and the 1/2 stands.
            One for all pairs, or `(B,)` floating, >= 0, one for each, as from `flow_dpo_beta`.
        margin_clip: Margins above this have no gradient, so that a pair which is won is not pulled further apart; the
            cheapest way to do that is to wreck the rejected image's likelihood. None leaves them.

    Returns:
        `(B,)` float32.

    Raises:
        ValueError: A tensor of betas with another shape than the errors (broadcasting would hide a mistake).
    """
    errors = (chosen_error, rejected_error, ref_chosen_error, ref_rejected_error)
    if isinstance(beta, Tensor):
        if beta.shape != chosen_error.shape:
            raise ValueError(f"beta has shape {tuple(beta.shape)}, the errors {tuple(chosen_error.shape)}.")
        beta = beta.float()
    chosen, rejected, ref_chosen, ref_rejected = (error.float() for error in errors)
    # Each image against its reference first: these differences are small, and exactly 0 at the start.
    logits = -(beta / 2) * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return logits if margin_clip is None else logits.clamp(max=margin_clip)


def flow_dpo_beta(t: Tensor, beta: float) -> Tensor:
    """Flow-DPO's `beta_t = beta (1 - t)^2` (arXiv 2501.13918, with equation 6).

    It is what the derivation from the KL divergence gives for velocity errors. The paper then trains with a constant
    beta, since this schedule, under which times near the noise hardly count, was hacked by its rewards.

    Args:
        t: `(B,)` times of a rectified flow in [0, 1], 1 is noise.
        beta: beta_t at t = 0.

    Returns:
        `(B,)` float32 in [0, beta].
    """
    return beta * (1 - t.float()).square()


def diffusion_dpo_loss(
    chosen_error: Tensor,
    rejected_error: Tensor,
    ref_chosen_error: Tensor,
    ref_rejected_error: Tensor,
    *,
    beta: float | Tensor = 5000.0,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    dmpo_alpha: float = 0.01,
    soft_labels: Tensor | float | None = None,
    margin_clip: float | None = None,
) -> Tensor:
    r"""Diffusion-DPO (arXiv 2311.12908) and its relatives that need errors alone.

    With the margin u of `diffusion_dpo_logits`:

    - `"sigmoid"`: `-log sigmoid(u)`; with `label_smoothing` epsilon the unbiased loss for labels that are flipped with
      this probability, robust DPO: `(-(1 - eps) log sigmoid(u) + eps log sigmoid(-u)) / (1 - 2 eps)`
      (arXiv 2403.00409).
    - `"hinge"`: `max(0, 1 - u)`.
    - `"ipo"`: `(u - 1/2)^2`, beta^2 times the published `(u/beta - 1/(2 beta))^2` (arXiv 2310.12036): the same
      minimiser with gradients of DPO's size, where the published scale would lie below Adam's epsilon at beta 5000.
      Where pairs have betas of their own, so do these factors: a pair whose beta is near 0 counts for little.
    - `"dmpo"`: `KL(Bernoulli(sigmoid(u)) || Bernoulli(1 - alpha))`.
    - `"irepo"`: `(u - logit P)^2` with P the probability that chosen is better (arXiv 2405.15230, for diffusion).

    Args:
        chosen_error, rejected_error, ref_chosen_error, ref_rejected_error, beta, margin_clip: See
            `diffusion_dpo_logits`.
        loss_type: One of the above.
        label_smoothing: epsilon of `"sigmoid"`, in [0, 0.5).
        dmpo_alpha: alpha of `"dmpo"`, in (0, 1).
        soft_labels: P of `"irepo"`, `(B,)` or one for all, in (0, 1).

    Returns:
        `(B,)` float32, one loss per pair.

    Raises:
        ValueError: Unknown loss type, or an option outside its range.
    """
    check_diffusion_dpo_options(loss_type, beta, label_smoothing, dmpo_alpha, margin_clip)
    errors = (chosen_error, rejected_error, ref_chosen_error, ref_rejected_error)
    logits = diffusion_dpo_logits(*errors, beta=beta, margin_clip=margin_clip)
    if loss_type == "sigmoid":
        kept, flipped = -functional.logsigmoid(logits), -functional.logsigmoid(-logits)
        return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    if loss_type == "hinge":
        return functional.relu(1 - logits)
    if loss_type == "ipo":
        return (logits - 0.5).square()
    if loss_type == "dmpo":
        # The smaller of p and 1 - p is computed and the other derived: the derivative of a sigmoid near 1 is rounded
        # to 0.
        smaller = torch.sigmoid(torch.where(logits < 0, logits, -logits))
        p = torch.where(logits < 0, smaller, 1 - smaller)
        not_p = torch.where(logits < 0, 1 - smaller, smaller)
        preferred = p * (functional.logsigmoid(logits) - math.log(1 - dmpo_alpha))
        return preferred + not_p * (functional.logsigmoid(-logits) - math.log(dmpo_alpha))
    if loss_type == "irepo":
        if soft_labels is None:
            raise ValueError("loss_type='irepo' needs soft_labels, the probability that chosen is better.")
        labels = torch.as_tensor(soft_labels, dtype=torch.float32, device=logits.device)
        if not bool(((labels > 0) & (labels < 1)).all()):
            raise ValueError(
                "soft_labels outside (0, 1): their logit would be infinite. Clip them, say to 0.02..0.98."
            )
        return (logits - torch.logit(labels)).square()
    raise ValueError(f"loss_type={loss_type!r} needs predictions, not errors alone: call dspo_loss.")


def dspo_loss(
    chosen_prediction: Tensor,
    chosen_target: Tensor,
    ref_chosen_prediction: Tensor,
    logits: Tensor,
    *,
    beta: float = 0.001,
    loss_type: str = "dspo",
) -> Tensor:
    """DSPO, as its released code computes it, from the chosen images' predictions.

    With `g = sigmoid(u)`, not detached, target y, prediction p and the reference's prediction r:

    - `"dspo"` (Stable Diffusion 1.5): `mean(((p - y) - beta (1 - g) (p - r))^2)` over each image's elements.
    - `"dspo_sdxl"`: `(1 - g)^2 mean((p - r)^2)` where the batch's mean of `(p - r)^2` is 0.1 or more, `(1 - g)^2`
      below.

    Args:
        chosen_prediction, chosen_target, ref_chosen_prediction: `(B, ...)`.
        logits: `(B,)`, u of `diffusion_dpo_logits` at the same beta.
        beta: Published: 0.001 (searched 0.001, 0.01, 0.05) for `"dspo"`, 5000 for `"dspo_sdxl"`.

    Returns:
        `(B,)` float32.
    """
    prediction, target, reference = (
        tensor.float().flatten(1) for tensor in (chosen_prediction, chosen_target, ref_chosen_prediction)
    )
    shortfall = torch.sigmoid(-logits)
    difference = prediction - reference
    if loss_type == "dspo":
        return ((prediction - target) - beta * shortfall[:, None] * difference).square().mean(dim=1)
    if loss_type == "dspo_sdxl":
        distance = difference.square()
        if bool(distance.mean() >= _DSPO_SDXL_SWITCH):
            return shortfall.square() * distance.mean(dim=1)
        return shortfall.square()
    raise ValueError(f"loss_type={loss_type!r} is neither 'dspo' nor 'dspo_sdxl'.")


def preserve_winner(
    rejected_error: Tensor, chosen_residual: Tensor, rejected_residual: Tensor, *, mu: float
) -> Tensor:
    """SDPO's safeguard (arXiv 2511.03317): scales down the rejected errors' gradient where it would hurt the chosen.

    The gradient's factor, over the micro-batch, is `clamp((1 - mu) |e_w|^2 / <e_l, e_w>, 0, 1)` where the residuals'
    inner product is positive and 1 elsewhere. Values do not change.

    Args:
        rejected_error: `(B,)`.
        chosen_residual, rejected_residual: `(B, ...)`, prediction minus target.
        mu: In [0, 1]; 0.9 published for Stable Diffusion 1.5 with DPO and DMPO, 0.2 with DSPO, 0.6 for SDXL.

    Returns:
        `(B,)`, equal to `rejected_error`.
    """
    chosen, rejected = chosen_residual.detach().float(), rejected_residual.detach().float()
    product = (chosen * rejected).sum()
    factor = ((1 - mu) * chosen.square().sum() / product).clamp(0, 1)
    factor = torch.where(product > 0, factor, torch.ones_like(factor))
    return factor * rejected_error + (1 - factor) * rejected_error.detach()


def check_diffusion_dpo_options(
    loss_type: str, beta: float | Tensor, label_smoothing: float, dmpo_alpha: float, margin_clip: float | None
) -> None:
    """Raises the ValueError that `diffusion_dpo_loss` documents, so that a config can refuse them before training."""
    if loss_type not in DIFFUSION_DPO_LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is none of {', '.join(DIFFUSION_DPO_LOSS_TYPES)}.")
    # A tensor's values are not looked at: that would wait for the device at every step.
    if not isinstance(beta, Tensor) and not beta > 0:
        raise ValueError(f"beta={beta}: it must be positive; 0 would train nothing, less towards the rejected images.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} is outside [0, 0.5).")
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing belongs to loss_type='sigmoid'; it does nothing for {loss_type!r}.")
    if not 0 < dmpo_alpha < 1:
        raise ValueError(f"dmpo_alpha={dmpo_alpha} is outside (0, 1).")
    if margin_clip is not None and not margin_clip > 0:
        raise ValueError(f"margin_clip={margin_clip}: it must be positive, or None.")


SELF_NPO_LOSS_TYPES = ("huber", "l2")


def self_npo_loss(
    predicted_x0: Tensor, target_x0: Tensor, *, loss_type: str = "huber", huber_c: float = 1e-3
) -> Tensor:
    """Self-NPO (arXiv 2505.11777): distance of the student's clean latents from the teacher's.

    Args:
        predicted_x0, target_x0: `(B, ...)`, any floating dtype; the target carries no gradient.
        loss_type: "huber", the released code's pseudo-Huber loss `sqrt(d^2 + c^2) - c`, or "l2", the paper's squared
            error. Both are means over a sample's elements.
        huber_c: c, 1e-3 in the released code.

    Returns:
        `(B,)` float32.

    Raises:
        ValueError: Unknown loss type, non-positive c, or shapes that differ.
    """
    check_self_npo_options(loss_type, huber_c)
    if predicted_x0.shape != target_x0.shape:
        raise ValueError(f"predicted_x0 has shape {tuple(predicted_x0.shape)}, target_x0 {tuple(target_x0.shape)}.")
    squared = (predicted_x0.float() - target_x0.detach().float()).square()
    if loss_type == "huber":
        squared = (squared + huber_c**2).sqrt() - huber_c
    return squared.flatten(1).mean(dim=1)


def check_self_npo_options(loss_type: str, huber_c: float) -> None:
    """Raises a ValueError where `self_npo_loss` could not be computed."""
    if loss_type not in SELF_NPO_LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is none of {', '.join(SELF_NPO_LOSS_TYPES)}.")
    if huber_c <= 0:
        raise ValueError(f"huber_c={huber_c}: it must be positive.")

"""Diffusion-DPO (arXiv 2311.12908) and its relatives: pure functions of denoising errors and predictions."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional


DiffusionDPOLossType = Literal["sigmoid", "hinge", "ipo", "dmpo", "irepo", "dspo", "dspo_sdxl"]
# The released DSPO code for SDXL switches its objective where predictions are this far from the reference's.
_DSPO_SDXL_SWITCH = 0.1


@dataclass(frozen=True)
class DiffusionDPOOptions:
    """The constants of the losses.

    Args:
        loss_type: Which loss, see `diffusion_dpo_loss` and `dspo_loss`.
        beta: Strength of the tie to the reference, in the convention of the authors' code, see `diffusion_dpo_logits`.
        label_smoothing: epsilon of "sigmoid", in [0, 0.5).
        dmpo_alpha: alpha of "dmpo", in (0, 1).
        margin_clip: Margins above it have no gradient; None leaves them.

    Raises:
        ValueError: An unknown loss type, or a value outside its range.
    """

    loss_type: DiffusionDPOLossType
    beta: float
    label_smoothing: float
    dmpo_alpha: float
    margin_clip: float | None

    def __post_init__(self) -> None:
        if self.loss_type not in get_args(DiffusionDPOLossType):
            raise ValueError(f"loss_type={self.loss_type!r} is none of {', '.join(get_args(DiffusionDPOLossType))}.")
        if not 0 < self.beta < math.inf:
            raise ValueError(
                f"beta={self.beta}: it must be positive and finite; 0 would train nothing, less towards the rejected "
                "samples."
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} is outside [0, 0.5).")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"label_smoothing belongs to loss_type='sigmoid'; it does nothing for {self.loss_type!r}."
            )
        if not 0 < self.dmpo_alpha < 1:
            raise ValueError(f"dmpo_alpha={self.dmpo_alpha} is outside (0, 1).")
        if self.margin_clip is not None and not 0 < self.margin_clip < math.inf:
            raise ValueError(f"margin_clip={self.margin_clip}: it must be positive and finite, or None.")


def implicit_rewards(
    errors: tuple[Tensor, Tensor], ref_errors: tuple[Tensor, Tensor], beta: float | Tensor
) -> tuple[Tensor, Tensor]:
    """`-(beta/2) (l - r)` of chosen and rejected, `(B,)` each, without gradient."""
    chosen, rejected = (
        -(beta / 2) * (error.detach() - ref_error) for error, ref_error in zip(errors, ref_errors, strict=True)
    )
    return chosen, rejected


def diffusion_dpo_logits(
    chosen_error: Tensor,
    rejected_error: Tensor,
    ref_chosen_error: Tensor,
    ref_rejected_error: Tensor,
    *,
    beta: float | Tensor,
    margin_clip: float | None,
    rejected_weight: float = 1.0,
) -> Tensor:
    """Implicit reward margin of each pair, `-(beta/2) ((l_w - l_l) - (r_w - r_l))` (arXiv 2311.12908, equation 46).

    Args:
        chosen_error, rejected_error: `(B,)` mean squared denoising errors l of the model that is trained.
        ref_chosen_error, ref_rejected_error: `(B,)` errors r of the reference, same noise and timesteps.
        beta: In the convention of the authors' code: errors are means over the latent's elements, and the 1/2 stands.
            One for all pairs, or `(B,)` floating, one for each, as from `flow_dpo_beta` and `soft_label_beta`.
        margin_clip: Margins above this have no gradient, so that a pair which is won is not pulled further apart; the
            cheapest way to do that is to wreck the rejected image's likelihood. None leaves them.
        rejected_weight: Factor of the rejected images' difference `l_l - r_l`, in (0, 1]; 1 is the published margin.

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
    logits = -(beta / 2) * ((chosen - ref_chosen) - rejected_weight * (rejected - ref_rejected))
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


def soft_label_beta(soft_labels: Tensor, beta: float | Tensor) -> Tensor:
    """SmPO's `(2p - 1) beta` (arXiv 2506.02698), so that a pair's margin counts as much as its label is certain.

    The released code multiplies by 10 besides, which is a matter of beta.

    Args:
        soft_labels: `(B,)` probabilities p, in [0, 1], that chosen is better. A pair at 1/2 has no gradient, one below
            has its samples exchanged.
        beta: One for all pairs, or `(B,)`.

    Returns:
        `(B,)` float32 in [-beta, beta].
    """
    return (2 * soft_labels.float() - 1) * beta


def diffusion_dpo_loss(
    logits: Tensor, options: DiffusionDPOOptions, soft_labels: Tensor | float | None = None
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
        logits: `(B,)`, u.
        soft_labels: P of "irepo", `(B,)` or one for all, in (0, 1).

    Returns:
        `(B,)` float32, one loss per pair.

    Raises:
        ValueError: A loss that needs predictions, or soft labels that are missing or outside (0, 1).
    """
    loss_type, label_smoothing, dmpo_alpha = options.loss_type, options.label_smoothing, options.dmpo_alpha
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
    options: DiffusionDPOOptions,
) -> Tensor:
    """DSPO, as its released code computes it, from the chosen images' predictions.

    With `g = sigmoid(u)`, not detached, target y, prediction p and the reference's prediction r:

    - `"dspo"` (Stable Diffusion 1.5): `mean(((p - y) - beta (1 - g) (p - r))^2)` over each image's elements.
    - `"dspo_sdxl"`: `(1 - g)^2 mean((p - r)^2)` where the batch's mean of `(p - r)^2` is 0.1 or more, `(1 - g)^2`
      below.

    Args:
        chosen_prediction, chosen_target, ref_chosen_prediction: `(B, ...)`.
        logits: `(B,)`, u of `diffusion_dpo_logits` at the same beta.
        options: beta published: 0.001 (searched 0.001, 0.01, 0.05) for "dspo", 5000 for "dspo_sdxl".

    Returns:
        `(B,)` float32.
    """
    prediction, target, reference = (
        tensor.float().flatten(1) for tensor in (chosen_prediction, chosen_target, ref_chosen_prediction)
    )
    shortfall = torch.sigmoid(-logits)
    difference = prediction - reference
    if options.loss_type == "dspo":
        return ((prediction - target) - options.beta * shortfall[:, None] * difference).square().mean(dim=1)
    if options.loss_type == "dspo_sdxl":
        distance = difference.square()
        if bool(distance.mean() >= _DSPO_SDXL_SWITCH):
            return shortfall.square() * distance.mean(dim=1)
        return shortfall.square()
    raise ValueError(f"loss_type={options.loss_type!r} is neither 'dspo' nor 'dspo_sdxl'.")


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


def root_mean_square(prediction: Tensor) -> Tensor:
    """The norm of each prediction, `(B, ...)`, over the root of its number of elements: `(B,)` float32."""
    return prediction.float().flatten(1).square().mean(dim=1).sqrt()


def norm_excess(norm: Tensor, ref_norm: Tensor) -> Tensor:
    """By how much the norms of predictions exceed the reference's: `max(0, |p| / |p_ref| - 1)`.

    NormGuard (arXiv 2606.27771) has a hinge at the reference's norm, which preference training inflates by 5 to 15 %.
    Its code was not released. Relative to the reference's norm is a choice made here: the penalty then has the same
    size at all times and for all models.

    Args:
        norm, ref_norm: `(B,)`, of `root_mean_square`, on the same noise and times.

    Returns:
        `(B,)` float32, at least 0, without gradient where the norm is at most the reference's.
    """
    return functional.relu(norm.float() / ref_norm.float().clamp(min=torch.finfo(torch.float32).tiny) - 1)

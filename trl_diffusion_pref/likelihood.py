"""Denoising errors, the diffusion model's stand-in for log-likelihoods."""

from torch import Tensor


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, the mean over all dimensions but the first.

    Up to a constant factor and an additive constant its expectation over noise and timesteps is the negative evidence
    lower bound of the sample (arXiv 2006.11239, equation 14). A mean and not a sum: every constant in this package
    assumes that.

    Args:
        prediction, target: `(B, ...)`, any floating dtype; both are taken to float32 first, since the spacing of half
            precision at errors near 0.1 is worth whole logits once multiplied by a preference loss's beta.

    Returns:
        `(B,)` float32.

    Raises:
        ValueError: The shapes differ (broadcasting would hide a mistake).
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)} but target {tuple(target.shape)}.")
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)

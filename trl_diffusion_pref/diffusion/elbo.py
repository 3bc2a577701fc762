"""Denoising errors and the likelihood bounds made of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .noise import NoiseProcess


ELBO_SAMPLING = ("stratified", "antithetic", "independent")
ELBO_WEIGHTINGS = ("simple", "elbo", "min_snr")


def denoising_error(prediction: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, the mean over all dimensions but the first, or over a region of them.

    Up to a constant factor and an additive constant its expectation over noise and timesteps is the negative evidence
    lower bound of the sample (arXiv 2006.11239, equation 14). A mean and not a sum: every constant in this package
    assumes that.

    Args:
        prediction, target: `(B, ...)`, any floating dtype; both are taken to float32 first, since the spacing of half
            precision at errors near 0.1 is worth whole logits once multiplied by a preference loss's beta.
        region: Broadcasts to both; 1 where elements count, 0 elsewhere, with a 1 in each sample. Default: all count.

    Returns:
        `(B,)` float32.

    Raises:
        ValueError: The shapes differ (broadcasting would hide a mistake).
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)} but target {tuple(target.shape)}.")
    squares = (prediction.float() - target.float()).square()
    if region is None:
        return squares.flatten(1).mean(dim=1)
    counted = region.float().expand_as(squares).flatten(1)
    return (squares.flatten(1) * counted).sum(dim=1) / counted.sum(dim=1)


def time_quantiles(generators: Sequence[torch.Generator], draws: int, sampling: str) -> Tensor:
    """Quantiles of the time distribution, `(draws, B)` in [0, 1), column i from generator i.

    Args:
        sampling: "stratified" puts draw k into [k/K, (k+1)/K); "antithetic" draws u and 1 - u in turn; "independent"
            draws each by itself.

    Raises:
        ValueError: Unknown sampling, or fewer than one draw.
    """
    if draws < 1:
        raise ValueError(f"draws={draws}: at least one is needed.")
    uniform = torch.stack([torch.rand(draws, generator=generator) for generator in generators], dim=1)
    if sampling == "stratified":
        return (torch.arange(draws)[:, None] + uniform) / draws
    if sampling == "antithetic":
        mirrored = uniform.clone()
        mirrored[1::2] = 1 - uniform[: 2 * (draws // 2) : 2]
        return mirrored.clamp(max=1 - torch.finfo(torch.float32).eps)
    if sampling == "independent":
        return uniform
    raise ValueError(f"sampling={sampling!r} is none of {', '.join(ELBO_SAMPLING)}.")


def error_weight(process: NoiseProcess, t: Tensor, weighting: str, min_snr_gamma: float = 5.0) -> Tensor:
    """`(B,)` weight of the denoising error at times t: 1, the exact ELBO's, or min-SNR's (arXiv 2303.09556)."""
    if weighting == "simple":
        return torch.ones(t.shape, device=t.device)
    if weighting == "elbo":
        return process.squared_x0_scale(t) * process.elbo_weight(t)
    if weighting == "min_snr":
        alpha, sigma = process.alpha_sigma(t)
        return process.squared_x0_scale(t) * (alpha / sigma).square().clamp(max=min_snr_gamma)
    raise ValueError(f"weighting={weighting!r} is none of {', '.join(ELBO_WEIGHTINGS)}.")


def estimate_elbo(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    process: NoiseProcess,
    generators: Sequence[torch.Generator],
    *,
    draws: int = 8,
    sampling: str = "stratified",
    weighting: str = "simple",
    min_snr_gamma: float = 5.0,
    region: Tensor | None = None,
) -> Tensor:
    """Estimates each image's evidence lower bound, up to a constant, from several noisy versions of it.

    Args:
        predict: Called as `predict(x_t, model_time)` with `(B, ...)` and `(B,)`; returns the prediction.
        x0: `(B, ...)` clean latents.
        generators: One CPU generator per image. Two images whose generators are in the same state get the same times
            and noise: give a pair such generators, and the difference of their estimates keeps the images' difference
            alone.
        draws: Noisy versions per image.
        sampling: Of times, see `time_quantiles`.
        weighting: "simple" (mean of denoising errors), "elbo" (the bound itself: nats per latent element, without the
            constant prior and decoder terms) or "min_snr" with `min_snr_gamma`.
        region: As `denoising_error` takes it.

    Returns:
        `(B,)` float32, minus the weighted mean error; greater is likelier.

    Raises:
        ValueError: Unknown sampling or weighting, no draws, or not one generator per image.
    """
    if len(generators) != len(x0):
        raise ValueError(f"{len(generators)} generators for {len(x0)} images: one per image is needed.")
    quantiles = time_quantiles(generators, draws, sampling)
    total = torch.zeros(len(x0), device=x0.device)
    for row in quantiles:
        t = process.times_at(row).to(x0.device)
        noise = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators])
        noise = noise.to(x0.device)
        prediction = predict(process.corrupt(x0, noise, t), process.model_time(t))
        error = denoising_error(prediction, process.target(x0, noise, t), region)
        total += error_weight(process, t, weighting, min_snr_gamma) * error
    return -total / draws

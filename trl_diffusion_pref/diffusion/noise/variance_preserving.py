"""The discrete variance-preserving process of DDPM and its descendants."""

import torch
from torch import Tensor

from .base import NoiseProcess, noise_of_v, per_sample, v_target, x0_of_v


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# diffusers writes 2^-24 where rescaled betas make alphas_cumprod zero; Stable Diffusion's smallest value is 0.0047.
_ZERO_SNR = 1e-6


class VariancePreserving(NoiseProcess):
    """DDPM's process (arXiv 2006.11239, equation 4): alpha_t^2 = abar_t, sigma_t^2 = 1 - abar_t, t in 0..T-1.

    Args:
        alphas_cumprod: abar, `(T,)`, in [0, 1], decreasing.
        prediction_type: "epsilon" (target: noise), "v_prediction" (target: alpha noise - sigma x0, arXiv 2202.00512,
            appendix D) or "sample" (target: x0).

    Raises:
        ValueError: Unknown prediction type, or epsilon prediction with abar near 0 somewhere (zero terminal SNR),
            where the noise says nothing about x0.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon") -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={prediction_type!r} is none of {', '.join(PREDICTION_TYPES)}.")
        if prediction_type == "epsilon" and bool((alphas_cumprod < _ZERO_SNR).any()):
            raise ValueError(
                "The scheduler has zero terminal SNR (alphas_cumprod reaches 0) but prediction_type='epsilon', which "
                "says nothing about the image there. Use a scheduler with prediction_type 'v_prediction' or 'sample', "
                "or one without rescale_betas_zero_snr."
            )
        self.prediction_type = prediction_type
        self.num_train_timesteps = len(alphas_cumprod)
        abar = alphas_cumprod.detach().to("cpu", torch.float64)
        self._alpha = abar.sqrt().float()
        self._sigma = (1 - abar).sqrt().float()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index = t.to(device="cpu", dtype=torch.int64)
        return self._alpha[index].to(t.device), self._sigma[index].to(t.device)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise.float()
        if self.prediction_type == "sample":
            return x0.float()
        return v_target(x0, noise, *self.alpha_sigma(t))

    def predict_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "v_prediction":
            return x0_of_v(prediction, x_t, *self.alpha_sigma(t))
        if self.prediction_type == "sample":
            return prediction.float()
        alpha, sigma = (per_sample(value, x_t) for value in self.alpha_sigma(t))
        return (x_t.float() - sigma * prediction.float()) / alpha

    def predict_noise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return prediction.float()
        if self.prediction_type == "v_prediction":
            return noise_of_v(prediction, x_t, *self.alpha_sigma(t))
        alpha, sigma = (per_sample(value, x_t) for value in self.alpha_sigma(t))
        return (x_t.float() - alpha * prediction.float()) / sigma

    def solver_times(self, steps: int) -> Tensor:
        """DDIM's grid with trailing spacing: 0, then every T/steps-th time; with 25 steps of 1000: 0, 39, ..., 999."""
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(f"{steps} solver steps: there must be 1 to {self.num_train_timesteps}.")
        times = (torch.arange(1, steps + 1) * (self.num_train_timesteps / steps)).round().long() - 1
        return torch.cat([torch.zeros(1, dtype=torch.int64), times])

    def sample_later(self, t: Tensor, uniform: Tensor) -> Tensor:
        last = self.num_train_timesteps - 1
        # float32 rounds a product of a number just below 1 up
        return (t + 1 + (uniform * (last - t)).long()).clamp(max=last)

    def times_at(self, quantiles: Tensor) -> Tensor:
        steps = self.num_train_timesteps
        # float32 rounds a quantile just below 1 to a product of T itself
        return (quantiles * steps).long().clamp(max=steps - 1)

    def squared_x0_scale(self, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        if self.prediction_type == "epsilon":
            return (sigma / alpha).square()
        return torch.ones_like(sigma) if self.prediction_type == "sample" else sigma.square()

    def elbo_weight(self, t: Tensor) -> Tensor:
        """`T/2 (SNR(t-1) - SNR(t))` from step 1 on; 0 at step 0, whose term is the discrete decoder's."""
        alpha, sigma = self.alpha_sigma(t)
        before_alpha, before_sigma = self.alpha_sigma((t - 1).clamp(min=0))
        drop = (before_alpha / before_sigma).square() - (alpha / sigma).square()
        return self.num_train_timesteps / 2 * drop

    def sample_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.num_train_timesteps, (n,), generator=generator, device=generator.device)

    def model_time(self, t: Tensor) -> Tensor:
        return t

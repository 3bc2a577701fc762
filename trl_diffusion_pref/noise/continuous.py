"""Processes with continuous times in [0, 1]."""

import torch
from torch import Tensor

from .base import NoiseProcess, noise_of_v, per_sample, v_target, x0_of_v


# At t = 0 there is no noise to predict, and the ELBO's weight is infinite.
_FIRST_TIME = 1e-3


class ContinuousTimes(NoiseProcess):
    """What processes with times in [0, 1] share."""

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.num_train_timesteps = num_train_timesteps

    def times_at(self, quantiles: Tensor) -> Tensor:
        return quantiles.float().clamp(min=_FIRST_TIME)

    def solver_times(self, steps: int) -> Tensor:
        if steps < 1:
            raise ValueError(f"{steps} solver steps: there must be at least 1.")
        return torch.arange(steps + 1) / steps

    def sample_later(self, t: Tensor, uniform: Tensor) -> Tensor:
        # float32 can round a result just above t to just below it
        return torch.maximum(1 - uniform.to(t) * (1 - t), t)


class RectifiedFlow(ContinuousTimes):
    """Rectified flow (arXiv 2403.03206): x_t = (1 - t) x0 + t noise, target noise - x0, t in [0, 1].

    Times are drawn logit-normal(0, 1), the published default of the models trained this way.
    """

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - t.float(), t.float()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise.float() - x0.float()

    def predict_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t.float() - per_sample(t.float(), x_t) * prediction.float()

    def predict_noise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t.float() + per_sample(1 - t.float(), x_t) * prediction.float()

    def squared_x0_scale(self, t: Tensor) -> Tensor:
        return t.float().square()

    def elbo_weight(self, t: Tensor) -> Tensor:
        """`-1/2 dSNR/dt = (1 - t) / t^3`."""
        return (1 - t.float()) / t.float() ** 3

    def sample_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.sigmoid(torch.randn(n, generator=generator, device=generator.device))

    def model_time(self, t: Tensor) -> Tensor:
        return t * self.num_train_timesteps


class ContinuousVariancePreserving(ContinuousTimes):
    """x_t = cos(pi t / 2) x0 + sin(pi t / 2) noise, target v = alpha noise - sigma x0, t in [0, 1].

    Stable Audio Open's (arXiv 2407.14358), with the angle of arXiv 2202.00512, appendix D. Its sampler counts in
    sigma / alpha, and scales what it hands to the denoiser to this x_t. Times are drawn uniformly.
    """

    prediction_type = "v_prediction"

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t.float() * (torch.pi / 2)
        return angle.cos(), angle.sin()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return v_target(x0, noise, *self.alpha_sigma(t))

    def predict_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x0_of_v(prediction, x_t, *self.alpha_sigma(t))

    def predict_noise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return noise_of_v(prediction, x_t, *self.alpha_sigma(t))

    def squared_x0_scale(self, t: Tensor) -> Tensor:
        return self.alpha_sigma(t)[1].square()

    def elbo_weight(self, t: Tensor) -> Tensor:
        """`-1/2 dSNR/dt = pi/2 alpha / sigma^3`."""
        alpha, sigma = self.alpha_sigma(t)
        return torch.pi / 2 * alpha / sigma**3

    def sample_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.rand(n, generator=generator, device=generator.device)

    def model_time(self, t: Tensor) -> Tensor:
        return t

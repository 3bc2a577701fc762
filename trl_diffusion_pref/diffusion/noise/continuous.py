"""Processes with continuous times in [0, 1]."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from .base import NoiseProcess, noise_of_v, per_sample, v_target, x0_of_v


TIMESTEP_SAMPLINGS = ("logit_normal", "uniform", "mode")
# One of the scales that arXiv 2403.03206 tried, and --mode_scale of diffusers' training examples.
_MODE_SCALE = 1.29
# At t = 0 there is no noise to predict, and the ELBO's weight is infinite.
_FIRST_TIME = 1e-3
# How many times are drawn at once, and how often, until enough lie within the bounds.
_TRIES = 256


class ContinuousTimes(NoiseProcess):
    """What processes with times in [0, 1] share."""

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.num_train_timesteps = num_train_timesteps

    def times_at(self, quantiles: Tensor) -> Tensor:
        first, last = self.bounds
        return (first + quantiles.float() * (last - first)).clamp(min=_FIRST_TIME)

    def solver_times(self, steps: int) -> Tensor:
        if steps < 1:
            raise ValueError(f"{steps} solver steps: there must be at least 1.")
        return torch.arange(steps + 1) / steps

    def sample_later(self, t: Tensor, uniform: Tensor) -> Tensor:
        # float32 can round a result just above t to just below it
        return torch.maximum(1 - uniform.to(t) * (1 - t), t)


class RectifiedFlow(ContinuousTimes):
    """Rectified flow (arXiv 2403.03206): x_t = (1 - t) x0 + t noise, target noise - x0, t in [0, 1].

    Training times are drawn, then shifted by `t' = s t / (1 + (s - 1) t)` (equation 23) towards the noise, of which a
    larger image needs more. The solver's grid is shifted likewise; `times_at` and `sample_later` are not.

    Args:
        num_train_timesteps: What the denoiser's timestep is at t = 1.
        timestep_sampling: "logit_normal" (sigmoid of a standard normal, equation 19 with m = 0, s = 1), "uniform", or
            "mode" (`1 - u - 1.29 (cos^2(pi u / 2) - 1 + u)`, equation 20: most times in the middle, more than
            logit-normal has at both ends).
        shift: s, positive; 1 leaves times as drawn. None where it depends on the image's size and that is not known:
            then nothing can be drawn and there is no grid, but estimates of the ELBO need neither.
        shift_terminal: In [0, 1), the grid's last time before the end, to which it is stretched after the shift;
            training times then lie in [shift_terminal, 1], as those of a grid of ever more steps.
        by_size: Processes for samples of several sizes, by the latents' shape; empty where one process is for all.

    Raises:
        ValueError: Unknown sampling, or a value outside its range.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        timestep_sampling: str = "logit_normal",
        shift: float | None = 1.0,
        shift_terminal: float = 0.0,
        by_size: "Mapping[tuple[int, ...], RectifiedFlow] | None" = None,
    ) -> None:
        super().__init__(num_train_timesteps)
        if timestep_sampling not in TIMESTEP_SAMPLINGS:
            raise ValueError(f"timestep_sampling={timestep_sampling!r} is none of {', '.join(TIMESTEP_SAMPLINGS)}.")
        if shift is not None and not shift > 0:
            raise ValueError(f"shift={shift}: it must be positive; 1 leaves times as they are drawn.")
        if not 0 <= shift_terminal < 1:
            raise ValueError(f"shift_terminal={shift_terminal} is outside [0, 1).")
        self.timestep_sampling = timestep_sampling
        self.shift = shift
        self.shift_terminal = shift_terminal
        self.by_size = dict(by_size or {})

    def sized(self, latent_shape: tuple[int, ...]) -> NoiseProcess:
        if not self.by_size:
            return self
        if tuple(latent_shape) not in self.by_size:
            known = ", ".join(map(str, sorted(self.by_size)))
            raise ValueError(f"There is no time shift for latents of shape {tuple(latent_shape)}, only for {known}.")
        return self.by_size[tuple(latent_shape)]

    def describe(self, *, training_times: bool = False) -> str:
        described = super().describe()
        if self.bounds != (0.0, 1.0):
            described += " from {:g} to {:g}".format(*self.bounds)
        if not training_times:
            return described
        shift = "unknown" if self.shift is None else f"{self.shift:.6g}"
        described = f"{described} {self.timestep_sampling} shift {shift} terminal {self.shift_terminal:g}"
        return described + "".join(f", {shape} {process.shift:.6g}" for shape, process in sorted(self.by_size.items()))

    def within(self, first: float, last: float) -> "RectifiedFlow":
        bounded = copy.copy(self)
        bounded.bounds = (first, last)
        bounded.by_size = {shape: process.within(first, last) for shape, process in self.by_size.items()}
        return bounded

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
        """Raises a ValueError where hardly any time lies within the bounds."""
        first, last = self.bounds
        if self.bounds == (0.0, 1.0):
            return self._any_timesteps(n, generator)
        found = torch.empty(0, device=generator.device)
        for _ in range(_TRIES):
            t = self._any_timesteps(max(n, _TRIES), generator)
            # The noisiest time is in the last range, and a time between two ranges in the later one.
            found = torch.cat([found, t[(t >= first) & ((t < last) | (last == 1.0))]])
            if len(found) >= n:
                return found[:n]
        raise ValueError(
            f"Of {_TRIES * max(n, _TRIES)} training times, fewer than {n} lie in the trained denoiser's range, "
            f"{first:g} to {last:g}. Choose another timestep_shift ({self.shift}) or timestep_sampling "
            f"({self.timestep_sampling!r})."
        )

    def _any_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        if self.timestep_sampling == "logit_normal":
            t = torch.sigmoid(torch.randn(n, generator=generator, device=generator.device))
        else:
            t = torch.rand(n, generator=generator, device=generator.device)
        if self.timestep_sampling == "mode":
            # Rounding can leave [0, 1] by a hair.
            t = (1 - t - _MODE_SCALE * ((t * (torch.pi / 2)).cos().square() - 1 + t)).clamp(0, 1)
        t = self._shifted(t)
        return self.shift_terminal + (1 - self.shift_terminal) * t if self.shift_terminal else t

    def solver_times(self, steps: int) -> Tensor:
        """What diffusers' flow-matching schedulers make of N equal steps from 1, as Flux's pipeline asks for them."""
        times = self._shifted(super().solver_times(steps).double())
        # With one step the last time before the end is 1, and there is nothing to stretch.
        if self.shift_terminal and steps > 1:
            times[1:] = 1 - (1 - times[1:]) * ((1 - self.shift_terminal) / (1 - times[1]))
        return times.float()

    def _shifted(self, t: Tensor) -> Tensor:
        if self.shift is None:
            raise ValueError(
                "The scheduler shifts times by the image's size (use_dynamic_shifting), which is not known here. Pass "
                "image_tokens or timestep_shift to noise_process."
            )
        # The same as s t / (1 + (s - 1) t), but never above 1 by rounding.
        return t if self.shift == 1 else self.shift * t / (self.shift * t + (1 - t))

    def model_time(self, t: Tensor) -> Tensor:
        return t * self.num_train_timesteps

    def time_of(self, model_time: Tensor) -> Tensor:
        return model_time / self.num_train_timesteps


class ContinuousVariancePreserving(ContinuousTimes):
    """x_t = cos(pi t / 2) x0 + sin(pi t / 2) noise, target v = alpha noise - sigma x0, t in [0, 1].

    Stable Audio Open's (arXiv 2407.14358), with the angle of arXiv 2202.00512, appendix D. Its sampler counts in
    sigma / alpha, and scales what it hands to the denoiser to this x_t. Times are drawn uniformly, as the authors'
    stable-audio-tools does by default (training/diffusion.py).
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

    def time_fraction(self, model_time: Tensor) -> Tensor:
        return model_time.float()

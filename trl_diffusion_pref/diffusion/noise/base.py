"""What every noise process can do."""

import hashlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes `(B,)` to `(B, 1, ..., 1)` with the dimensions of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def v_target(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """`v = alpha noise - sigma x0` (arXiv 2202.00512, appendix D); alpha and sigma `(B,)`, alpha^2 + sigma^2 = 1."""
    return per_sample(alpha, x0) * noise.float() - per_sample(sigma, x0) * x0.float()


def x0_of_v(v: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that v stands for."""
    return per_sample(alpha, x_t) * x_t.float() - per_sample(sigma, x_t) * v.float()


def noise_of_v(v: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that v stands for."""
    return per_sample(sigma, x_t) * x_t.float() + per_sample(alpha, x_t) * v.float()


class NoiseProcess(ABC):
    """`x_t = alpha_t x_0 + sigma_t noise`; what alpha, sigma and the prediction are, subclasses say.

    Latents and noise are `(B, ...)` tensors, times `(B,)`. Results are float32 whatever the inputs' dtype.
    """

    num_train_timesteps: int
    bounds: tuple[float, float] = (0.0, 1.0)  # of the times in training and evaluation, as shares of the noisiest

    def within(self, first: float, last: float) -> "NoiseProcess":
        """The process with times from `first` up to `last` alone, for a denoiser that is called at no others.

        Raises:
            ValueError: A process of this kind cannot be bounded.
        """
        if (first, last) == (0.0, 1.0):
            return self
        raise ValueError(
            f"Denoisers that share the times of a {type(self).__name__} are not supported, only those of flows. Set "
            "pipeline.scheduler to the one that the pipeline was published with."
        )

    def sized(self, latent_shape: tuple[int, ...]) -> "NoiseProcess":
        """The process for samples whose latents have this shape; another one where times depend on the size."""
        return self

    def describe(self, *, training_times: bool = False) -> str:
        """What tells this process from others: its kind, prediction and schedule.

        Args:
            training_times: Also how training times are drawn, where processes of a kind differ in it. Errors at drawn
                times depend on that; estimates of the ELBO, whose times are quantiles, do not.
        """
        schedule = hashlib.sha256(self._schedule().numpy().tobytes()).hexdigest()[:16]
        return f"{type(self).__name__} {getattr(self, 'prediction_type', '')} {self.num_train_timesteps} {schedule}"

    def _schedule(self) -> Tensor:
        return torch.stack(
            self.alpha_sigma(self.times_at(torch.arange(self.num_train_timesteps) / self.num_train_timesteps))
        )

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at times `(B,)`, each `(B,)` float32."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser's output is compared with."""

    @abstractmethod
    def predict_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latents that a prediction at `x_t` stands for."""

    @abstractmethod
    def predict_noise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction at `x_t` stands for."""

    @abstractmethod
    def sample_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """`(n,)` random training times on the generator's device."""

    @abstractmethod
    def solver_times(self, steps: int) -> Tensor:
        """Times `(steps + 1,)` of a solver that goes from the noisiest, which comes last, to the first, without noise.

        Raises:
            ValueError: Fewer than one step, or more than the process has times.
        """

    @abstractmethod
    def sample_later(self, t: Tensor, uniform: Tensor) -> Tensor:
        """Times `(B,)`, uniform over those later than t, from `(B,)` numbers in [0, 1)."""

    @abstractmethod
    def times_at(self, quantiles: Tensor) -> Tensor:
        """Times `(B,)` at quantiles in [0, 1) of the uniform distribution over the process's times."""

    @abstractmethod
    def squared_x0_scale(self, t: Tensor) -> Tensor:
        """`(B,)` factor from a prediction's squared error to that of the clean latents which it implies."""

    @abstractmethod
    def elbo_weight(self, t: Tensor) -> Tensor:
        """`(B,)` weight of the squared x0 error in the ELBO as a mean over times (arXiv 2107.00630, eq. 13, 17)."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """The `timestep` argument that the denoiser gets for times t."""

    def time_of(self, model_time: Tensor) -> Tensor:
        """The inverse of `model_time`, up to rounding. Default: the denoiser gets the times themselves."""
        return model_time

    def time_fraction(self, model_time: Tensor) -> Tensor:
        """Where the denoiser's timesteps lie between the first, 0, and the noisiest, 1; `(B,)` float32."""
        return model_time.float() / self.num_train_timesteps

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`x_t` for clean latents `x0`."""
        alpha, sigma = self.alpha_sigma(t)
        return per_sample(alpha, x0) * x0.float() + per_sample(sigma, x0) * noise.float()

    def renoise(self, x_t: Tensor, noise: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Brings `x_t` forward to the noisier time s: `x_s = (a_s/a_t) x_t + sqrt(s_s^2 - s_t^2 a_s^2/a_t^2) noise`.

        Exact where `x_t` has the process's distribution at t (Self-NPO, arXiv 2505.11777, step 3).

        Raises:
            ValueError: Some s is before its t.
        """
        if bool((s < t).any()):
            raise ValueError("renoise goes from less noise to more: each s must be at or after its t.")
        alpha_t, sigma_t = self.alpha_sigma(t)
        alpha_s, sigma_s = self.alpha_sigma(s)
        ratio = alpha_s / alpha_t
        # Rounding can push the variance of s = t a hair below zero.
        added = (sigma_s.square() - (sigma_t * ratio).square()).clamp_min(0.0).sqrt()
        return per_sample(ratio, x_t) * x_t.float() + per_sample(added, x_t) * noise.float()

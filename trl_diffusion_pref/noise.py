"""Noise processes, built from a diffusers scheduler: how latents are corrupted and what the denoiser is asked for.

One class per kind of process. Nothing here knows a model; time is counted in the process's own unit (integer training
steps for variance-preserving processes with a table of betas, t in [0, 1] for the others), and `model_time` gives what
the denoiser is called with.
"""

import hashlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# diffusers writes 2^-24 where rescaled betas make alphas_cumprod zero; Stable Diffusion's smallest value is 0.0047.
_ZERO_SNR = 1e-6

# Of processes with continuous times: at t = 0 there is no noise to predict, and the ELBO's weight is infinite.
_FIRST_TIME = 1e-3


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes `(B,)` to `(B, 1, ..., 1)` with the dimensions of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


class NoiseProcess(ABC):
    """`x_t = alpha_t x_0 + sigma_t noise`; what alpha, sigma and the prediction are, subclasses say.

    Latents and noise are `(B, ...)` tensors, times `(B,)`. Results are float32 whatever the inputs' dtype.
    """

    num_train_timesteps: int

    def describe(self) -> str:
        """What tells this process from others: its kind, prediction and schedule."""
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
    def sample_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """`(n,)` random training times on the generator's device."""

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

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`x_t` for clean latents `x0`."""
        alpha, sigma = self.alpha_sigma(t)
        return _per_sample(alpha, x0) * x0.float() + _per_sample(sigma, x0) * noise.float()

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
        return _per_sample(ratio, x_t) * x_t.float() + _per_sample(added, x_t) * noise.float()


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
        alpha, sigma = (_per_sample(value, x0) for value in self.alpha_sigma(t))
        return alpha * noise.float() - sigma * x0.float()

    def predict_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (_per_sample(value, x_t) for value in self.alpha_sigma(t))
        if self.prediction_type == "epsilon":
            return (x_t.float() - sigma * prediction.float()) / alpha
        if self.prediction_type == "sample":
            return prediction.float()
        return alpha * x_t.float() - sigma * prediction.float()

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


class RectifiedFlow(NoiseProcess):
    """Rectified flow (arXiv 2403.03206): x_t = (1 - t) x0 + t noise, target noise - x0, t in [0, 1].

    Times are drawn logit-normal(0, 1), the published default of the models trained this way.
    """

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.num_train_timesteps = num_train_timesteps

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - t.float(), t.float()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise.float() - x0.float()

    def predict_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t.float() - _per_sample(t.float(), x_t) * prediction.float()

    def times_at(self, quantiles: Tensor) -> Tensor:
        return quantiles.float().clamp(min=_FIRST_TIME)

    def squared_x0_scale(self, t: Tensor) -> Tensor:
        return t.float().square()

    def elbo_weight(self, t: Tensor) -> Tensor:
        """`-1/2 dSNR/dt = (1 - t) / t^3`."""
        return (1 - t.float()) / t.float() ** 3

    def sample_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.sigmoid(torch.randn(n, generator=generator, device=generator.device))

    def model_time(self, t: Tensor) -> Tensor:
        return t * self.num_train_timesteps


class ContinuousVariancePreserving(NoiseProcess):
    """x_t = cos(pi t / 2) x0 + sin(pi t / 2) noise, target v = alpha noise - sigma x0, t in [0, 1].

    Stable Audio Open's (arXiv 2407.14358), with the angle of arXiv 2202.00512, appendix D. Its sampler counts in
    sigma / alpha, and scales what it hands to the denoiser to this x_t. Times are drawn uniformly.
    """

    prediction_type = "v_prediction"

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.num_train_timesteps = num_train_timesteps

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t.float() * (torch.pi / 2)
        return angle.cos(), angle.sin()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (_per_sample(value, x0) for value in self.alpha_sigma(t))
        return alpha * noise.float() - sigma * x0.float()

    def predict_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (_per_sample(value, x_t) for value in self.alpha_sigma(t))
        return alpha * x_t.float() - sigma * prediction.float()

    def times_at(self, quantiles: Tensor) -> Tensor:
        return quantiles.float().clamp(min=_FIRST_TIME)

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


def noise_process(scheduler) -> NoiseProcess:
    """The noise process that a pipeline with this scheduler was trained for.

    Args:
        scheduler: A diffusers scheduler; its sampling method does not matter, its betas and prediction type do.

    Raises:
        TypeError: The scheduler belongs to none of these processes.
        ValueError: It does, with a prediction type that cannot be trained.
    """
    if type(scheduler).__name__.startswith("FlowMatch"):
        return RectifiedFlow(scheduler.config.num_train_timesteps)
    if type(scheduler).__name__ == "CosineDPMSolverMultistepScheduler":
        if scheduler.config.prediction_type != "v_prediction" or scheduler.config.sigma_data != 1.0:
            raise ValueError(
                f"CosineDPMSolverMultistepScheduler with prediction_type={scheduler.config.prediction_type!r} and "
                f"sigma_data={scheduler.config.sigma_data}: only 'v_prediction' and 1.0, which Stable Audio Open has, "
                "can be trained."
            )
        return ContinuousVariancePreserving(scheduler.config.num_train_timesteps)
    if hasattr(scheduler, "alphas_cumprod"):
        prediction_type = scheduler.config.get("prediction_type", "epsilon")
        # Multistep solvers (Sana's, Wan's) have alphas_cumprod even where the model is a flow.
        if prediction_type == "flow_prediction":
            return RectifiedFlow(scheduler.config.num_train_timesteps)
        return VariancePreserving(scheduler.alphas_cumprod, prediction_type)
    raise TypeError(
        f"{type(scheduler).__name__} is neither a variance-preserving scheduler (with alphas_cumprod, such as "
        "DDPMScheduler) nor a flow-matching one. Set pipeline.scheduler to one of these before training."
    )

"""Noise processes, built from a diffusers scheduler: how latents are corrupted and what the denoiser is asked for.

One class per kind of process. Nothing here knows a model; time is counted in the process's own unit (integer training
steps for variance-preserving processes with a table of betas, t in [0, 1] for the others), and `model_time` gives what
the denoiser is called with.
"""

import math
from collections.abc import Mapping
from typing import Any

from .base import NoiseProcess, per_sample
from .continuous import TIMESTEP_SAMPLINGS, ContinuousVariancePreserving, RectifiedFlow
from .variance_preserving import PREDICTION_TYPES, VariancePreserving


__all__ = [
    "PREDICTION_TYPES",
    "TIMESTEP_SAMPLINGS",
    "ContinuousVariancePreserving",
    "NoiseProcess",
    "RectifiedFlow",
    "VariancePreserving",
    "noise_process",
    "per_sample",
]


def noise_process(
    scheduler,
    image_tokens: float | None = None,
    *,
    timestep_sampling: str | None = None,
    timestep_shift: float | None = None,
) -> NoiseProcess:
    """The noise process that a pipeline with this scheduler was trained for.

    Args:
        scheduler: A diffusers scheduler; its sampling method does not matter, its betas, prediction type and shift do.
        image_tokens: Of one image, see `Family.image_tokens`. Where a flow's shift depends on it and it is not given,
            the process can draw no training times.
        timestep_sampling: How a flow's training times are drawn, see `RectifiedFlow`; default "logit_normal".
        timestep_shift: Of a flow's times; default what the scheduler's config says (`shift`, `flow_shift`, or by
            `image_tokens` with `use_dynamic_shifting`; `shift_terminal` after it). One that is given stands alone.

    Raises:
        TypeError: The scheduler belongs to none of these processes.
        ValueError: It does, with a prediction type that cannot be trained; the options of a flow for another process,
            or outside their range.
    """
    if _is_flow(scheduler):
        config, terminal = scheduler.config, 0.0
        if timestep_shift is None:
            timestep_shift, terminal = _shift(scheduler, image_tokens), config.get("shift_terminal") or 0.0
        sampling = timestep_sampling or "logit_normal"
        return RectifiedFlow(config.num_train_timesteps, sampling, timestep_shift, terminal)
    for name, value in (("timestep_sampling", timestep_sampling), ("timestep_shift", timestep_shift)):
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is for flow models. With {type(scheduler).__name__} this is a variance-preserving "
                "process, whose training times are uniform. Leave it out."
            )
    if type(scheduler).__name__ == "CosineDPMSolverMultistepScheduler":
        if scheduler.config.prediction_type != "v_prediction" or scheduler.config.sigma_data != 1.0:
            raise ValueError(
                f"CosineDPMSolverMultistepScheduler with prediction_type={scheduler.config.prediction_type!r} and "
                f"sigma_data={scheduler.config.sigma_data}: only 'v_prediction' and 1.0, which Stable Audio Open has, "
                "can be trained."
            )
        return ContinuousVariancePreserving(scheduler.config.num_train_timesteps)
    if hasattr(scheduler, "alphas_cumprod"):
        return VariancePreserving(scheduler.alphas_cumprod, scheduler.config.get("prediction_type", "epsilon"))
    if type(scheduler).__name__.startswith("EDM"):
        raise TypeError(
            f"{type(scheduler).__name__} is of a model that is trained as EDM (Playground 2.5, say), which is not "
            "supported; with another scheduler training would have another objective than the model."
        )
    raise TypeError(
        f"{type(scheduler).__name__} is neither a variance-preserving scheduler (with alphas_cumprod, such as "
        "DDPMScheduler) nor a flow-matching one. Set pipeline.scheduler to one of these before training."
    )


def _is_flow(scheduler) -> bool:
    if type(scheduler).__name__.startswith("FlowMatch"):
        return True
    # Multistep solvers (Sana's, Wan's) have alphas_cumprod even where the model is a flow.
    return hasattr(scheduler, "alphas_cumprod") and scheduler.config.get("prediction_type") == "flow_prediction"


def _shift(scheduler: Any, image_tokens: float | None) -> float | None:
    """The factor by which a flow's sampler shifts times; None where it depends on tokens and they are not known.

    With `use_dynamic_shifting` diffusers' pipelines hand their scheduler mu, a straight line through `base_shift` at
    `base_image_seq_len` tokens and `max_shift` at `max_image_seq_len`; e^mu is the factor ("exponential"), or mu
    ("linear"). The defaults are those pipelines', for schedulers whose config lacks these options.
    """
    config: Mapping[str, Any] = scheduler.config
    if config.get("use_dynamic_shifting"):
        if image_tokens is None:
            return None
        base_tokens, max_tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = base + (most - base) / (max_tokens - base_tokens) * (image_tokens - base_tokens)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    # Multistep solvers read their own option, and only with flow sigmas.
    if config.get("use_flow_sigmas"):
        return config["flow_shift"]
    # `set_shift` changes the scheduler and leaves its config.
    return getattr(scheduler, "shift", config.get("shift", 1.0))

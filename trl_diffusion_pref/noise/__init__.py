"""Noise processes, built from a diffusers scheduler: how latents are corrupted and what the denoiser is asked for.

One class per kind of process. Nothing here knows a model; time is counted in the process's own unit (integer training
steps for variance-preserving processes with a table of betas, t in [0, 1] for the others), and `model_time` gives what
the denoiser is called with.
"""

from .base import NoiseProcess, per_sample
from .continuous import ContinuousVariancePreserving, RectifiedFlow
from .variance_preserving import PREDICTION_TYPES, VariancePreserving


__all__ = [
    "PREDICTION_TYPES",
    "ContinuousVariancePreserving",
    "NoiseProcess",
    "RectifiedFlow",
    "VariancePreserving",
    "noise_process",
    "per_sample",
]


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

"""Sampling towards a reward of noisy latents, inside an ordinary diffusers pipeline (Flow-NRG, arXiv 2501.13918)."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from ..diffusion.noise import NoiseProcess, RectifiedFlow, noise_process, per_sample
from ..families import Family, supported_pipelines
from .calls import UNCONDITIONAL, WrappedForward, calling_frame, is_both_sides, passes_the_negative_prompt
from .halves import take_half
from .noisy_inputs import DenoiserCall, Reward, TrainedReward, check_same, noisy_part
from .sources import denoiser_name, denoiser_names, guided_family


# Of a guided denoiser's attribute that holds its guidance.
_MARK = "_reward_guidance"
# Where x_t has less of the sample than this, it is noise alone, and the factor sigma / alpha has no bound.
_LEAST_ALPHA = 1e-3


class RewardGuidance:
    """A reward that is active in a pipeline; made by [`reward_guidance`].

    The pipeline's own code stays as it is. Its denoiser's `forward` is wrapped to keep the call on the prompt, and the
    scheduler's `step` for the one step after it: only there do the guided prediction, the time and `x_t` meet in every
    pipeline. Solvers that call the denoiser more than once in a step are guided at each call. One thread may sample at
    a time.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, reward: Reward, weights: Mapping[str, float] | None, scale: float
    ) -> None:
        self.pipeline, self.reward, self.weights, self.scale = pipeline, reward, weights, scale
        self._family = _known_family(pipeline)
        self._call: DenoiserCall | None = None
        # Of the pipeline's `__call__` in which that call was made.
        self._frame: FrameType | None = None
        self._armed: tuple[Any, Any] | None = None
        self._busy = False
        self._calls = self._steps = 0
        self._wrapped: list[WrappedForward] = []
        for number, name in enumerate(denoiser_names(pipeline)):
            denoiser: ModelMixin = getattr(pipeline, name)
            self._wrapped.append(WrappedForward(denoiser, functools.partial(self._forward, number)))
            setattr(denoiser, _MARK, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewardGuidance":
        raise TypeError("A denoiser with reward guidance cannot be copied. Leave the with block, and copy then.")

    @property
    def acts(self) -> bool:
        """Whether the reward changes anything."""
        return self.scale > 0 and (self.weights is None or any(self.weights.values()))

    def remove(self) -> None:
        """Restores the pipeline exactly."""
        self._disarm()
        for wrapped in self._wrapped:
            wrapped.remove()
            delattr(wrapped.denoiser, _MARK)

    def check_used(self) -> None:
        """Raises where the pipeline called its denoiser and never its scheduler, so that the reward did nothing.

        Raises:
            RuntimeError: It did.
        """
        if self._calls and not self._steps:
            raise RuntimeError(
                f"The {type(self.pipeline).__name__} called its denoiser and never its scheduler's step, at which the "
                "reward acts, so its samples are those without the reward. It cannot be guided by one."
            )

    # ---- The denoiser's calls ------------------------------------------------------------------------------------

    def _forward(self, number: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = calling_frame() if self.acts and not self._busy else None
        if frame is not None and frame.f_locals["self"] is self.pipeline:
            if self._frame is not frame:
                # The pipeline's call before this one ended with an error.
                self._disarm()
            # A further call before the step is the other side's, or one with skipped layers (Stable Diffusion 3).
            if self._call is None:
                self._call = self._on_the_prompt(self._wrapped[number], frame, args, kwargs)
                if self._call is not None:
                    self._calls, self._frame = self._calls + 1, frame
                    self._arm(self.pipeline.scheduler)
        return original(*args, **kwargs)

    def _on_the_prompt(
        self, wrapped: WrappedForward, frame: FrameType, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> DenoiserCall | None:
        """The conditional side of a call; None where it is on the other side alone."""
        denoiser, family = wrapped.denoiser, self._family
        signature = inspect.signature(type(denoiser).forward)
        latents = list(signature.parameters)[1]
        layout = family.guidance_layout
        if layout == "separate":
            name = wrapped.call
            if passes_the_negative_prompt(frame, args, kwargs) if name is None else name in UNCONDITIONAL:
                return None
        elif layout is not None:
            sample = args[0] if args else kwargs[latents]
            parts, rows = 3 if layout == "positive_of_three" else 2, len(sample)
            if is_both_sides(sample, parts, self.pipeline):
                args, kwargs = take_half(
                    (args, kwargs),
                    1 if layout == "batched" else 0,
                    rows,
                    family.shared_arguments,
                    lists=isinstance(sample, list),
                    first=rows // parts,
                    batch_second=family.batch_second,
                )
        arguments = dict(signature.bind(denoiser, *args, **kwargs).arguments)
        own, *_ = signature.parameters
        del arguments[own]
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(parameter.name, {})
        return DenoiserCall(denoiser, arguments, latents)

    # ---- The scheduler's step ------------------------------------------------------------------------------------

    def _arm(self, scheduler: Any) -> None:
        self._armed = scheduler, vars(scheduler).get("step")
        scheduler.step = functools.update_wrapper(functools.partial(self._step, scheduler.step), scheduler.step)

    def _disarm(self) -> None:
        # Between steps a scheduler is as it was: samplers copy theirs.
        self._call = self._frame = None
        if self._armed is not None:
            scheduler, before = self._armed
            self._armed = None
            del scheduler.step
            if before is not None:
                scheduler.step = before

    def _step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self._call is not None and self._armed is not None
        call, scheduler = self._call, self._armed[0]
        self._disarm()
        self._steps += 1
        bound = inspect.signature(step).bind(*args, **kwargs)
        values = bound.arguments
        if absent := {"model_output", "timestep", "sample"} - values.keys():
            raise RuntimeError(
                f"{type(scheduler).__name__}.step was called without {', '.join(sorted(absent))}, which a reward "
                "needs. Sample with another scheduler."
            )
        values["model_output"] = self._guided(
            call, scheduler, values["model_output"], values["timestep"], values["sample"]
        )
        return step(*bound.args, **bound.kwargs)

    def _guided(
        self, call: DenoiserCall, scheduler: Any, prediction: Tensor, timestep: Tensor | float, sample: Tensor
    ) -> Tensor:
        """The prediction with the reward's gradient: `noise - scale sigma_t g` in terms of the predicted noise.

        For a flow it is `v - scale t / (1 - t) g` (arXiv 2501.13918, equation 11 and its pseudo-code), since the
        predicted noise is `x_t + (1 - t) v`.
        """
        if prediction.shape != sample.shape:
            raise RuntimeError(
                f"The scheduler got a prediction of the shape {tuple(prediction.shape)} for samples of "
                f"{tuple(sample.shape)}, to which the reward's gradient cannot be added."
            )
        process: NoiseProcess = noise_process(scheduler)
        place = _place(scheduler, timestep)
        time = _time(scheduler, process, place)
        alpha, sigma = process.alpha_sigma(time)
        if alpha < _LEAST_ALPHA:
            return prediction
        gradient = self._gradient(call, sample, process.time_fraction(process.model_time(time)))
        if not bool(gradient.isfinite().all()):
            steps = len(scheduler.timesteps)
            raise ValueError(
                f"The reward's gradient is not finite at step {place + 1} of {steps} (timestep {float(timestep):g}). "
                f"Sample with a lower scale (now {self.scale:g}) or in a wider precision than {prediction.dtype}, or "
                "look into the reward."
            )
        # The predicted noise is affine in the prediction: noise, v or the sample.
        slope = process.predict_noise(torch.ones(1), torch.zeros(1), time)
        shift = (self.scale * sigma / slope).to(gradient.device)
        return (prediction.float() - per_sample(shift, gradient) * gradient).to(prediction.dtype)

    def _gradient(self, call: DenoiserCall, sample: Tensor, time: Tensor) -> Tensor:
        """Of the weighted rewards' sum with respect to x_t, `(B, ...)` float32.

        Raises:
            RuntimeError: The denoiser was called on other latents than the scheduler's.
            ValueError: The reward is no number for each sample, or does not depend on the latents.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("Rewards need gradients, which torch.inference_mode forbids. Use torch.no_grad.")
        self._busy = True
        try:
            with torch.enable_grad():
                leaf = call.stacked.detach().clone().requires_grad_()
                inputs = call.inputs(leaf, sample.shape, time.to(leaf.device).expand(len(sample)))
                check_same(inputs.x_t.detach(), sample)
                total = self._total(self.reward(inputs), len(sample))
                gradient = None
                if total.requires_grad:
                    (gradient,) = torch.autograd.grad(total.sum(), leaf, allow_unused=True)
        finally:
            self._busy = False
        if gradient is None:
            raise ValueError("The reward has no gradient with respect to inputs.x_t: compute it from that tensor.")
        return noisy_part(gradient, sample.shape).float()

    def _total(self, rewards: Tensor | Mapping[str, Tensor], count: int) -> Tensor:
        """The weighted sum of the objectives, `(B,)` float32."""
        named = {"reward": rewards} if isinstance(rewards, Tensor) else dict(rewards)
        _check_names(self.weights, tuple(named))
        for name, values in named.items():
            if tuple(values.shape) != (count,):
                raise ValueError(
                    f"The reward's objective {name!r} has the shape {tuple(values.shape)}; it must be ({count},), one "
                    "number for each sample."
                )
        weights = dict.fromkeys(named, 1.0) if self.weights is None else self.weights
        return torch.stack([weight * named[name].float() for name, weight in weights.items() if weight]).sum(dim=0)


def _place(scheduler: Any, timestep: Tensor | float) -> int:
    """The number of a step among the scheduler's, from 0."""
    return int((scheduler.timesteps.float().cpu() - float(timestep)).abs().argmin())


def _time(scheduler: Any, process: NoiseProcess, place: int) -> Tensor:
    """The process's time at a step, `(1,)` float32."""
    if isinstance(process, RectifiedFlow):
        # The sigma is the time; timesteps are rounded by some solvers, and not shifted by CogView 4's pipeline.
        return scheduler.sigmas[place].float().cpu().reshape(1)
    return scheduler.timesteps[place].float().cpu().reshape(1)


def _known_family(pipeline: DiffusionPipeline) -> Family:
    """The family of a pipeline whose calls are known, and which is not guided by a reward yet.

    Raises:
        ValueError: It cannot be guided.
        TypeError: No pipeline.
    """
    family = guided_family(pipeline) if isinstance(pipeline, DiffusionPipeline) else None
    if family is None:
        raise ValueError(
            f"It is not known how a {type(pipeline).__name__} calls its denoiser, so a reward cannot guide it; known "
            f"are {', '.join(supported_pipelines())}."
        )
    for name in denoiser_names(pipeline):
        denoiser = getattr(pipeline, name)
        if not isinstance(denoiser, ModelMixin):
            raise ValueError(
                f"The pipeline's {name} is wrapped in a {type(denoiser).__name__}. Put the model itself there: "
                "PeftModel.get_base_model() keeps the adapter in it; do not compile it."
            )
        if hasattr(denoiser, _MARK):
            raise ValueError(
                "This pipeline is guided by a reward already. Give one reward with several objectives, as a function "
                "that returns them by name."
            )
    # Raises for schedulers whose process is not known.
    noise_process(pipeline.scheduler)
    return family


def _check_names(weights: Mapping[str, float] | None, objectives: tuple[str, ...]) -> None:
    unknown = sorted(set(weights or ()) - set(objectives))
    if unknown:
        raise ValueError(
            f"weights names {', '.join(map(repr, unknown))}, and the reward has {', '.join(map(repr, objectives))}."
        )


def _checked(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value}: it must be a finite number from 0 on.")
    return float(value)


@contextmanager
def reward_guidance(
    pipeline: DiffusionPipeline,
    reward: Reward,
    *,
    weights: Mapping[str, float] | None = None,
    scale: float = 1.0,
) -> Iterator[DiffusionPipeline]:
    """Samples towards a reward of noisy latents for the duration of a `with` block (Flow-NRG, arXiv 2501.13918).

    At each step the prediction after classifier-free guidance becomes `v - scale t / (1 - t) g` for flows, and
    `noise - scale sigma_t g` for others (v- and sample-predictions change as the noise that they stand for
    does): g is the gradient of `sum_k weights[k] r_k(x_t, prompt, t)` with respect to x_t. It is skipped where x_t is
    noise alone. Prompts, negative prompts, guidance scale, negative guidance, schedulers and LoRAs work as without it;
    with scale 0, or all weights 0, it is the plain sampler.

    Args:
        pipeline: Of a supported family.
        reward: A [`LatentReward`] that [`train_latent_reward`] made, or a function of [`NoisyInputs`] that returns one
            number for each sample, or several objectives by name. It must rate noisy latents: one of clean samples
            misleads at early steps.
        weights: Of the objectives, by name, finite and from 0 on; an objective that is not named counts nothing.
            Default: 1 for each.
        scale: Strength w, finite and from 0 on: samples come from about `p(x) exp(w r(x))`, p the model's
            distribution. The paper has 100 for its reward of videos; what is right depends on the reward.

    Yields:
        The pipeline, which is left as it was afterwards.

    Raises:
        ValueError: A pipeline that cannot be guided, a reward that is for another one, weights or a scale out of their
            range, an objective that the reward lacks, or, while sampling, a gradient that is not finite.
        TypeError: The scheduler's noise process is not known.

    Example:

    ```python
    with reward_guidance(pipeline, reward, scale=2.0):
        image = pipeline("a cat", guidance_scale=5.0).images[0]
    ```
    """
    scale = _checked("scale", scale)
    if weights is not None:
        weights = {name: _checked(f"weights[{name!r}]", value) for name, value in weights.items()}
    if isinstance(reward, TrainedReward):
        _check_names(weights, reward.objectives)
        reward.check(pipeline)
    guidance = RewardGuidance(pipeline, reward, weights, scale)
    try:
        yield pipeline
        guidance.check_used()
    finally:
        guidance.remove()


def reward_guidance_of(pipeline: DiffusionPipeline) -> RewardGuidance | None:
    """The reward guidance that is active in a pipeline."""
    return vars(getattr(pipeline, denoiser_name(pipeline))).get(_MARK)

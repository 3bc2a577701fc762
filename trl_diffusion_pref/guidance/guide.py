"""Classifier-free guidance with a negative model, inside an ordinary diffusers pipeline."""

import functools
import inspect
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ..architecture import different_parameters
from ..fingerprint import rounded_fingerprints
from .adapters import NegativeAdapter
from .halves import join_halves, take_half
from .second_denoiser import merged_denoiser
from .sources import NegativeLoRA, NegativeWeights, denoiser_name, read_negative


# Not accelerate's, which needs an accelerator to have been made.
logger = logging.getLogger(__name__)
_MARK = "_negative_guidance"
# How pipelines call their denoiser, and whether they do, is each one's own affair: these are tested. Batched: one
# call on [negative; positive]. Named: two calls, told apart by diffusers' `cache_context`.
_BATCHED = (
    "AudioLDM2Pipeline",
    "CogVideoXPipeline",
    "PixArtSigmaPipeline",
    "SanaPipeline",
    "StableAudioPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
)
_NAMED = ("FluxPipeline", "QwenImagePipeline", "WanPipeline")


class NegativeGuidance:
    """A negative model at work in a pipeline; made by [`add_negative_guidance`].

    The pipeline's own code stays as it is: only its denoiser's `forward` is wrapped. In a call on [negative; positive]
    each half is computed by itself, with the adapters or the denoiser that belong to it; where the pipeline calls
    twice, each call is told apart by the name that the pipeline gives it (diffusers' `cache_context`).
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        negative: NegativeLoRA | NegativeWeights,
        base: nn.Module | None,
        alpha: float,
        beta: float,
        batched: bool,
    ) -> None:
        self.pipeline, self.batched = pipeline, batched
        self.denoiser: nn.Module = getattr(pipeline, denoiser_name(pipeline))
        whole = isinstance(negative, NegativeWeights)
        # Without a base there is no positive offset but the adapters', which are scaled where they are.
        needs_second = whole or (base is not None and alpha != 1.0)
        second = self.denoiser
        if needs_second:
            second = merged_denoiser(self.denoiser, base, negative.denoiser if whole else None, alpha, beta)
        if not whole:
            beta *= negative.scale
        self._adapters = NegativeAdapter(pipeline, second, None if whole else negative, alpha, beta)
        self.second = second if needs_second else None
        if self.second is not None:
            self._adapters.use_negative()
        self._call: str | None = None
        self._install()

    # ---- Wrapping ------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        denoiser = self.denoiser
        own = vars(denoiser)
        self._own_before = {name: own[name] for name in ("forward", "cache_context") if name in own}
        # Offloading wraps too, keeps what it wrapped under this name, and is taken off and put on again after each
        # picture. Ours goes inside, where it survives that.
        place = "_old_forward" if "_old_forward" in own else "forward"
        original = getattr(denoiser, place)
        # The signature stays readable: pipelines look at it.
        self._wrapped = functools.update_wrapper(functools.partial(self._forward, original), original)
        setattr(denoiser, place, self._wrapped)
        if hasattr(denoiser, "cache_context"):
            denoiser.cache_context = functools.partial(self._cache_context, denoiser.cache_context)
        setattr(denoiser, _MARK, self)

    def remove(self) -> None:
        """Restores the pipeline exactly; does nothing the second time."""
        denoiser = self.denoiser
        if vars(denoiser).get(_MARK) is not self:
            return
        own = vars(denoiser)
        if own.get("_old_forward") is self._wrapped:
            denoiser._old_forward = self._wrapped.args[0]
        elif own.get("forward") is self._wrapped:
            del denoiser.forward
        own.pop("cache_context", None)
        delattr(denoiser, _MARK)
        if "cache_context" in self._own_before:
            denoiser.cache_context = self._own_before["cache_context"]
        if "forward" in self._own_before and "forward" not in own:
            denoiser.forward = self._own_before["forward"]
        if self.second is None:
            self._adapters.remove()
        self.second = None

    @contextmanager
    def _cache_context(self, original: Any, name: str, **kwargs: Any) -> Iterator[None]:
        before, self._call = self._call, name
        try:
            with original(name, **kwargs):
                yield
        finally:
            self._call = before

    # ---- One call ------------------------------------------------------------------------------------------------

    def _forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.batched:
            return self._negative(original, args, kwargs) if self._call == "uncond" else original(*args, **kwargs)
        sample = _sample(args, kwargs)
        if not self._is_both_sides(sample):
            return original(*args, **kwargs)
        batch = len(sample)
        halves = [(take_half(args, half, batch), take_half(kwargs, half, batch)) for half in (0, 1)]
        negative = self._negative(original, *halves[0])
        return join_halves(negative, original(*halves[1][0], **halves[1][1]))

    def _is_both_sides(self, sample: Tensor) -> bool:
        """Whether a call is on [negative; positive], which are the same latents twice.

        Some pipelines do not say whether guidance is on, and some call once more on one side (Stable Diffusion 3 with
        skipped layers).
        """
        if len(sample) % 2 or not getattr(self.pipeline, "do_classifier_free_guidance", True):
            return False
        one, other = sample.chunk(2)
        return torch.equal(one, other)

    def _negative(self, original: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.second is None:
            self._adapters.use_negative()
            try:
                return original(*args, **kwargs)
            finally:
                self._adapters.use_users()
        self.second.to(_sample(args, kwargs).device)
        if self.second.dtype != self.denoiser.dtype:
            self.second.to(self.denoiser.dtype)
        try:
            return self.second(*args, **kwargs)
        finally:
            if hasattr(self.denoiser, "_hf_hook"):
                # The pipeline is short of memory: what it keeps off the device between calls, this does too.
                self.second.to("cpu")


def add_negative_guidance(
    pipeline: DiffusionPipeline,
    negative: str | os.PathLike | DiffusionPipeline | nn.Module,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    base: str | os.PathLike | DiffusionPipeline | nn.Module | None = None,
    batches_both_sides: bool | None = None,
) -> NegativeGuidance:
    """Makes a pipeline use a negative model as the unconditional side of its guidance until `remove()` is called.

    Predictions become `neg + s (pos - neg)` with the pipeline's guidance scale s, and the negative side's weights are
    `theta + alpha (theta_pos - theta) + beta delta` (Diffusion-NPO, arXiv 2505.11245): theta the base, theta_pos what
    the pipeline holds with its active LoRAs, delta the negative model's offset from the base.

    With a LoRA as negative there is no second denoiser in memory, unless the positive side is fully tuned and alpha is
    not 1. Prompts, negative prompts, guidance_rescale, callbacks, schedulers and offloading work as without it; with
    guidance off it is the plain pipeline.

    Args:
        pipeline: A diffusers pipeline with classifier-free guidance. Another pipeline that shares its denoiser is not
            served: give that one a negative model of its own after removing this one.
        negative: A LoRA (file, folder, Hub id), full weights (folder or Hub id of a denoiser or pipeline), an output
            folder or checkpoint of a trainer, a loaded pipeline or denoiser.
        alpha: How much of the positive offset the negative side has, 0 to 1. Needs `base` to act on a positive side
            that is not made of LoRAs.
        beta: How much of the negative offset, 0 to 1; above 1 exaggerates it.
        base: theta, where the pipeline's denoiser was fully tuned and either alpha is not 1 or `negative` is no LoRA.
        batches_both_sides: For pipelines that are not known: whether one call of the denoiser gets [negative;
            positive] (True), or each side has a call of its own, inside `cache_context("cond")` and
            `cache_context("uncond")` (False).

    Returns:
        The guidance at work, with `remove()`.

    Raises:
        ValueError: A negative model that does not fit, a pipeline without guidance or that is guided already, a fused
            LoRA, alpha or beta that is not a number from 0 on.
        TypeError: Not a pipeline, or something that is no model as negative.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value}: it must be a number from 0 on; the paper uses 0 to 1.")
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    if batches_both_sides is None:
        batches_both_sides = _known_layout(pipeline)
    _check_guidable(pipeline, denoiser)
    base_denoiser = None if base is None else _whole_denoiser(base, pipeline, "base")
    read = read_negative(negative, pipeline)
    if isinstance(read, NegativeWeights):
        _check_architecture(denoiser, read.denoiser, read.name)
    _warn_of_another_base(base_denoiser or denoiser, pipeline, base, read)
    return NegativeGuidance(pipeline, read, base_denoiser, float(alpha), float(beta), batches_both_sides)


@contextmanager
def negative_guidance(
    pipeline: DiffusionPipeline,
    negative: str | os.PathLike | DiffusionPipeline | nn.Module,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    base: str | os.PathLike | DiffusionPipeline | nn.Module | None = None,
    batches_both_sides: bool | None = None,
) -> Iterator[DiffusionPipeline]:
    """[`add_negative_guidance`] for the duration of a `with` block, which then leaves the pipeline as it was.

    Arguments and errors are those of [`add_negative_guidance`].

    ```python
    with negative_guidance(pipeline, "me/my-negative-lora"):
        image = pipeline("a cat", guidance_scale=5.0).images[0]
    ```
    """
    guidance = add_negative_guidance(pipeline, negative, alpha, beta, base=base, batches_both_sides=batches_both_sides)
    try:
        yield pipeline
    finally:
        guidance.remove()


def _sample(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The noisy latents of a denoiser's call."""
    return args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]


def _known_layout(pipeline: DiffusionPipeline) -> bool:
    name = type(pipeline).__name__
    if name in _BATCHED or name in _NAMED:
        return name in _BATCHED
    raise ValueError(
        f"It is not known how a {name} calls its denoiser for guidance; known are "
        f"{', '.join(sorted(_BATCHED + _NAMED))}. Look into its __call__ and pass batches_both_sides=True where "
        "one call gets [negative; positive] stacked, or False where each side has a call of its own within "
        'cache_context("cond") and cache_context("uncond").'
    )


def _check_guidable(pipeline: DiffusionPipeline, denoiser: nn.Module) -> None:
    if not isinstance(denoiser, ModelMixin):
        raise ValueError(
            f"The pipeline's {denoiser_name(pipeline)} is wrapped in a {type(denoiser).__name__}. Put the model "
            "itself there: PeftModel.get_base_model() keeps the adapter in it; compile after the guidance was "
            "added, or not at all."
        )
    if hasattr(denoiser, _MARK):
        raise ValueError("This pipeline has a negative model already. Call remove() on it first.")
    parameters = inspect.signature(type(pipeline).__call__).parameters
    distilled = denoiser.config.get("time_cond_proj_dim") is not None
    if distilled or "negative_prompt" not in parameters:
        raise ValueError(
            f"This {type(pipeline).__name__} has no classifier-free guidance (its denoiser is distilled to draw "
            "without), so there is no negative side. Use the model that it was distilled from."
        )
    if getattr(pipeline, "transformer_2", None) is not None:
        raise ValueError(
            f"This {type(pipeline).__name__} has two transformers, one per range of noise, and a negative model is "
            "of one."
        )
    if getattr(denoiser, "is_cache_enabled", False):
        raise ValueError(
            "The denoiser caches what it computed at earlier steps, which the two sides would share. Call "
            f"pipeline.{denoiser_name(pipeline)}.disable_cache() first."
        )
    if "true_cfg_scale" in parameters:
        logger.warning(
            f"In a {type(pipeline).__name__} guidance_scale is an input of a distilled denoiser. The negative "
            "model acts only where you pass true_cfg_scale above 1 and a negative_prompt."
        )


def _whole_denoiser(given: Any, pipeline: DiffusionPipeline, what: str) -> nn.Module:
    read = read_negative(given, pipeline)
    if not isinstance(read, NegativeWeights):
        raise ValueError(f"{what} is a LoRA ({read.name}), and a whole denoiser is needed.")
    _check_architecture(getattr(pipeline, denoiser_name(pipeline)), read.denoiser, read.name)
    return read.denoiser


def _check_architecture(denoiser: nn.Module, other: nn.Module, name: str) -> None:
    different = different_parameters(denoiser, other)
    if different:
        raise ValueError(
            f"{name} has another architecture ({type(other).__name__}) than the pipeline's {type(denoiser).__name__}: "
            f"{len(different)} parameters differ, first {different[0]}. Train the negative model from the same base."
        )


def _warn_of_another_base(
    theta: nn.Module, pipeline: DiffusionPipeline, base: Any, negative: NegativeLoRA | NegativeWeights
) -> None:
    stored = (negative.record or {}).get("base_fingerprint_rounded")
    if not stored:
        return
    own = rounded_fingerprints(theta)
    # The same weights in another precision agree in one of the two.
    if all(own[precision] != value for precision, value in stored.items()):
        name = base if isinstance(base, (str, os.PathLike)) else getattr(pipeline, "name_or_path", None)
        trained_from = negative.record["base_model"] or "a local pipeline"
        logger.warning(
            f"The negative model {negative.name} was trained from {trained_from} "
            f"(fingerprint {negative.record['base_fingerprint']}), and the pipeline is {name or 'another one'}, whose "
            "weights differ. Pass base= where the pipeline was tuned from that model; else expect poor pictures."
        )

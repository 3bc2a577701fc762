"""Classifier-free guidance with a negative model, inside an ordinary diffusers pipeline."""

import inspect
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ..families.base import GuidanceLayout
from .adapters import NegativeAdapter
from .calls import UNCONDITIONAL, WrappedForward, calling_frame, is_both_sides, passes_the_negative_prompt
from .checks import MARK, check_guidable, known_layout, warn_of_another_base
from .halves import join_halves, take_half
from .second_denoiser import merged_denoiser
from .sources import Model, Negative, denoiser_names, families, guided_family, read_negatives


class NegativeGuidance:
    """A negative model that is active in a pipeline; made by [`add_negative_guidance`].

    The pipeline's own code stays as it is: only its denoiser's `forward` is wrapped. In a call on both sides each half
    is computed by itself, with the adapters or the denoiser that belong to it. Where the pipeline calls
    twice, the name that it gives each call (diffusers' `cache_context`) says which side it is, or, without names, that
    it passes its `negative_prompt_embeds`. Threads may sample at once as far as the pipeline itself allows it: a lock
    lets them take turns call by call.

    Attributes:
        alpha, beta: The strengths, from 0 on. A new value acts from the denoiser's next call on. Setting alpha raises
            where `base` was given, and beta where the negative model is full weights: they are merged then.
        second: The second denoiser; None where the negative side is computed by the pipeline's own.
        others: The same of the pipeline's further denoisers, for other ranges of noise; they follow this one.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        negative: Negative,
        base: nn.Module | None,
        alpha: float,
        beta: float,
        layout: GuidanceLayout,
    ) -> None:
        self.pipeline, self.layout = pipeline, layout
        self.denoiser: ModelMixin = getattr(pipeline, negative.attribute)
        self.others: list[NegativeGuidance] = []
        family = guided_family(pipeline)
        # In an unknown pipeline every name counts that any family shares.
        known = [family] if family else families()
        self._shared = tuple(name for each in known for name in each.shared_arguments)
        self._batch_second = tuple(name for each in known for name in each.batch_second)
        self._first_argument = list(inspect.signature(type(self.denoiser).forward).parameters)[1]
        self.alpha, self.beta = alpha, beta
        self._merged = {"alpha": base is not None, "beta": negative.denoiser is not None}
        self.second: ModelMixin | None = None
        # Without a base there is no positive offset but the adapters', which are scaled where they are.
        if negative.denoiser is not None or (base is not None and alpha != 1.0):
            self.second = merged_denoiser(self.denoiser, base, negative.denoiser, alpha, beta)
        self._adapter = NegativeAdapter(pipeline, self.second or self.denoiser, negative)
        # Switching adapters changes the denoiser for all threads.
        self._lock = threading.RLock()
        self._wrapped = WrappedForward(self.denoiser, self._forward)
        setattr(self.denoiser, MARK, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "NegativeGuidance":
        raise TypeError(
            "A denoiser with negative guidance cannot be copied. Call remove() first, copy, and add it again."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("alpha", "beta"):
            if name in vars(self) and self._merged[name]:
                raise AttributeError(
                    f"{name} is part of merged weights here and cannot be changed. Call remove(), and "
                    f"add_negative_guidance(..., {name}={value}) again."
                )
            value = _checked(name, value)
        super().__setattr__(name, value)
        if name in ("alpha", "beta"):
            for other in vars(self).get("others", ()):
                setattr(other, name, value)

    def remove(self) -> None:
        """Restores the pipeline exactly; does nothing the second time."""
        for other in self.others:
            other.remove()
        if vars(self.denoiser).get(MARK) is not self:
            return
        self._wrapped.remove()
        delattr(self.denoiser, MARK)
        if self.second is None:
            self._adapter.remove()
        self.second = None

    # ---- One call ------------------------------------------------------------------------------------------------

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = calling_frame()
        caller = None if frame is None else frame.f_locals["self"]
        if caller is not None and type(caller) is not type(self.pipeline):
            self._check_layout(caller)
        with self._lock:
            if self.layout == "separate":
                name = self._wrapped.call
                negative = passes_the_negative_prompt(frame, args, kwargs) if name is None else name in UNCONDITIONAL
                return self._negative(original, args, kwargs) if negative else original(*args, **kwargs)
            sample = self._sample(args, kwargs)
            parts, lists = 3 if self.layout == "positive_of_three" else 2, isinstance(sample, list)
            if not is_both_sides(sample, parts, caller):
                return original(*args, **kwargs)
            count = len(sample) // parts
            how: dict[str, Any] = {"lists": lists, "first": count, "batch_second": self._batch_second}
            first, second = (take_half((args, kwargs), half, len(sample), self._shared, **how) for half in (0, 1))
            if self.layout != "batched":
                return join_halves(original(*first[0], **first[1]), self._negative(original, *second))
            return join_halves(self._negative(original, *first), original(*second[0], **second[1]))

    def _sample(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | list[Tensor]:
        """The noisy latents of a denoiser's call; of some denoisers a list with one tensor per sample."""
        return args[0] if args else kwargs[self._first_argument]

    def _negative(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._adapter.negative_side(self.alpha, self.beta):
            if self.second is None:
                return original(*args, **kwargs)
            self.second.to(self._sample(args, kwargs)[0].device)
            if self.second.dtype != self.denoiser.dtype:
                self.second.to(self.denoiser.dtype)
            try:
                return self.second(*args, **kwargs)
            finally:
                if hasattr(self.denoiser, "_hf_hook"):
                    # The pipeline is short of memory: what it keeps off the device between calls, this does too.
                    self.second.to("cpu")

    def _check_layout(self, caller: DiffusionPipeline) -> None:
        family = guided_family(caller)
        if family is None or family.guidance_layout != self.layout:
            raise RuntimeError(
                f"A {type(caller).__name__} shares the denoiser of a guided {type(self.pipeline).__name__}, and it is "
                "not known to call the denoiser in the same way. Remove the guidance before using it, or load it with "
                "a denoiser of its own."
            )


def _checked(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value}: it must be a number from 0 on; the paper uses 0 to 1.")
    return float(value)


def add_negative_guidance(
    pipeline: DiffusionPipeline,
    negative: Model,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    base: Model | None = None,
    batches_both_sides: bool | None = None,
) -> NegativeGuidance:
    """Makes a pipeline use a negative model as the unconditional side of its guidance until `remove()` is called.

    Predictions become `neg + s (pos - neg)` with the pipeline's guidance scale s, and the negative side's weights are
    `theta + alpha (theta_pos - theta) + beta delta` (Diffusion-NPO, arXiv 2505.11245): theta the base, theta_pos what
    the pipeline holds with its active LoRAs, delta the negative model's offset from the base.

    With a LoRA as negative there is no second denoiser in memory, unless the positive side is fully tuned and alpha is
    not 1. Prompts, negative prompts, guidance_rescale, callbacks, schedulers and offloading work as without it; with
    guidance off it is the plain pipeline. A LoRA may be loaded, scaled and unloaded meanwhile, but not fused.

    The guidance belongs to the denoiser: another pipeline that shares it is guided as well whenever its own guidance
    is on, and raises where it calls the denoiser in another way or one that is not known.

    Args:
        pipeline: A diffusers pipeline with classifier-free guidance.
        negative: A LoRA (file, folder, Hub id), full weights (folder or Hub id of a denoiser or pipeline), an output
            folder or checkpoint of a trainer, a loaded pipeline or denoiser.
        alpha: How much of the positive offset the negative side has, 0 to 1. Needs `base` to act on a positive side
            that is not made of LoRAs.
        beta: How much of the negative offset, 0 to 1; above 1 exaggerates it.
        base: theta, where the pipeline's denoiser was fully tuned and either alpha is not 1 or `negative` is no LoRA.
        batches_both_sides: For pipelines of unknown classes: whether one call of the denoiser gets [negative;
            positive] (True), or each side has a call of its own (False), inside `cache_context("cond")` and
            `cache_context("uncond")`, or the negative one with the call's own variable `negative_prompt_embeds`.

    Returns:
        The active guidance, with `remove()`; its `alpha` and `beta` can be set.

    Raises:
        ValueError: A negative model that does not fit, a pipeline without guidance or that is guided already, a fused
            LoRA, alpha or beta that is not a number from 0 on.
        TypeError: Not a pipeline, or something that is no model as negative.
    """
    alpha, beta = _checked("alpha", alpha), _checked("beta", beta)
    names = denoiser_names(pipeline)
    layout: GuidanceLayout = "batched" if batches_both_sides else "separate"
    for each in names:
        check_guidable(pipeline, each)
    if batches_both_sides is None:
        layout = known_layout(pipeline)
    theta: dict[str, nn.Module] = {}
    name = getattr(pipeline, "name_or_path", None) or "another one"
    for whole in [] if base is None else read_negatives(base, pipeline):
        name = whole.name
        if whole.denoiser is None:
            raise ValueError(f"base is a LoRA ({name}), and a whole denoiser is needed.")
        theta[whole.attribute] = whole.denoiser
    reads = read_negatives(negative, pipeline)
    # One record may be of several denoisers.
    for read in {str(read.record): read for read in reads}.values():
        warn_of_another_base({each: theta.get(each, getattr(pipeline, each)) for each in names}, name, read)
    guidances: list[NegativeGuidance] = []
    try:
        for read in reads:
            guidances.append(NegativeGuidance(pipeline, read, theta.get(read.attribute), alpha, beta, layout))
    except BaseException:
        for guidance in guidances:
            guidance.remove()
        raise
    first, *first.others = guidances
    return first


@contextmanager
def negative_guidance(
    pipeline: DiffusionPipeline,
    negative: Model,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    base: Model | None = None,
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


def guidance_of(pipeline: DiffusionPipeline) -> NegativeGuidance | None:
    """The negative guidance that is active in a pipeline."""
    found = [vars(getattr(pipeline, name)).get(MARK) for name in denoiser_names(pipeline)]
    # The one that the others follow.
    return next((each for each in found if each is not None), None)

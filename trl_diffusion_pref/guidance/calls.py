"""The calls that a pipeline makes of its denoiser: taking them over, and which side of the guidance each is on."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor


# How pipelines name their calls on the unconditional side; the second of those with a guider.
UNCONDITIONAL = ("uncond", "pred_uncond")


class WrappedForward:
    """Puts a function in the place of a denoiser's `forward`, and knows how the pipeline names each call.

    Args:
        denoiser: Its methods `forward` and `cache_context` are replaced until `remove()` is called.
        forward: Called in its place, with the original `forward` before the call's own arguments.
    """

    def __init__(self, denoiser: ModelMixin, forward: Callable[..., Any]) -> None:
        self.denoiser = denoiser
        # Which call it is belongs to the thread that makes it.
        self._thread = threading.local()
        own = vars(denoiser)
        # Offloading wraps too, keeps what it wrapped under this name, and is taken off and put on again after each
        # image. This wrapper goes inside, where it survives that.
        place = "_old_forward" if "_old_forward" in own else "forward"
        replaced = ("cache_context",) if "_old_forward" in own else ("forward", "cache_context")
        self._own_before = {name: own[name] for name in replaced if name in own}
        original = getattr(denoiser, place)
        # The signature stays readable: pipelines look at it.
        self._wrapped = functools.partial(forward, original)
        functools.update_wrapper(self._wrapped, original)
        setattr(denoiser, place, self._wrapped)
        if hasattr(denoiser, "cache_context"):
            own["cache_context"] = functools.partial(self._cache_context, denoiser.cache_context)

    @property
    def call(self) -> str | None:
        """The name that the pipeline gave this thread's call (diffusers' `cache_context`), if it gave one."""
        return getattr(self._thread, "call", None)

    @contextmanager
    def _cache_context(self, original: Callable[..., Any], name: str, **kwargs: Any) -> Iterator[None]:
        before, self._thread.call = self.call, name
        try:
            with original(name, **kwargs):
                yield
        finally:
            self._thread.call = before

    def remove(self) -> None:
        """Restores the denoiser exactly."""
        own = vars(self.denoiser)
        if own.get("_old_forward") is self._wrapped:
            self.denoiser._old_forward = self._wrapped.args[0]
        elif own.get("forward") is self._wrapped:
            del self.denoiser.forward
        own.pop("cache_context", None)
        for name, value in self._own_before.items():
            own.setdefault(name, value)


def calling_frame() -> FrameType | None:
    """The frame of the pipeline's `__call__` in this thread; None where the denoiser is called directly."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame
        frame = frame.f_back
    return None


def passes_the_negative_prompt(frame: FrameType | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a pipeline that names neither of its two calls passes the negative prompt in this one.

    All pipelines of diffusers keep it in a variable `negative_prompt_embeds` of their `__call__`.

    Raises:
        ValueError: Both sides have the same embeddings, so that nothing tells them apart.
    """
    values = {} if frame is None else frame.f_locals
    negative = values.get("negative_prompt_embeds")
    if negative is None or not any(value is negative for value in (*args, *kwargs.values())):
        return False
    if not getattr(values["self"], "do_classifier_free_guidance", True):
        return False
    if negative is values.get("prompt_embeds"):
        raise ValueError(
            "prompt_embeds and negative_prompt_embeds are one tensor, and nothing else tells on which side of the "
            "guidance this pipeline calls its denoiser. Pass negative_prompt_embeds=prompt_embeds.clone()."
        )
    return True


def is_both_sides(sample: Tensor | list[Tensor], parts: int, caller: DiffusionPipeline | None) -> bool:
    """Whether a call is on both sides of the guidance: the same latents twice, or on two of three parts.

    Some pipelines do not say whether guidance is on, and some call once more on one side (Stable Diffusion 3 with
    skipped layers).
    """
    if len(sample) % parts or not getattr(caller, "do_classifier_free_guidance", True):
        return False
    count = len(sample) // parts
    first, second = sample[:count], sample[count : 2 * count]
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return all(map(torch.equal, first, second))

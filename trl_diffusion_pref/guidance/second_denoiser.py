"""The whole second denoiser of the negative side, where a LoRA in the first cannot give it."""

import copy

import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import ModelMixin
from torch import nn

from ..fingerprint import is_quantised, own_weights


def merged_denoiser(
    positive: ModelMixin, base: nn.Module | None, negative: nn.Module | None, alpha: float, beta: float
) -> ModelMixin:
    """A copy of the positive denoiser with `theta + alpha (theta_pos - theta) + beta (theta_neg - theta)`.

    Its adapters, if it has any, are copied as they are. Sums are taken in float32, one parameter at a time.

    Args:
        positive: theta_pos.
        base: theta; None where the positive denoiser's own weights are the base's.
        negative: theta_neg; None where the negative offset is a LoRA, which is added elsewhere.

    Raises:
        ValueError: The positive denoiser carries hooks that would be copied as references to itself, or one of them
            is quantised.
    """
    quantised = [type(each).__name__ for each in (positive, base, negative) if each is not None and is_quantised(each)]
    if quantised:
        raise ValueError(
            f"Quantised weights ({quantised[0]}) cannot be merged with an offset, as the negative side needs here. "
            "Use a LoRA as negative, without base; or load the models without quantization."
        )
    if any(getattr(part, "_diffusers_hook", None) and part._diffusers_hook.hooks for part in positive.modules()):
        raise ValueError(
            f"The pipeline's {type(positive).__name__} carries hooks of diffusers (group offloading or layerwise "
            "casting), with which it cannot be copied for the negative side. Switch them on after the guidance, "
            "or use a LoRA as negative."
        )
    # A denoiser that is kept off the device carries hooks, and a copy's would move the original.
    second = remove_hook_from_module(copy.deepcopy(positive), recurse=True)
    bases, negatives = (own_weights(model) if model is not None else {} for model in (base, negative))
    with torch.no_grad():
        for name, value in own_weights(second).items():
            if value.is_floating_point():
                start = (bases[name] if bases else value).to(value.device).float()
                offset = negatives[name].to(value.device).float() - start if negatives else 0.0
                value.copy_(start + alpha * (value.float() - start) + beta * offset)
    return second.eval().requires_grad_(False)

"""The whole second denoiser of the negative side, where a LoRA in the first cannot give it."""

import copy

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn


def merged_denoiser(
    positive: nn.Module, base: nn.Module | None, negative: nn.Module | None, alpha: float, beta: float
) -> nn.Module:
    """A copy of the positive denoiser with `theta + alpha (theta_pos - theta) + beta (theta_neg - theta)`.

    Its adapters, if it has any, are copied as they are. Sums are taken in float32, one parameter at a time.

    Args:
        positive: theta_pos.
        base: theta; None where the positive denoiser's own weights are the base's.
        negative: theta_neg; None where the negative offset is a LoRA, which is added elsewhere.
    """
    # A denoiser that is kept off the device carries hooks, and a copy's would move the original.
    second = remove_hook_from_module(copy.deepcopy(positive), recurse=True)
    starts = None if base is None else base.state_dict()
    ends = None if negative is None else negative.state_dict()
    with torch.no_grad():
        for name, value in second.state_dict().items():
            if ".lora_" in name or not value.is_floating_point():
                continue
            own = name.replace(".base_layer", "")
            value.copy_(
                _merge(
                    value, None if starts is None else starts[own], None if ends is None else ends[own], alpha, beta
                )
            )
    return second.eval().requires_grad_(False)


def _merge(positive: Tensor, base: Tensor | None, negative: Tensor | None, alpha: float, beta: float) -> Tensor:
    place = positive.device
    positive = positive.float()
    start = positive if base is None else base.to(place).float()
    merged = start + alpha * (positive - start)
    if negative is not None:
        merged = merged + beta * (negative.to(place).float() - start)
    return merged

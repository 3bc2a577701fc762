"""Layers of bitsandbytes without values: what they store, and what they hold while they compute."""

import functools
import math
from typing import Any, cast

import torch
from accelerate.hooks import remove_hook_from_module
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear
from torch import Tensor, nn
from torch.nn import functional

from ..families.denoisers import parts_of
from ..fingerprint import is_quantised
from ..training.config import DiffusionPreferenceConfig
from ..training.quantised import bitsandbytes_config
from .autocast import DEVICE_TYPES


# Weights that share a scale, and the table of the values that 4 bits stand for.
_BLOCK, _TABLE = 64, 16


def quantised_layers(module: nn.Module) -> list[Linear4bit | Linear8bitLt]:
    """bitsandbytes' layers; those of a LoRA around them have the same names, and are other classes."""
    return [layer for layer in module.modules() if isinstance(layer, (Linear4bit, Linear8bitLt))]


def number_of_parameters(module: nn.Module) -> int:
    """How many there are, of which a byte of a quantised weight may hold two."""
    hidden = sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in quantised_layers(module))
    return sum(parameter.numel() for parameter in module.parameters()) + hidden


def scales_of(layer: Linear4bit | Linear8bitLt) -> list[Tensor]:
    """What a quantised layer keeps beside its weight and bias; none where it is not quantised yet."""
    if isinstance(layer, Linear8bitLt):
        # The first call moves them from the weight to the state.
        found = [getattr(layer.weight, "SCB", None), layer.state.SCB]
    else:
        state = getattr(layer.weight, "quant_state", None)
        parts = [state, getattr(state, "state2", None)]
        found = [getattr(part, name, None) for part in parts for name in ("absmax", "code")]
        found.append(getattr(state, "offset", None))
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def check_countable(base: nn.Module) -> None:
    """Raises for a quantised denoiser whose layers are not bitsandbytes'.

    Raises:
        ValueError: Their sizes are not known.
    """
    if is_quantised(base) and not quantised_layers(base):
        raise ValueError(
            f"This {type(base).__name__} is quantised, and not by bitsandbytes: what its layers hold is not known. "
            "Estimate it without quantization, or with quantize='nf4' or 'int8'."
        )


def memo_without_values(module: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: weights of quantised layers on the meta device, without what belongs to their values."""
    memo: dict[int, Any] = {}
    for layer in quantised_layers(module):
        weight = layer.weight
        if isinstance(layer, Linear4bit):
            memo[id(weight)] = _four_bit(layer, torch.empty_like(weight.data, device="meta"))
            memo[id(getattr(weight, "quant_state", None))] = memo[id(layer.quant_state)] = None
        else:
            memo[id(weight)] = _eight_bit(torch.empty_like(weight.data, device="meta"))
            memo[id(layer.state.CB)] = memo[id(layer.state.SCB)] = None
    return memo


def _four_bit(layer: Linear4bit, stored: Tensor) -> Params4bit:
    weight = cast(Params4bit, layer.weight)
    return Params4bit(
        stored,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        bnb_quantized=True,
    )


def _eight_bit(stored: Tensor) -> Int8Params:
    return Int8Params(stored, requires_grad=False, has_fp16_weights=False)


def keep_without_values(copied: nn.Module, original: nn.Module) -> None:
    """Gives the quantised layers of a copy made with `memo_without_values` their scales, and what computes them."""
    # What is loaded on a device is bound to it by hooks.
    remove_hook_from_module(copied, recurse=True)
    for layer, before in zip(quantised_layers(copied), quantised_layers(original), strict=True):
        _hold(layer, sum(tensor.nbytes for tensor in scales_of(before)))


def quantise(base: nn.Module, args: DiffusionPreferenceConfig) -> None:
    """Makes of a denoiser on the meta device what loading with `args.quantize` makes of it."""
    config = bitsandbytes_config(args)
    for part in parts_of(base, "").values():
        dtypes = {name: layer.weight.dtype for name, layer in part.named_modules() if isinstance(layer, nn.Linear)}
        kept = part._keep_in_fp32_modules or []
        replace_with_bnb_linear(
            part, modules_to_not_convert=[kept] if isinstance(kept, str) else list(kept), quantization_config=config
        )
        for name, layer in part.named_modules():
            if not isinstance(layer, (Linear4bit, Linear8bitLt)):
                continue
            weights = layer.in_features * layer.out_features
            if isinstance(layer, Linear4bit):
                stored = torch.empty(math.ceil(weights / 2), 1, dtype=torch.uint8, device="meta")
                layer.weight = _four_bit(layer, stored)
                scales = 4 * (math.ceil(weights / _BLOCK) + _TABLE)
            else:
                layer.weight = _eight_bit(torch.empty_like(layer.weight.data, dtype=torch.int8))
                scales = 4 * layer.out_features
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.to(dtypes[name]), requires_grad=False)
            _hold(layer, scales)
    name = "is_loaded_in_8bit" if args.quantize == "int8" else "is_loaded_in_4bit"
    for module in {base, *parts_of(base, "").values()}:
        setattr(module, name, True)


def _hold(layer: Linear4bit | Linear8bitLt, scales: int) -> None:
    layer.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device="meta"))
    vars(layer)["forward"] = functools.partial(_forward, layer)


def _forward(layer: Linear4bit | Linear8bitLt, x: Tensor) -> Tensor:
    """What bitsandbytes holds for the result: 4-bit layers compute in a dtype of their own."""
    size = (layer.out_features, layer.in_features)
    for device_type in DEVICE_TYPES:
        # As `prepare_layers` does, which asks for the device of the input: here it is a CPU's.
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
    if isinstance(layer, Linear8bitLt):
        return _Dequantised.apply(x, size, layer.bias, True)
    result = _Dequantised.apply(x.to(layer.compute_dtype or x.dtype), size, layer.bias, False)
    return result.to(x.dtype)


class _Dequantised(torch.autograd.Function):
    """A product with weights that exist whole for its duration alone, forward and backward.

    8-bit layers keep their input for the backward pass, though only its dtype is read there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, int], bias: Tensor | None, keeps_input: bool) -> Tensor:
        ctx.size, ctx.dtype, ctx.x = size, x.dtype, x if keeps_input else None
        return functional.linear(x, x.new_empty(size), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0].to(ctx.dtype)
        return grad @ grad.new_empty(ctx.size), None, None, None

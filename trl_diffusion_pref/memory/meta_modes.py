"""Stands in for what the meta device lacks and training has: fused attention and autocast."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


def _functions(names: str) -> frozenset[Callable]:
    """All of these names: torch's functions, its tensors' methods and those of `torch.nn.functional`."""
    places = (torch, Tensor, functional)
    return frozenset(getattr(place, name) for name in names.split() for place in places if hasattr(place, name))


# Of autocast's lists (docs.pytorch.org/docs/stable/amp.html#autocast-op-reference; in PyTorch's source, CUDA's are in
# aten/src/ATen/autocast_mode.h, the CPU's in autocast_mode.cpp), what a denoiser may call. A mode sees the outermost
# function alone: `interpolate`, not `upsample_nearest2d`; `einsum`, which the CPU's list has not, but its `bmm`.
_LOWER = _functions(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention "
    "matmul __matmul__ __rmatmul__ mm bmm addmm addbmm baddbmm einsum prelu"
)
_FLOAT32 = {
    "cuda": _functions(
        "layer_norm group_norm rms_norm interpolate pow __pow__ __rpow__ exp expm1 log log1p log2 log10 rsqrt "
        "reciprocal __rtruediv__ __rdiv__ softplus logsumexp mse_loss"
    ),
    # It normalises in the lower precision.
    "cpu": _functions("mse_loss prod"),
}
# These compute in float32 without a copy of what they are given.
_FLOAT32_RESULT = {
    "cuda": _functions("sum prod cumsum cumprod softmax log_softmax"),
    "cpu": frozenset[Callable](),
}

DEVICE_TYPES = tuple(_FLOAT32)


class _FusedAttention(torch.autograd.Function):
    """Keeps what the fused kernels keep: queries, keys, values, the result and one float32 per query."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        # The kernels lay heads out next to each other, so that joining them needs no copy.
        result = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        logsumexp = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, logsumexp)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class MetaModes(TorchFunctionMode):
    """Fused attention and autocast, neither of which the meta device has.

    Autocast as on another device: products in `dtype`, what needs precision in float32, and each trained weight's
    copy in `dtype` kept until the forward pass ends. Tensors in float64, and calls that name a dtype, it leaves alone.

    Args:
        dtype: Autocast's; None without it.
        device_type: Whose autocast, one of `DEVICE_TYPES`.
    """

    def __init__(self, dtype: torch.dtype | None, device_type: str) -> None:
        super().__init__()
        self.dtype, self.device_type = dtype, device_type
        self._copies: dict[int, Tensor] = {}

    def __exit__(self, *error: Any) -> None:
        self._copies.clear()
        super().__exit__(*error)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in (dtype, torch.float64):
            return value
        if not (value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(dtype)
        return self._copies[id(value)]

    def _autocast(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        dtype = self.dtype if function in _LOWER else None
        if function in _FLOAT32[self.device_type]:
            dtype = torch.float32
        if dtype is not None:
            return tree_map(lambda value: self._cast(value, dtype), (args, kwargs))
        half = function in _FLOAT32_RESULT[self.device_type] and args[0].dtype in (torch.float16, torch.bfloat16)
        if half and kwargs.get("dtype") is None:
            return args, {**kwargs, "dtype": torch.float32}
        return args, kwargs

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dtype is not None:
            args, kwargs = self._autocast(function, args, kwargs)
        if function is functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return _FusedAttention.apply(named["query"], named["key"], named["value"])
        return function(*args, **kwargs)

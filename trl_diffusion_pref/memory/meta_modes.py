"""Stands in for what the meta device lacks and training has: fused attention and autocast."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


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

    Autocast as on CUDA: products in `dtype`, normalisation and softmax in float32, and each trained weight's copy in
    `dtype` kept until the forward pass ends.
    """

    _LOWER = {
        functional.linear,
        functional.conv1d,
        functional.conv2d,
        functional.conv3d,
        functional.conv_transpose2d,
        functional.scaled_dot_product_attention,
        torch.matmul,
        torch.bmm,
        torch.mm,
        torch.addmm,
        torch.baddbmm,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.bmm,
    }
    _FLOAT32 = {
        functional.layer_norm,
        functional.group_norm,
        functional.rms_norm,
        functional.softmax,
        torch.softmax,
        Tensor.softmax,
        torch.pow,
        Tensor.pow,
        Tensor.__pow__,
        torch.rsqrt,
        torch.exp,
        Tensor.exp,
    }

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self._copies: dict[int, Tensor] = {}

    def __exit__(self, *error: Any) -> None:
        self._copies.clear()
        super().__exit__(*error)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad and dtype != torch.float32):
            return value.to(dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(dtype)
        return self._copies[id(value)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dtype is not None:
            dtype = self.dtype if function in self._LOWER else torch.float32 if function in self._FLOAT32 else None
            if dtype is not None:
                args, kwargs = tree_map(lambda value: self._cast(value, dtype), (args, kwargs))
        if function is functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return _FusedAttention.apply(named["query"], named["key"], named["value"])
        return function(*args, **kwargs)

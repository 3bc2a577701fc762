"""PyTorch's own autocast of a device that need not be there."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode, enable_reentrant_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only


DEVICE_TYPES = ("cuda", "cpu")
# Functions that are written in Python, and operators whose names say less than what they call.
_PYTHON_MODULES = ("torch.nn.functional", "torch.functional")
_REFLECTED = {"rpow", "rmatmul", "rtruediv", "rdiv"}


@cache
def _known_to_autocast() -> frozenset[str]:
    """Names of the operations that CUDA's autocast has a kernel for, as PyTorch has them registered."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    return frozenset(name.removeprefix("aten::").partition(".")[0] for name in names) | _REFLECTED


class OnDevice(Tensor):
    """A tensor that says it is on a GPU, for the length of one function call.

    Autocast's kernels, which every build of PyTorch has, cast what says so; the operations that they call arrive here,
    and run on the tensor inside, with autograd. That one says it is on the CPU, since autograd needs its device.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as PyTorch's docs do
    inside: Tensor
    copies: dict[int, Tensor]

    @staticmethod
    def __new__(cls, inside: Tensor, copies: dict[int, Tensor]) -> "OnDevice":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=torch.device("cuda:0"),
        )
        tensor.inside, tensor.copies = inside, copies
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[override]
        copies = next(leaf.copies for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, OnDevice))
        args, kwargs = tree_map_only(OnDevice, lambda tensor: tensor.inside, (args, kwargs or {}))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        cast = args[0] if function is torch.ops.aten._to_copy.default else None
        kept = cast is not None and cast.is_leaf and cast.requires_grad and cast.dtype == torch.float32
        if kept and id(cast) in copies:
            return cls(copies[id(cast)], copies)
        with enable_reentrant_dispatch():
            result = function(*args, **kwargs)
        if kept:
            copies[id(cast)] = result
        return tree_map_only(Tensor, lambda tensor: cls(tensor, copies), result)


class _OnGpu(TorchFunctionMode):
    """Gives autocast's functions tensors that say they are on a GPU, and attention a kernel that keeps no matrix."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        # What autocast makes of trained weights it keeps until its context ends.
        self.copies: dict[int, Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            return _fused_attention(self.dtype, *args, **kwargs)
        name = getattr(function, "__name__", "").strip("_")
        if name not in _known_to_autocast() and getattr(function, "__module__", "") not in _PYTHON_MODULES:
            return function(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda tensor: OnDevice(tensor, self.copies), (args, kwargs))
        return tree_map_only(OnDevice, lambda tensor: tensor.inside, function(*args, **kwargs))


def _fused_attention(
    dtype: torch.dtype | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """CUDA's memory-efficient kernel, which keeps what flash attention keeps; PyTorch asks a GPU which to take."""
    if dtype is not None and query.dtype != torch.float64:
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal)[0]


@contextmanager
def autocast(device_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    """`torch.autocast`, which switches itself off where there is no GPU; without a dtype, its kernels alone."""
    if device_type == "cpu":
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            yield
        return
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    try:
        with _OnGpu(dtype):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])

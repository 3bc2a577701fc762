"""Counts the bytes of tensors that exist at once, on the meta device too, where no allocator does."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside that exist at once; a module's own are left out.

    Args:
        module: Has its gradients counted by themselves.
        layouts: What operations gave, by what they were given. Shared by several steps, it spares most of the time:
            shapes on the meta device are found in Python, and blocks repeat.
    """

    def __init__(self, module: nn.Module, layouts: dict[tuple, list[tuple | None] | None]) -> None:
        super().__init__()
        self._layouts = layouts
        self.current = self.peak = self.gradients = self.peak_beside_gradients = 0
        tensors = [*module.parameters(), *module.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._accumulated)
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        self._with_gradient: set[int] = set()

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _accumulated(self, parameter: nn.Parameter) -> None:
        if id(parameter) not in self._with_gradient:
            self._with_gradient.add(id(parameter))
            self.gradients += parameter.grad.untyped_storage().nbytes()

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.current += size
        self.peak = max(self.peak, self.current)
        self.peak_beside_gradients = max(self.peak_beside_gradients, self.current - self.gradients)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        key = (function, _described(args), _described(tuple(kwargs.items())))
        layout = self._layouts.get(key)
        if layout is not None:
            made = tuple(part and torch.empty_strided(*part[:2], dtype=part[2], device="meta") for part in layout)
            result = made if len(made) > 1 else made[0]
        else:
            result = function(*args, **kwargs)
            self._layouts[key] = _layout(result, args)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result


def _described(value: Any) -> Any:
    """What of an operation's argument decides the layout of its result; can be hashed."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(_described(part) for part in value)
    return type(value), value


def _layout(result: Any, args: tuple) -> list[tuple | None] | None:
    """Sizes, strides and dtypes of new tensors on the meta device; None for other results, and for views."""
    parts = result if isinstance(result, tuple) else (result,)
    given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
    for part in parts:
        new = isinstance(part, Tensor) and part.device.type == "meta" and part.untyped_storage()._cdata not in given
        if not (new or (part is None and len(parts) > 1)):
            return None
    return [None if part is None else (part.shape, part.stride(), part.dtype) for part in parts]

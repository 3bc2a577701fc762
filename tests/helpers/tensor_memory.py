"""Counts the bytes that tensors hold on the CPU, where no allocator keeps a peak."""

import weakref

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """The greatest number of bytes in storages that exist at once: those of given modules, and all made inside."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: set[int] = set()
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._count(tensor)

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
            return
        self._known.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        if key in self._known:
            self._known.discard(key)
            self.current -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

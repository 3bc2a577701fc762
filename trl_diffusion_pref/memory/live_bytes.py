"""Counts the bytes of fake tensors, which have shapes and no values, that exist at once, and their arithmetic."""

import weakref
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .autocast import OnDevice


_ATEN = torch.ops.aten
# PyTorch has no count for the CPU's attention, whose arguments are those of flash attention.
_COUNTED_LIKE = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _ATEN._scaled_dot_product_flash_attention_backward,
}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside that exist at once; those of modules are left out.

    Entered within a `FakeTensorMode`. Operations on real tensors alone, such as masks whose lengths are read, give
    real tensors. Where the host reads a value that does not exist, it reads False or 1.

    Args:
        modules: Have their gradients counted by themselves.

    Attributes:
        flops: Floating-point operations of matrix products, convolutions and attention since `start`.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.current = self.peak = self.gradients = self.peak_beside_gradients = self.flops = 0
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(self._accumulated)
        self._with_gradient: set[int] = set()

    def start(self) -> None:
        """Begins a step: what exists now stays, and there are no gradients."""
        self.peak = self.peak_beside_gradients = self.current
        self.gradients = self.flops = 0
        self._with_gradient.clear()

    def _accumulated(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None and id(parameter) not in self._with_gradient:
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
        if OnDevice in types:
            # It comes back with fake tensors.
            return NotImplemented
        if FakeTensor in types and function is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype != torch.bool and 1
        real = FakeTensor not in types and any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        with unset_fake_temporarily() if real else nullcontext():
            result = function(*args, **kwargs)
        packet = function._overloadpacket
        count = flop_registry.get(_COUNTED_LIKE.get(packet, packet))
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

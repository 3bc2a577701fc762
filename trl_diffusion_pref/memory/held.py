"""Bytes of the optimiser's state."""

import torch
from torch import nn
from transformers import Trainer

from ..training.config import DiffusionPreferenceConfig


# bitsandbytes keeps states smaller than this in float32 (its min_8bit_size), larger ones in 8 bits with a float32
# maximum per block.
_LEAST_8BIT_SIZE = 4096
_8BIT_BLOCK = 256
# torchao's: states smaller than this, or no multiple of a block, stay as the parameter; others have a table each.
_TORCHAO_8BIT, _TORCHAO_TABLE = "adamw_torch_8bit", 256 * 4
# Optimisers whose kernels need a device: how many states as large as the parameter, in its dtype and in 8 bits.
_STATES = {"adamw_apex_fused": 2, "paged_adamw_32bit": 2, "lion_32bit": 1, "paged_lion_32bit": 1}
_STATES_8BIT = {
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "rmsprop_bnb_8bit": 1,
}


def optimizer_bytes(args: DiffusionPreferenceConfig, trained: list[nn.Parameter]) -> int:
    """Bytes of the optimiser's state after its first step, which is taken with fake gradients.

    Args:
        trained: Fake parameters, within their mode.

    Raises:
        ValueError: It is not known for this optimiser.
    """
    name = getattr(args.optim, "value", args.optim)
    if name in _STATES:
        return _STATES[name] * sum(parameter.nbytes for parameter in trained)
    if name in _STATES_8BIT:
        sizes = [parameter.numel() for parameter in trained]
        eight_bit = (size + -(-size // _8BIT_BLOCK) * 4 if size >= _LEAST_8BIT_SIZE else 4 * size for size in sizes)
        return _STATES_8BIT[name] * sum(eight_bit)
    if name == _TORCHAO_8BIT:
        return 2 * sum(map(_torchao_8bit_bytes, trained))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind(trained, **options)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"optim={name!r}: how large its state is, is not known ({error}). Estimate with one of adamw_torch, sgd, "
            f"adafactor, {', '.join([*_STATES, *_STATES_8BIT, _TORCHAO_8BIT])}."
        ) from error
    finally:
        for parameter in trained:
            parameter.grad = None
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    # Steps are counted in scalars, on the CPU where they can be.
    return sum(state.nbytes for state in states if state.ndim)


def _torchao_8bit_bytes(parameter: nn.Parameter) -> int:
    """Of one state."""
    size = parameter.numel()
    if size < _LEAST_8BIT_SIZE or size % _8BIT_BLOCK:
        return parameter.nbytes
    return size + size // _8BIT_BLOCK * 4 + _TORCHAO_TABLE

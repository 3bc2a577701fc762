"""Splits one call of a denoiser on [negative; positive] into its halves, and joins their outputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def take_half(value: Any, half: int, batch: int, shared: tuple[str, ...] = ()) -> Any:
    """The first (0) or second (1) half of every tensor with `batch` rows, in nested containers too.

    Args:
        shared: Names of arguments that are the same for all samples, which stay whole.
    """
    if isinstance(value, Tensor):
        return value.chunk(2)[half] if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {key: item if key in shared else take_half(item, half, batch, shared) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        # Per-sample numbers, such as prompts' lengths, come as lists.
        if len(value) == batch and not any(isinstance(item, (Tensor, list, tuple, Mapping)) for item in value):
            return value[: batch // 2] if half == 0 else value[batch // 2 :]
        return type(value)(take_half(item, half, batch, shared) for item in value)
    return value


def join_halves(negative: Any, positive: Any) -> Any:
    """One output of [negative; positive] from two of the same kind."""
    if isinstance(negative, Tensor):
        return torch.cat([negative, positive])
    if isinstance(negative, dict):
        return type(negative)(**{key: join_halves(negative[key], positive[key]) for key in negative})
    if isinstance(negative, tuple):
        return tuple(join_halves(*pair) for pair in zip(negative, positive, strict=True))
    return negative

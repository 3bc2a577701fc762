"""Splits one call of a denoiser on both sides of the guidance into its halves, and joins their outputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def take_half(
    value: Any,
    half: int,
    batch: int,
    shared: tuple[str, ...] = (),
    lists: bool = False,
    *,
    first: int | None = None,
    batch_second: tuple[str, ...] = (),
) -> Any:
    """The first (0) or second (1) half of every tensor with `batch` rows, in nested containers too.

    Args:
        first: Rows of the first half; as many as of the second one by default.
        shared: Names of arguments that are the same for all samples, which stay whole.
        lists: Whether the denoiser takes its samples as lists of tensors: each list with `batch` entries is halved,
            and the tensors in it stay whole.
        batch_second: Names of arguments, tensors, whose rows are in the second dimension.
    """
    first = batch // 2 if first is None else first
    rows = slice(first) if half == 0 else slice(first, None)
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {
            key: item
            if key in shared
            else item[:, rows]
            if key in batch_second
            else take_half(item, half, batch, shared, lists, first=first, batch_second=batch_second)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        # Per-sample numbers, such as prompts' lengths, come as lists.
        nested = any(isinstance(item, (Tensor, list, tuple, Mapping)) for item in value)
        if len(value) == batch and (not nested or (lists and isinstance(value, list))):
            return value[rows]
        return type(value)(
            take_half(item, half, batch, shared, lists, first=first, batch_second=batch_second) for item in value
        )
    return value


def join_halves(first: Any, second: Any) -> Any:
    """One output of both sides from two of the same kind."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, dict):
        return type(first)(**{key: join_halves(first[key], second[key]) for key in first})
    if isinstance(first, tuple):
        return tuple(join_halves(*pair) for pair in zip(first, second, strict=True))
    if isinstance(first, list):
        # Of denoisers that take and return samples as lists.
        return first + second
    return first

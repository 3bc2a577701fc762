"""Flushes denormal floats to zero while training on a CPU.

A saturated log-sigmoid sends denormal gradients through the whole backward pass, where a CPU multiplies them many
times slower than ordinary numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def denormals_are_flushed() -> bool:
    """Whether the calling thread turns denormal float32 results into zero; torch has a setter but no getter."""
    return (torch.tensor([1e-38]) * torch.tensor([1e-3])).item() == 0.0


@contextmanager
def flush_denormals(device: torch.device) -> Iterator[None]:
    """Switches flushing on for the duration if `device` is a CPU, and restores what was before."""
    before = denormals_are_flushed()
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)

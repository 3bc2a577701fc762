"""State of the process that training changes or must not see changed: denormal floats and global generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def denormals_are_flushed() -> bool:
    """Whether the calling thread turns denormal float32 results into zero; torch has a setter but no getter."""
    return (torch.tensor([1e-38]) * torch.tensor([1e-3])).item() == 0.0


@contextmanager
def flush_denormals(device: torch.device) -> Iterator[None]:
    """Flushes denormal floats to zero for the duration if `device` is a CPU, and restores what was before.

    A saturated log-sigmoid sends denormal gradients through the whole backward pass, where a CPU multiplies them many
    times slower than ordinary numbers.
    """
    before = denormals_are_flushed()
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def restored_generators(device: torch.device) -> Iterator[None]:
    """Restores the global generators of torch, on the CPU and on `device`, of numpy and of Python on leaving."""
    # Apple's has one generator, which torch does not fork; others are no part of torch.
    own = device.type not in ("cpu", "mps") and hasattr(torch, device.type)
    devices = [device.index or 0] if own else []
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices, device_type=device.type if own else "cuda"):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)

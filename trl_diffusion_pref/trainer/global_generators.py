"""Keeps what is drawn from the global generators beside training out of the training that goes on afterwards."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


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

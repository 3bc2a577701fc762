"""Metrics of samples on their way to the log: gathered from all processes, averaged over samples and steps."""

from collections import defaultdict

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor


class IntervalMeans:
    """Means over the micro-batches between two logs."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, means: dict[str, float]) -> None:
        """Takes a micro-batch's means."""
        for name, mean in means.items():
            self._values[name].append(mean)

    def take(self) -> dict[str, float]:
        """The means of what was added since the last call."""
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return means


def gathered(values: dict[str, Tensor], accelerator: Accelerator) -> Tensor:
    """Per-sample values of all processes, `(samples, names)` float32."""
    return accelerator.gather(torch.stack([value.detach().float() for value in values.values()], dim=1))


def joined(values: np.ndarray | list[np.ndarray]) -> np.ndarray:
    """An evaluation's values as one array, also where `eval_do_concat_batches=False` leaves a list of batches."""
    return np.concatenate(values) if isinstance(values, list) else np.asarray(values)

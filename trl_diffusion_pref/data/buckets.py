"""Aspect-ratio buckets: the sizes that images are scaled and cropped to, and batches of one size each."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal, get_args

import numpy as np
import torch
from diffusers.training_utils import find_nearest_bucket

from ..diffusion.randomness import ORDER, generator_for


OnAspectDifference = Literal["raise", "skip", "crop"]
# Of SDXL's table (arXiv 2307.01952, appendix I), which `bucket_sizes(1024, 64)` is: sides are multiples of 64, areas
# between 90 % of 1024 x 1024 and all of it, and a side is at most four times the other.
_LEAST_AREA = 0.9
_MOST_RATIO = 4
# Multiples of a sixteenth of the resolution, as SDXL's.
_STEPS = 16


@dataclass(frozen=True)
class BucketOptions:
    """How images of several shapes share a training.

    Args:
        enabled: Whether there is more than one size.
        max_aspect_difference: How many times as wide, for its height, one image of a row may be as another.
        on_aspect_difference: What happens beyond: "raise" and "skip" count the row as bad; "crop" brings both to the
            row's bucket, whatever that cuts away.

    Raises:
        ValueError: A value that cannot be used.
    """

    enabled: bool = False
    max_aspect_difference: float = 1.5
    on_aspect_difference: OnAspectDifference = "crop"

    def __post_init__(self) -> None:
        if self.max_aspect_difference < 1:
            raise ValueError(f"max_aspect_difference={self.max_aspect_difference}: it must be at least 1.")
        if self.on_aspect_difference not in get_args(OnAspectDifference):
            known = ", ".join(get_args(OnAspectDifference))
            raise ValueError(f"on_aspect_difference={self.on_aspect_difference!r} is none of {known}.")


def bucket_sizes(resolution: int, size_step: int) -> list[tuple[int, int]]:
    """Heights and widths with about the area of a square, from tall to wide.

    Args:
        resolution: Side of the square in pixels.
        size_step: Pixels that a side must be a multiple of for the model.
    """
    step = math.ceil(resolution / _STEPS / size_step) * size_step
    area = resolution * resolution
    sides = range(step, _MOST_RATIO * resolution + 1, step)
    sizes = [
        (height, width)
        for height in sides
        for width in sides
        if _LEAST_AREA * area <= height * width <= area and max(height, width) <= _MOST_RATIO * min(height, width)
    ]
    return sorted({*sizes, (resolution, resolution)}, key=lambda size: (size[1] / size[0], size))


def assign(sizes: np.ndarray, table: Sequence[tuple[int, int]]) -> np.ndarray:
    """The bucket of each row, `(N,)`: the one nearest to the geometric mean of its samples' shapes.

    Args:
        sizes: `(N, S, 2)` widths and heights of a row's samples in pixels, all positive.
        table: Heights and widths.
    """
    ratios = np.exp(np.log(sizes[:, :, 0] / sizes[:, :, 1]).mean(axis=1))
    # Few ratios are distinct, and the table is searched once for each.
    distinct, inverse = np.unique(ratios.round(4), return_inverse=True)
    nearest = [find_nearest_bucket(1.0, float(ratio), table) for ratio in distinct]
    return np.asarray(nearest, dtype=np.int16)[inverse]


def aspect_differences(sizes: np.ndarray) -> np.ndarray:
    """How many times as wide, for its height, the widest sample of each row is as the narrowest, `(N,)`, from 1 on."""
    ratios = sizes[:, :, 0] / sizes[:, :, 1]
    return ratios.max(axis=1) / ratios.min(axis=1)


class BucketBatchSampler(torch.utils.data.Sampler[list[int]]):
    """One process's batches of rows of one bucket each.

    Every row is in one batch of one process. The last batches of a bucket may be smaller. All processes have equally
    many batches: for it some are divided or, with `repeat`, come twice.

    Args:
        buckets: `(N,)`, of each row.
        batch_size: Of one process.
        process: This process and how many there are.
        seed: Of the order, which also depends on the epoch; None for the order of the rows.
        drop_last: Whether smaller batches, and what the processes cannot share evenly, are left out.
        repeat: Whether processes that have fewer batches repeat some.

    Raises:
        ValueError: There are fewer rows than processes.
    """

    def __init__(
        self,
        buckets: np.ndarray,
        batch_size: int,
        process: tuple[int, int],
        *,
        seed: int | None,
        drop_last: bool = False,
        repeat: bool = False,
    ) -> None:
        self.buckets, self.size, self.process = buckets, batch_size, process
        self.seed, self.drop_last, self.repeat, self.epoch = seed, drop_last, repeat, 0
        if len(buckets) < process[1] and not repeat:
            raise ValueError(f"{len(buckets)} rows cannot be shared by {process[1]} processes. Use fewer processes.")

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next epoch."""
        self.epoch = epoch

    def _batches(self) -> list[list[int]]:
        """Those of all processes, in turn."""
        rows, count = torch.arange(len(self.buckets)), self.process[1]
        generator = None if self.seed is None else generator_for(self.seed, ORDER, self.epoch)
        if generator is not None:
            rows = torch.randperm(len(rows), generator=generator)
        of_rows = torch.from_numpy(self.buckets.astype(np.int64))[rows]
        batches: list[list[int]] = []
        for bucket in np.unique(self.buckets):
            members = rows[of_rows == int(bucket)].tolist()
            batches += [members[start : start + self.size] for start in range(0, len(members), self.size)]
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == self.size]
            batches = batches[: len(batches) // count * count]
        if self.repeat:
            batches += list(islice(cycle(batches), -len(batches) % count))
        while len(batches) % count:
            largest = max(range(len(batches)), key=lambda index: len(batches[index]))
            whole = batches[largest]
            batches[largest] = whole[: len(whole) // 2]
            batches.append(whole[len(whole) // 2 :])
        if generator is not None:
            batches = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
        return batches

    def __len__(self) -> int:
        return len(self._batches()) // self.process[1]

    def __iter__(self) -> Iterator[list[int]]:
        index, count = self.process
        return iter(self._batches()[index::count])

"""Aspect-ratio buckets: the sizes that images are scaled and cropped to, and batches of one size each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal, get_args

import numpy as np
import torch
from diffusers.training_utils import find_nearest_bucket

from ..diffusion.randomness import ORDER, generator_for


OnAspectDifference = Literal["raise", "skip", "crop"]
# The rule behind SDXL's table (arXiv 2307.01952, appendix I): sides are multiples of a sixteenth of the resolution,
# areas between 90 % of the square's and all of it, and a side is at most four times the other.
_LEAST_AREA = 0.9
_MOST_RATIO = 4
_STEPS = 16


@dataclass(frozen=True)
class BucketOptions:
    """How images of several shapes share a training.

    Args:
        enabled: Whether there is more than one size.
        max_aspect_difference: How many times as wide, for its height, one image of a row may be as another.
        on_aspect_difference: What happens with rows beyond it, whatever happens with other rows that cannot be used:
            "raise" lists them and stops, "skip" leaves them out, "crop" brings their images to the row's bucket.

    Raises:
        ValueError: A value that cannot be used.
    """

    enabled: bool = False
    max_aspect_difference: float = 1.5
    on_aspect_difference: OnAspectDifference = "crop"

    def __post_init__(self) -> None:
        if not self.max_aspect_difference >= 1:
            raise ValueError(f"max_aspect_difference={self.max_aspect_difference}: it must be at least 1.")
        if self.on_aspect_difference not in get_args(OnAspectDifference):
            known = ", ".join(get_args(OnAspectDifference))
            raise ValueError(f"on_aspect_difference={self.on_aspect_difference!r} is none of {known}.")


def bucket_sizes(resolution: int, size_step: int, largest_side: int | None = None) -> list[tuple[int, int]]:
    """Heights and widths with about the area of a square, from tall to wide, the square among them.

    At 1024 these are the 40 sizes of SDXL's table, and 1344x704, of which the table has 704x1344 only. A
    `size_step` that is no sixteenth of the resolution gives fewer sizes.

    Args:
        resolution: Side of the square in pixels.
        size_step: Pixels that a side must be a multiple of for the model.
        largest_side: Pixels that a side may have for the model; None for any.
    """
    step = max(round(resolution / _STEPS / size_step), 1) * size_step
    area = resolution * resolution
    sides = range(step, min(largest_side or area, 2 * resolution) + 1, step)
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
        sizes: `(N, S, 2)` widths and heights of a row's samples in pixels, all positive; at least one sample.
        table: Heights and widths.

    Returns:
        Positions in the table, int16.
    """
    ratios = np.exp(np.log(sizes[:, :, 0] / sizes[:, :, 1]).mean(axis=1))
    # Few ratios are distinct, and the table is searched once for each.
    distinct, inverse = np.unique(ratios.round(4), return_inverse=True)
    nearest = [find_nearest_bucket(1.0, float(ratio), table) for ratio in distinct]
    return np.asarray(nearest, dtype=np.int16)[inverse]


def aspect_differences(sizes: np.ndarray) -> np.ndarray:
    """How many times as wide, for its height, the widest sample of each row is as the narrowest, `(N,)`, from 1 on."""
    ratios = sizes[:, :, 0] / sizes[:, :, 1]
    # Exact where the quotient is a short decimal, so that 3:2 beside 1:1 is 1.5 and not a hair more.
    return (ratios.max(axis=1) / ratios.min(axis=1)).round(9)


class BucketBatchSampler(torch.utils.data.Sampler[list[int]]):
    """One process's batches of rows of one bucket each.

    Every row is in one batch of one process, and all processes have equally many batches: for it the largest batches
    are halved. Only where all batches have a single row, as many rows as are missing come twice, other ones in every
    epoch. The last batch of a bucket may be smaller than others, so that its rows weigh more in their step.

    Args:
        buckets: `(N,)`, of each row.
        batch_size: Of one process.
        process: This process and how many there are.
        seed: Of the order, which also depends on the epoch; None for the order of the rows, bucket by bucket.
        drop_last: Whether smaller batches, and what the processes cannot share evenly, are left out instead.

    Attributes:
        never_used: Rows that `drop_last` leaves out in every epoch, since their bucket has fewer than a batch.

    Raises:
        ValueError: `drop_last` leaves nothing.
    """

    def __init__(
        self,
        buckets: np.ndarray,
        batch_size: int,
        process: tuple[int, int],
        *,
        seed: int | None,
        drop_last: bool = False,
    ) -> None:
        self.buckets, self.size, self.process = buckets, batch_size, process
        self.seed, self.drop_last, self.epoch = seed, drop_last, 0
        counts = np.unique(buckets, return_counts=True)[1]
        whole, count = int((counts // batch_size).sum()), process[1]
        self.never_used = int(counts[counts < batch_size].sum()) if drop_last else 0
        self._length = whole // count if drop_last else -(-int(np.ceil(counts / batch_size).sum()) // count)
        if drop_last and not self._length:
            raise ValueError(
                f"{len(buckets)} rows of {len(counts)} shapes give {whole} batches of {batch_size} rows of one shape, "
                f"for {count} processes. Set dataloader_drop_last=False, take fewer rows at once, or switch "
                "aspect_ratio_buckets off."
            )

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next epoch."""
        self.epoch = epoch

    def _batches(self) -> list[list[int]]:
        """Those of all processes, in turn."""
        rows, count = np.arange(len(self.buckets)), self.process[1]
        generator = None if self.seed is None else generator_for(self.seed, ORDER, self.epoch)
        if generator is not None:
            rows = torch.randperm(len(rows), generator=generator).numpy()
        of_rows, batches = self.buckets[rows], []
        for bucket in np.unique(self.buckets):
            members = rows[of_rows == bucket].tolist()
            batches += [members[start : start + self.size] for start in range(0, len(members), self.size)]
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == self.size]
        # Before batches are left out, halved or repeated, so that it does not always befall the same bucket.
        if generator is not None:
            batches = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
        if self.drop_last:
            return batches[: self._length * count]
        while len(batches) % count:
            largest = max(range(len(batches)), key=lambda index: len(batches[index]))
            whole, half = batches[largest], len(batches[largest]) // 2
            if not half:
                break
            batches[largest : largest + 1] = [whole[:half], whole[half:]]
        return batches + list(islice(cycle(batches), -len(batches) % count))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        index, count = self.process
        return iter(self._batches()[index::count])

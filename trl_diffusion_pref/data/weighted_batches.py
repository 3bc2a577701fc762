"""Batches of rows that are drawn with replacement, some more often than others."""

import numpy as np
import torch

from ..diffusion.randomness import ORDER, generator_for
from .buckets import BucketBatchSampler


class WeightedBatchSampler(BucketBatchSampler):
    """One process's batches of rows of one bucket each, drawn with replacement in proportion to their weights.

    An epoch draws as many rows as there are, and more where the processes cannot share them evenly. A batch's bucket
    is drawn by the weight of all its rows, and then its rows among them, so that each draw has the given
    probabilities. Where there is one bucket, rows come in the same order whatever the batch size and however many
    processes there are.

    Args:
        buckets: `(N,)`, of each row.
        batch_size: Of one process.
        process: This process and how many there are.
        seed: Of the draws, which also depend on the epoch.
        weights: `(N,)`, from 0 on, not all 0; their sum does not matter.
        drop_last: Whether a last batch that is smaller is left out.

    Raises:
        ValueError: `drop_last` leaves nothing.
    """

    def __init__(
        self,
        buckets: np.ndarray,
        batch_size: int,
        process: tuple[int, int],
        *,
        seed: int,
        weights: np.ndarray,
        drop_last: bool = False,
    ) -> None:
        # Counted as if all rows were of one bucket: of each, as many can be drawn as its batches need.
        super().__init__(np.zeros(len(buckets), np.int16), batch_size, process, seed=seed, drop_last=drop_last)
        self.buckets, self.weights, self._key = buckets, weights.astype(np.float64), (seed, ORDER)

    def _batches(self) -> list[list[int]]:
        rows, number = len(self.buckets), self._length * self.process[1]
        # A last batch may be smaller, unless batches were added for the processes.
        draws = min(rows, number * self.size) if (number - 1) * self.size < rows else number * self.size
        generator = generator_for(*self._key, self.epoch)
        # Rows first, so that they do not depend on how many batches there are.
        of_rows = torch.rand(draws, generator=generator, dtype=torch.float64).numpy()
        of_batches = torch.rand(number, generator=generator, dtype=torch.float64).numpy()
        used = np.flatnonzero(self.weights)
        kinds = np.unique(self.buckets[used])
        members = [used[self.buckets[used] == kind] for kind in kinds]
        bucket_of_batch = _drawn(np.array([self.weights[rows].sum() for rows in members]), of_batches)
        bucket_of_row = bucket_of_batch.repeat(self.size)[:draws]
        drawn = np.empty(draws, dtype=np.int64)
        for bucket, candidates in enumerate(members):
            here = bucket_of_row == bucket
            drawn[here] = candidates[_drawn(self.weights[candidates], of_rows[here])]
        return [drawn[start : start + self.size].tolist() for start in range(0, draws, self.size)]


def _drawn(weights: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Positions in `weights`, all positive, that numbers in [0, 1) stand for."""
    ends = weights.cumsum()
    return np.minimum(np.searchsorted(ends, uniform * ends[-1], side="right"), len(weights) - 1)

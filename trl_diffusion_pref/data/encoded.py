"""A data set of which samples and prompts are encoded, with its rows on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..diffusion.randomness import CAPTION, generator_for
from .batch import MEAN, PROMPT_NUMBER, SCALAR
from .prompts import PromptTable
from .shards import ShardedTensors


@dataclass
class EncodedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of latents and prompt embeddings, read from disk when they are asked for.

    `dataset[i]` is a dictionary with `row` (int), `prompt` (the number of its prompt in the table), tensors by the
    names of `Batch`'s parts (`latents/mean` `(S, C, ...)`, `latents/std`, and names that begin with `sample/` and
    `condition/`) in the dtypes that they are kept in, and numbers whose names begin with `scalar/`.

    Args:
        rows: `(N,)` int64, positions in the data set that it was made from; those that were left out are missing.
        samples: Encoded samples, or None for data sets of prompts alone.
        places: `(N, 2)`, where each row is in `samples`.
        prompts: Embeddings.
        captions: `(M,)` int32, numbers of prompts, row after row. Of several, one is drawn for each epoch.
        first_captions: `(N + 1,)` int64, where each row's begin.
        scalars: Columns of numbers, `(N,)` or `(N, S)` float32.
        buckets: `(N,)`, which of `sizes` each row has.
        sizes: Heights and widths in pixels; empty where all rows are alike.
        record: What the values depend on, by name.
        fingerprint: Of the rows' content and of the record.
        left_out: How many rows were left out, by kind.
        seed: Of the choice among captions.
    """

    rows: np.ndarray
    samples: ShardedTensors | None
    places: np.ndarray
    prompts: PromptTable
    captions: np.ndarray
    first_captions: np.ndarray
    scalars: Mapping[str, np.ndarray]
    buckets: np.ndarray
    sizes: Sequence[tuple[int, int]]
    record: dict[str, Any]
    fingerprint: str
    left_out: dict[str, int] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        # In memory that the workers of a loader share, which have copies of everything else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Chooses among several captions of a row."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, (first, end) = int(self.rows[index]), self.first_captions[index : index + 2].tolist()
        if end - first > 1:
            generator = generator_for(self.seed, CAPTION, row, int(self._epoch))
            first += int(torch.randint(end - first, (1,), generator=generator))
        values: dict[str, Any] = {} if self.samples is None else self.samples.read(self.places[index])
        values |= {SCALAR + name: torch.as_tensor(column[index]) for name, column in self.scalars.items()}
        return {"row": row, PROMPT_NUMBER: int(self.captions[first]), **values}

    def subset(self, indices: np.ndarray) -> "EncodedDataset":
        """Some of the rows, in the order of the indices, without a fingerprint of their own."""
        counts = np.diff(self.first_captions)[indices]
        captions = [self.captions[self.first_captions[i] : self.first_captions[i + 1]] for i in indices.tolist()]
        return replace(
            self,
            rows=self.rows[indices],
            places=self.places[indices],
            captions=np.concatenate([self.captions[:0], *captions]),
            first_captions=np.cumsum([0, *counts.tolist()]),
            scalars={name: column[indices] for name, column in self.scalars.items()},
            buckets=self.buckets[indices],
        )

    def latent_shapes(self) -> dict[int, tuple[int, ...]]:
        """The shape of one sample's latents in each bucket that has rows."""
        if self.samples is None:
            return {}
        firsts = {bucket: int(np.argmax(self.buckets == bucket)) for bucket in np.unique(self.buckets).tolist()}
        return {bucket: self.samples.shapes(self.places[row])[MEAN][1:] for bucket, row in firsts.items()}

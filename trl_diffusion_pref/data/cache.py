"""The cache of encoded data: all processes write their share of it, and each part counts when it is whole."""

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from .bad_rows import RowProblem
from .shards import ShardedTensors, remove_unfinished, write_shard


# Of one shard at most, about: as much as a killed process may lose, and few enough files for a million pairs.
_SHARD_BYTES, _SHARD_ROWS = 64 * 2**20, 256


def stored_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of one row with tensors of these shapes, see `encoding.as_stored`."""
    return sum(
        math.prod(shape) * (dtype.itemsize if len(shape) >= 2 else torch.float32.itemsize) for shape in shapes.values()
    )


def rows_per_shard(bytes_per_row: int, batch_size: int) -> int:
    """Whole batches, and the same however many processes there are, so that all write the same shards."""
    rows = min(_SHARD_BYTES // max(bytes_per_row, 1), _SHARD_ROWS)
    return max(rows // batch_size, 1) * batch_size


def check_space(folder: Path, needed: int, label: str) -> None:
    """Raises before hours of encoding would fill a disk.

    Raises:
        ValueError: More bytes are needed than the disk has free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{label} would take {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free. Set "
            "dataset_cache_dir (of preference_accuracy: cache_folder) to a folder on a larger disk, or train on a "
            "streamed data set, which keeps nothing: load_dataset(..., streaming=True)."
        )


@dataclass
class Part:
    """What was encoded of some rows.

    Args:
        rows: Which of them, as indices of all.
        tensors: Of each.
        notes: What to know about them, see `write_shard`.
        problems: Rows that cannot be used; they are in no shard.
    """

    rows: np.ndarray
    tensors: list[dict[str, Tensor]]
    notes: dict[str, Any] = field(default_factory=dict)
    problems: list[RowProblem] = field(default_factory=list)


def encode_missing(
    shards: ShardedTensors,
    keys: np.ndarray,
    rows: np.ndarray,
    divide: Callable[[np.ndarray], list[np.ndarray]],
    encode: Callable[[np.ndarray], Part],
    *,
    label: str,
    bytes_per_row: int,
) -> list[RowProblem]:
    """Encodes the rows whose keys are not stored, all processes their share, in shards that count when they are whole.

    Args:
        shards: Where they are stored; afterwards it has all of them.
        keys: `(N,)` of all rows; rows with the same key are encoded once.
        rows: Those of them that are wanted.
        divide: Divides row numbers into those of one shard each, the same way in all processes.
        encode: Encodes the rows of one shard.
        label: How messages call the rows.
        bytes_per_row: For the messages about the disk.

    Returns:
        The problems that all processes found.

    Raises:
        ValueError: The disk has no room.
        OSError: It became full; what is whole is kept.
    """
    state = PartialState()
    if state.is_local_main_process and shards.folder.is_dir():
        remove_unfinished(shards.folder)
    problems: list[RowProblem] = []
    on_this_node = state.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    # In the second round, each node encodes what others wrote to a disk that it does not see.
    for number, count in ((state.process_index, state.num_processes), on_this_node):
        shards.refresh()
        first = rows[np.sort(np.unique(keys[rows], return_index=True)[1])]
        bad = np.asarray([problem.row for problem in problems], dtype=np.int64)
        missing = np.setdiff1d(first[shards.locate(keys[first])[:, 0] < 0], bad)
        if not any(gather_object([len(missing)])):
            break
        needed = len(missing) * bytes_per_row
        check_space(shards.folder.parent, needed, f"{label}, encoded,")
        own = divide(missing)[number::count]
        found: list[RowProblem] = []
        total = sum(map(len, own))
        bar = {"desc": f"Encoding {label}", "unit": " rows", "disable": not (state.is_main_process and total)}
        with tqdm(total=total, **bar) as shown:
            for numbers in own:
                part = encode(numbers)
                found += part.problems
                if part.tensors:
                    with _explained_if_full(shards.folder, needed, label):
                        write_shard(shards.folder, keys[part.rows], part.tensors, part.notes)
                shown.update(len(numbers))
        problems += gather_object(found)
    shards.refresh()
    return problems


@contextmanager
def _explained_if_full(folder: Path, needed: int, label: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{folder} is full while {label} is encoded, which takes {needed / 1e9:.1f} GB. What is encoded so far is "
            "kept: make room, or set dataset_cache_dir to a larger disk, and run again."
        ) from error

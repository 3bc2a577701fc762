"""The cache of encoded data: all processes write their share of it, and each part counts when it is whole."""

import errno
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from .bad_rows import RowProblem
from .layouts import Layout
from .options import EncodingOptions
from .shards import ShardedTensors, remove_unfinished, write_shard


# Of one shard at most, about: as much as a killed process may lose, and, for a million pairs, fewer than the 10,000
# files that the Hub takes in one folder.
_SHARD_BYTES, _SHARD_ROWS = 256 * 2**20, 256


def stored_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of one row with tensors of these shapes, see `encoding.as_stored`."""
    return sum(
        math.prod(shape) * (dtype.itemsize if len(shape) >= 2 else torch.float32.itemsize) for shape in shapes.values()
    )


def row_bytes(
    latents: tuple[int, ...],
    conditioning: Mapping[str, tuple[int, ...]],
    conditions: Mapping[str, tuple[int, ...]],
    layout: Layout,
    options: EncodingOptions,
    encoder: torch.dtype,
) -> int:
    """Bytes of one row's samples.

    Args:
        latents: Shape of one sample's.
        conditioning: Shapes of what is kept of how one sample was prepared, which is in float32.
        conditions: Shapes of what is kept of condition images.
        encoder: The VAE's dtype.
    """
    count = (1 + options.keep_std) * layout.num_samples
    numbers = layout.num_samples * sum(map(math.prod, conditioning.values()))
    shapes = {str(index): latents for index in range(count)} | dict(conditions)
    return stored_bytes(shapes, options.stored_dtype(encoder)) + 4 * numbers


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
            f"{label} would take {readable_bytes(needed)}, and {folder} has {readable_bytes(free)} free. Set "
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
        The problems that all processes found, of all rows with the same key as the one that was read.

    Raises:
        ValueError: The disk has no room.
        OSError: It became full; what is whole is kept.
    """
    state = PartialState()
    if state.is_local_main_process and shards.folder.is_dir():
        remove_unfinished(shards.folder)
    problems: list[RowProblem] = []
    first = rows[np.sort(np.unique(keys[rows], return_index=True)[1])]
    parts = divide(first)
    on_this_node = state.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    # In the second round, each node encodes what others wrote to a disk that it does not see.
    rounds = (state.process_index, state.num_processes), on_this_node
    for number, count in rounds:
        shards.refresh()
        missing = np.zeros(len(keys), dtype=bool)
        missing[first[shards.locate(keys[first])[:, 0] < 0]] = True
        missing[[problem.row for problem in problems]] = False
        # All must divide the same rows, also where nodes have caches of their own, or another run writes beside this.
        wanted = np.logical_or.reduce(gather_object([missing]))
        if not wanted.any():
            break
        needed = int(missing.sum()) * bytes_per_row
        check_space(shards.folder.parent, needed, f"{label}, encoded,")
        own = [part[missing[part]] for part in _unfinished_parts(parts, wanted, divide)[number::count]]
        own = [part for part in own if len(part)]
        if state.is_main_process and (number, count) == rounds[0]:
            _announce(label, len(first), int(missing.sum()), bytes_per_row, shards.folder)
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
    return with_twins(problems, keys, rows)


def _unfinished_parts(
    parts: list[np.ndarray], wanted: np.ndarray, divide: Callable[[np.ndarray], list[np.ndarray]]
) -> list[np.ndarray]:
    """The parts with rows that are wanted.

    Parts of which nothing is there stay as they are, whatever rows of others are bad or came from another data set:
    a run that goes on then writes the files that an uninterrupted one writes.
    """
    rest = [part[wanted[part]] for part in parts if wanted[part].any() and not wanted[part].all()]
    untouched = [part for part in parts if wanted[part].all()]
    return untouched + (divide(np.sort(np.concatenate(rest))) if rest else [])


def with_twins(problems: Sequence[RowProblem], keys: np.ndarray, rows: np.ndarray) -> list[RowProblem]:
    """Problems of rows, also for the rows with the same keys, of which only one was read.

    Args:
        keys: `(N,)` of all rows.
        rows: Those among which twins are looked for.
    """
    rows = rows[np.argsort(keys[rows], kind="stable")]
    of_rows, asked = keys[rows], keys[[problem.row for problem in problems]]
    ends = zip(np.searchsorted(of_rows, asked), np.searchsorted(of_rows, asked, side="right"), strict=True)
    return [
        replace(problem, row=row)
        for problem, (begin, end) in zip(problems, ends, strict=True)
        for row in rows[begin:end].tolist()
    ]


def _announce(label: str, rows: int, missing: int, bytes_per_row: int, folder: Path) -> None:
    """Says before hours of encoding what they will leave on the disk."""
    there = f"; {rows - missing} are there, {readable_bytes(missing * bytes_per_row)} to write" * (missing < rows)
    tqdm.write(
        f"Encoding {label}: {rows} of {readable_bytes(bytes_per_row)} each, {readable_bytes(rows * bytes_per_row)} in "
        f"all{there}, to {folder}.",
        file=sys.stderr,
    )


def readable_bytes(count: float) -> str:
    """Such as "524.3 kB"; a kB is 1000 bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextmanager
def _explained_if_full(folder: Path, needed: int, label: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{folder} is full while {label} is encoded, which takes {readable_bytes(needed)}. What is encoded so far "
            "is kept: make room, or set dataset_cache_dir to a larger disk, and run again."
        ) from error

"""What the cells of a data set hold, before anything is decoded: a key by content, and the sizes of images.

The key of a row says what decides its encoding. It does not change where rows are put in another order, columns are
added, or files are moved or touched; it does change where a file's content changes.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import ExifTags
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .bad_rows import RowProblem
from .decode.cell import CellProblem, paths_outside, read_cell
from .decode.image import open_image
from .layouts import Layout, dataset_fingerprint
from .shards import KEY, as_keys, key_of


# Part of every key: raise it when a key would mean something else.
_VERSION = 1
_BATCH = 256
# Orientations of EXIF at which width and height change places.
_ON_ITS_SIDE = (5, 6, 7, 8)
Size = tuple[int, int]


def cell_key(cell: object) -> bytes:
    """A key by the content of a cell with media, after `read_cell`.

    A URL stands for its content, which is taken to stay as it is.
    """
    if isinstance(cell, bytes):
        return key_of("file", cell)
    if isinstance(cell, Mapping) and cell.get("array") is not None:
        samples = np.ascontiguousarray(cell["array"])
        return key_of("array", str(samples.dtype), samples.shape, samples.tobytes(), str(cell.get("sampling_rate")))
    if isinstance(cell, (list, tuple)):
        if cell and isinstance(cell[0], (int, float)):
            return key_of("numbers", np.asarray(cell).tobytes())
        return key_of("list", *(cell_key(read_cell(item)) for item in cell))
    if isinstance(cell, PILImage.Image):
        return key_of("image", cell.mode, cell.size, cell.tobytes())
    return key_of("other", repr(cell))


def _url(cell: object) -> str | None:
    """Where a cell lies, if that is no plain file on this machine."""
    path = cell.get("path") if isinstance(cell, Mapping) and cell.get("bytes") is None else cell
    return str(path) if isinstance(path, (str, os.PathLike)) and "://" in str(path) else None


def _url_key(url: str) -> bytes:
    # An archive on this machine may be replaced; its name is what stands after "::".
    archive = url.rpartition("::")[2]
    return key_of("url", url, _stamp(archive) if "::" in url and os.path.isfile(archive) else ())


def _stamp(path: str) -> tuple[int, ...]:
    """What changes with a file, unless somebody hides it: the time of the last change of status cannot be set."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def image_size(cell: object) -> Size | None:
    """Width and height in pixels of an image as it is shown, from its header; None if it has none that can be read.

    Args:
        cell: After `read_cell`.
    """
    try:
        image = open_image(cell) if isinstance(cell, bytes) else cell
        if not isinstance(image, PILImage.Image):
            return None
        turned = image.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE
    # Pillow's parsers raise nearly any exception for damaged files; decoding will say what is wrong.
    except Exception:
        return None
    return (image.height, image.width) if turned else image.size


@dataclass(frozen=True)
class Contents:
    """The rows of a data set.

    Args:
        keys: `(N,)` of dtype `KEY`; of rows with a problem, zero.
        sizes: `(N, M, 2)` int32, width and height of each of the M media of a row in pixels; 0 where it is not known.
        problems: Files that are missing or cannot be read.
    """

    keys: np.ndarray
    sizes: np.ndarray
    problems: list[RowProblem]


def contents_of(
    dataset: Dataset, layout: Layout, label: str, folder: Path, *, sizes: Literal["none", "local", "all"]
) -> Contents:
    """Reads every cell with media once, all processes their share, or finds the result of an earlier run.

    An earlier result counts only while the data set is the same and no file has changed.

    Args:
        dataset: Undecoded.
        label: How messages call it.
        folder: Keeps the result.
        sizes: Of which images the size is wanted; those behind URLs have to be downloaded for it.
    """
    stamps = [
        (path, _stamp(path))
        for column in layout.media
        for path in paths_outside(dataset.data.column(column))
        if os.path.isfile(path)
    ]
    found_by = key_of(_VERSION, dataset_fingerprint(dataset), list(layout.media), sizes, stamps)
    file = folder / f"contents-{found_by.hex()}.safetensors"
    # All processes must decide alike, also where nodes have caches of their own.
    if all(gather_object([file.is_file()])):
        stored = load_file(file)
        return Contents(stored["keys"].numpy().view(KEY).reshape(-1), stored["sizes"].numpy(), [])
    share = _share(len(dataset))
    keys, shapes, problems = _read(dataset, layout, share, label, sizes=sizes)
    gathered = gather_object([(share.start, keys, shapes, problems)])
    gathered.sort(key=lambda part: part[0])
    contents = Contents(
        as_keys([key for _, keys, _, _ in gathered for key in keys]),
        np.concatenate([shapes for _, _, shapes, _ in gathered]),
        [problem for *_, problems in gathered for problem in problems],
    )
    # A file that is missing now may be there in the next run.
    if not contents.problems and PartialState().is_local_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{uuid4().hex}")
        whole = {
            "keys": torch.from_numpy(contents.keys.view(np.uint8).reshape(len(dataset), -1).copy()),
            "sizes": torch.from_numpy(contents.sizes),
        }
        save_file(whole, unfinished)
        unfinished.replace(file)
    return contents


def _share(count: int) -> range:
    """This process's rows: one run of them, so that reading goes through the files in order."""
    state = PartialState()
    part = -(-count // state.num_processes)
    return range(min(part * state.process_index, count), min(part * (state.process_index + 1), count))


def _read(
    dataset: Dataset, layout: Layout, rows: range, label: str, *, sizes: Literal["none", "local", "all"]
) -> tuple[list[bytes], np.ndarray, list[RowProblem]]:
    keys: list[bytes] = []
    shapes = np.zeros((len(rows), len(layout.places), 2), dtype=np.int32)
    problems: list[RowProblem] = []

    def read(cells: dict[str, Any]) -> tuple[bytes, list[Size | None], list[tuple[str, CellProblem]]]:
        if layout.problem(cells):
            # The error comes when the row is decoded.
            return key_of("wrong number"), [], []
        parts, found, wrong = [], [], []
        for place, cell in zip(layout.places, layout.cells(cells), strict=True):
            url, size = _url(cell), None
            try:
                content = read_cell(cell) if url is None or sizes == "all" else None
                parts.append(cell_key(content) if url is None else _url_key(url))
                size = image_size(content) if sizes != "none" else None
            except CellProblem as problem:
                wrong.append((place, problem))
            found.append(size)
        return key_of(*parts), found, wrong

    bar = tqdm(total=len(rows), desc=f"Reading {label}", unit="row", delay=2, disable=not _shows_bars())
    with ThreadPoolExecutor(max_workers=4) as pool, bar:
        for batch, positions in batches(dataset, layout.media, rows, _BATCH):
            for row, (key, found, wrong) in zip(positions, pool.map(read, batch), strict=True):
                keys.append(bytes(KEY.itemsize) if wrong else key)
                for index, size in enumerate(found):
                    shapes[row - rows.start, index] = size or (0, 0)
                problems += [RowProblem(row, place, str(problem), problem.kind) for place, problem in wrong]
            bar.update(len(positions))
    return keys, shapes, problems


def _shows_bars() -> bool:
    return PartialState().is_main_process


def batches(
    dataset: Dataset, columns: Sequence[str], rows: Sequence[int], size: int
) -> Iterator[tuple[list[dict[str, Any]], Sequence[int]]]:
    """Rows of a data set as dictionaries, so many at a time, with their positions."""
    for start in range(0, len(rows), size):
        positions = rows[start : start + size]
        values: Any = dataset[positions]
        cells = zip(*(values[column] for column in columns), strict=True)
        yield [dict(zip(columns, row, strict=True)) for row in cells], positions

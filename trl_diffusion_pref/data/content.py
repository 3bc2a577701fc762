"""What the cells of a data set hold, before anything is decoded: a key by content, and the sizes of images.

The key of a row says what decides its encoding. It does not change where rows are put in another order, columns are
added, or files are moved or touched; it does change where a file's content changes.
"""

import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
from safetensors.torch import load_file, save
from tqdm.auto import tqdm
from xxhash import xxh3_128

from .bad_rows import RowProblem
from .decode.cell import CellProblem, paths_outside, read_cell
from .decode.image import open_image
from .layouts import Layout, dataset_fingerprint
from .shards import KEY, as_keys, key_of


logger = logging.getLogger(__name__)

# Part of every key: raise it when a key would mean something else.
_VERSION = 1
_BATCH = 256
# Orientations of EXIF at which width and height change places.
_ON_ITS_SIDE = (5, 6, 7, 8)
# Names of the parts of a PNG file in which Pillow finds one.
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
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
        return key_of("image", cell.mode, cell.size, cell.tobytes(), cell.getpalette() or [])
    return key_of("other", repr(cell))


def _url(cell: object) -> str | None:
    """Where a cell lies, if that is no file on this machine, nor in an archive on it."""
    path = cell.get("path") if isinstance(cell, Mapping) and cell.get("bytes") is None else cell
    if not isinstance(path, (str, os.PathLike)) or "://" not in str(path) or os.path.isfile(_file_of(str(path))):
        return None
    return str(path)


def _file_of(path: str) -> str:
    """The file itself, or the archive that it is in, whose name stands after "::"."""
    return path.rpartition("::")[2]


def _stamp(path: str) -> tuple[int, ...]:
    """What changes with a file, unless somebody hides it: the time of the last change of status cannot be set."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(path)
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
        if image.format == "PNG" and isinstance(cell, bytes) and not any(mark in cell for mark in _PNG_ORIENTATION):
            # Pillow would decode the whole image to see whether an orientation follows it.
            return image.size
        if image.format == "TIFF":
            # Pillow turns it while decoding, some versions its size before.
            image.load()
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
    stamps = _stamps_of(dataset, layout.media)
    found_by = key_of(_VERSION, dataset_fingerprint(dataset), layout.places, sizes, stamps)
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
        np.concatenate([keys for _, keys, _, _ in gathered]),
        np.concatenate([shapes for _, _, shapes, _ in gathered]),
        [problem for *_, problems in gathered for problem in problems],
    )
    # A file that is missing now may be there in the next run.
    if not contents.problems and PartialState().is_local_main_process:
        _keep(contents, file)
    return contents


def _keep(contents: Contents, file: Path) -> None:
    unfinished = file.with_suffix(f".{uuid4().hex}")
    whole = {
        "keys": torch.from_numpy(contents.keys.view(np.uint8).reshape(len(contents.keys), -1).copy()),
        "sizes": torch.from_numpy(contents.sizes),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(save(whole))
        unfinished.replace(file)
    except OSError as error:
        # A cache that may only be read, or a full disk, costs the next run time and this one nothing.
        logger.info("%s cannot be written (%s), so that the next run reads all samples again.", file, error)
        with suppress(OSError):
            unfinished.unlink()


def _stamps_of(dataset: Dataset, columns: Sequence[str]) -> bytes:
    """A digest of the paths of all files that a data set refers to and of what changes with each."""
    digest = xxh3_128()
    for column in columns:
        for path in paths_outside(dataset.data.column(column)):
            # What is no plain file on this machine has no stamp.
            with suppress(OSError, ValueError):
                digest.update(repr((path, _stamp(_file_of(path)))).encode())
    return digest.digest()


def _share(count: int) -> range:
    """This process's rows: one run of them, so that reading goes through the files in order."""
    state = PartialState()
    part = -(-count // state.num_processes)
    return range(min(part * state.process_index, count), min(part * (state.process_index + 1), count))


def _read(
    dataset: Dataset, layout: Layout, rows: range, label: str, *, sizes: Literal["none", "local", "all"]
) -> tuple[np.ndarray, np.ndarray, list[RowProblem]]:
    keys = np.zeros(len(rows), dtype=KEY)
    shapes = np.zeros((len(rows), len(layout.places), 2), dtype=np.int32)
    problems: list[RowProblem] = []

    def read(cells: dict[str, Any]) -> tuple[bytes, dict[int, Size | None], list[tuple[str, CellProblem]]]:
        if layout.problem(cells):
            # The error comes when the row is decoded.
            return key_of("wrong number"), {}, []
        parts, found, wrong = [], {}, []
        for number, cell in layout.cells(cells):
            url, size = _url(cell), None
            try:
                content = read_cell(cell) if url is None or sizes == "all" else None
                parts.append(cell_key(content) if url is None else key_of("url", url))
                size = image_size(content) if sizes != "none" else None
            except CellProblem as problem:
                wrong.append((layout.places[number], problem))
            found[number] = size
        return key_of(*parts), found, wrong

    bar = tqdm(total=len(rows), desc=f"Reading {label}", unit="row", delay=2, disable=not _shows_bars())
    with ThreadPoolExecutor(max_workers=4) as pool, bar:
        for batch, positions in batches(dataset, layout.media, rows, _BATCH):
            for row, (key, found, wrong) in zip(positions, pool.map(read, batch), strict=True):
                if not wrong:
                    keys[row - rows.start : row - rows.start + 1] = as_keys([key])
                for index, size in found.items():
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

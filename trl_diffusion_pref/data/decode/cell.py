"""Cells of a data set that hold an image, a video or audio: their types, their files, and which of the three it is."""

import importlib
import os
from collections.abc import Iterator, Mapping
from numbers import Number
from types import ModuleType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Audio, Image, List, Video
from datasets.utils.file_utils import xopen
from PIL import Image as PILImage


Kind = Literal["image", "video", "audio"]

# What messages call the output of a family of each modality.
GENERATED: dict[str, str] = {"image": "images", "video": "videos", "audio": "audio"}
# First bytes of files, by their position. MP4, HEIF and AVIF share a container, "ftyp"; the brand after it decides.
_SIGNATURES: list[tuple[int, tuple[bytes, ...], Kind]] = [
    (0, (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*"), "image"),
    (0, (b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2"), "audio"),
    (8, (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "image"),
    (8, (b"WEBP", b"mif1", b"mif2", b"msf1", b"avif", b"avis"), "image"),
    (8, (b"WAVE", b"M4A ", b"M4B ", b"M4P "), "audio"),
    (8, (b"AVI ",), "video"),
    (4, (b"ftyp",), "video"),
    (0, (b"\x1a\x45\xdf\xa3",), "video"),
]


# Of one sample. A member of an archive on this machine may claim to be any size.
_MAX_FILE_BYTES = 2**29

# Why a cell cannot be used, in the words of the counts that users see.
ProblemKind = Literal[
    "empty cell",
    "missing file",
    "unreadable file",
    "wrong type",
    "not an image",
    "damaged",
    "animation",
    "too large",
    "too small",
    "too long and thin",
    "wrong length",
    "wrong format",
    "empty mask",
    "missing package",
]


class CellProblem(Exception):
    """A cell cannot be used; the message completes "row 3, column 'chosen': ...".

    Args:
        message: The reason.
        kind: By which such cells are counted.
    """

    def __init__(self, message: str, kind: ProblemKind) -> None:
        super().__init__(message)
        self.kind: ProblemKind = kind


def undecoded_feature(feature: Any) -> Any:
    """A column's type with media as bytes or paths, also inside lists; other types are returned unchanged."""
    if isinstance(feature, (Audio, Image, Video)):
        return type(feature)(decode=False)
    if isinstance(feature, List):
        return List(undecoded_feature(feature.feature), length=feature.length)
    return feature


def read_cell(cell: object) -> object:
    """The bytes of a cell that is a file; any other cell unchanged.

    Args:
        cell: A file is bytes, a path or URL, or a dictionary with `bytes` or a `path`, as undecoded media are stored.
            A path may lead into an archive (`zip://a.png::b.zip`) or to the Hub (`hf://...`).

    Raises:
        CellProblem: The file is missing, empty or too large, or cannot be read; or a URL needs a package that is not
            installed.
    """
    if isinstance(cell, Mapping) and cell.get("array") is None:
        data, path = cell.get("bytes"), cell.get("path")
    else:
        data, path = (None, str(cell)) if isinstance(cell, (str, os.PathLike)) else (None, None)
    data = cell if isinstance(cell, bytes) else data
    if not isinstance(data, bytes):
        if path is None:
            return cell
        if not str(path):
            raise CellProblem("the path is empty", "empty cell")
        data = _read_file(str(path))
    if not data:
        raise CellProblem(
            "the file has no bytes" if path is None else f"the file at {path} has no bytes", "empty cell"
        )
    return data


def _read_file(path: str) -> bytes:
    """The bytes of a file, as `read_cell` reads it."""
    shown = path if len(path) <= 100 else f"{path[:100]}..."
    try:
        # Reading a pipe or a device could wait or go on for ever.
        if "://" not in path and os.path.exists(path) and not os.path.isfile(path):
            what = "a folder" if os.path.isdir(path) else "a pipe or a device"
            raise CellProblem(f"{shown} is {what}, not a file", "unreadable file")
        with xopen(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except CellProblem:
        raise
    except FileNotFoundError as error:
        raise CellProblem(f"no file at {shown}", "missing file") from error
    except ImportError as error:
        raise CellProblem(f"the file at {shown} cannot be read here ({error})", "missing package") from error
    # Archives, URLs and file systems each raise their own exceptions; the reason is in the message.
    except Exception as error:
        message = f"the file at {shown} cannot be read ({type(error).__name__}: {error})"
        raise CellProblem(message, "unreadable file") from error
    if len(data) > _MAX_FILE_BYTES:
        message = f"the file at {shown} has more than {_MAX_FILE_BYTES // 2**20} MiB; store it smaller"
        raise CellProblem(message, "too large")
    return data


def kind_of(cell: object) -> Kind | None:
    """Which kind of sample a cell holds, after `read_cell`, by its type or its first bytes; None if unknown."""
    if isinstance(cell, PILImage.Image):
        return "image"
    if isinstance(cell, (list, tuple)):
        first = cell[0] if cell else None
        while isinstance(first, (list, tuple)) and first:
            first = first[0]
        return None if isinstance(first, Number) else "video"
    if isinstance(cell, Mapping):
        return None if cell.get("array") is None else "audio"
    if not isinstance(cell, bytes):
        return None
    return next((kind for start, signatures, kind in _SIGNATURES if cell.startswith(signatures, start)), None)


def import_extra(package: str, extra: Literal["audio", "video"], purpose: str) -> ModuleType:
    """A package of one of this package's extras.

    Args:
        purpose: What needs it, as the beginning of the message.

    Raises:
        CellProblem: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    # soundfile raises OSError if the C library is missing.
    except (ImportError, OSError) as error:
        message = f"{purpose} needs {package}: pip install 'trl-diffusion-pref[{extra}]'"
        raise CellProblem(message, "missing package") from error


def paths_outside(cells: pa.ChunkedArray) -> Iterator[str]:
    """Paths of the files that an undecoded column refers to, instead of holding their bytes; copies no bytes."""
    for chunk in cells.chunks:
        while any(
            is_list(chunk.type) for is_list in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        ):
            chunk = pc.list_flatten(chunk)
        if pa.types.is_struct(chunk.type):
            names = {field.name for field in chunk.type}
            if not {"bytes", "path"} <= names:
                continue
            outside = pc.fill_null(pc.is_null(pc.struct_field(chunk, "bytes")), False)
            chunk = pc.filter(pc.struct_field(chunk, "path"), outside)
        elif not (pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type)):
            continue
        yield from filter(None, chunk.to_pylist())

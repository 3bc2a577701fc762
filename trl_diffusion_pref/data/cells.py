"""Cells of a data set that hold an image, a clip or sound: their types, their files, and what they turn out to be."""

import io
import os
from collections.abc import Iterator
from numbers import Number
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Audio, Image, List, Video
from datasets.utils.file_utils import xopen
from PIL import Image as PILImage


# What a family's modality is called in messages.
GENERATED = {"image": "images", "video": "clips", "audio": "sound"}
_MEDIA = (Audio, Image, Video)


class CellProblem(Exception):
    """A cell does not hold what it should; the message completes "row 3, column 'chosen': ..."."""


def undecoded_feature(feature: Any) -> Any:
    """A column's type with media as bytes or paths, also inside lists; other types as they are."""
    if isinstance(feature, _MEDIA):
        return type(feature)(decode=False)
    if isinstance(feature, List):
        return List(undecoded_feature(feature.feature), length=feature.length)
    return feature


def as_file(cell: Any) -> Any:
    """A path as the dictionary that `datasets` makes of it; anything else as it is."""
    return {"bytes": None, "path": str(cell)} if isinstance(cell, (str, os.PathLike)) else cell


def open_cell(cell: dict[str, Any]) -> BinaryIO:
    """The file of a dictionary with `bytes` or a `path`, which may lie inside an archive or on the Hub."""
    return io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else xopen(cell["path"], "rb")


def is_file(cell: Any) -> bool:
    """Whether a cell, after `as_file`, is a dictionary with bytes or a path."""
    return isinstance(cell, dict) and not (cell.get("bytes") is None and cell.get("path") is None)


def kind_of(cell: Any) -> str | None:
    """What a cell holds, "image", "video" or "audio", by its type or its file's first bytes; None where unknown."""
    cell = as_file(cell)
    if isinstance(cell, PILImage.Image):
        return "image"
    if isinstance(cell, (list, tuple)):
        first = cell[0] if cell else None
        while isinstance(first, (list, tuple)) and first:
            first = first[0]
        return None if isinstance(first, Number) else "video"
    if isinstance(cell, dict) and cell.get("array") is not None:
        return "audio"
    if not is_file(cell):
        return None
    try:
        with open_cell(cell) as file:
            head = file.read(16)
    except OSError:
        return None
    return _kind_of_file(head)


def _kind_of_file(head: bytes) -> str | None:
    if head[:4] == b"RIFF":
        return {b"WAVE": "audio", b"AVI ": "video", b"WEBP": "image"}.get(head[8:12])
    if head[4:8] == b"ftyp":
        # One container for all three; the brand says what is inside.
        return {b"avif": "image", b"heic": "image", b"mif1": "image", b"M4A ": "audio"}.get(head[8:12], "video")
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")):
        return "image"
    if head.startswith((b"fLaC", b"OggS", b"ID3", b"\xff\xfb")):
        return "audio"
    return "video" if head.startswith(b"\x1a\x45\xdf\xa3") else None


def check_kind(cell: Any, wanted: str, pipeline_class: str) -> None:
    """Refuses a cell that is known to hold something else than the pipeline generates.

    Raises:
        CellProblem: Says what was found and what the pipeline generates.
    """
    found = kind_of(cell)
    if found not in (None, wanted):
        article = {"image": "an image", "video": "a clip", "audio": "sound"}[found]
        raise CellProblem(f"found {article}, but {pipeline_class} generates {GENERATED[wanted]}")


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

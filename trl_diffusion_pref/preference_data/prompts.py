"""Reads prompts, with the images that they say how to edit: from a list, a file or a data set, each once."""

import csv
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from datasets import Dataset

from ..data.decode.cell import undecoded_feature
from ..data.known_layouts import condition_columns
from ..data.load import absolute_cell, read_source
from ..data.shards import key_of
from ..evaluation.condition_images import ConditionImages, Conditions, keys, select


logger = logging.getLogger(__name__)

_KINDS = ".txt, .json, .jsonl, .csv, .parquet"
_BLANK_LINE = object()


@dataclass(frozen=True)
class Edits:
    """Prompts, each once, with the images that they say how to edit.

    Args:
        prompts: At least one.
        images: Of each prompt, by their column, such as `image` and `mask_image`; empty where there are none.
    """

    prompts: list[str]
    images: Conditions = field(default_factory=dict)


Prompts: TypeAlias = str | os.PathLike[str] | Sequence[str] | Dataset | Edits


class _Row(NamedTuple):
    """Where a prompt stands, in words; the prompt; and cells of what is to be edited by their column."""

    place: str
    prompt: Any
    images: Mapping[str, Any] = MappingProxyType({})


def read_prompts(source: Prompts) -> list[str]:
    """Prompts in order, each once.

    Args:
        source: A list of texts; a data set with the column `prompt`; or a file: `.txt` with one prompt per line,
            `.csv` or `.parquet` with a column `prompt`, `.jsonl` or `.json` with texts or objects that have a
            `prompt`; or the folder of a stored data set. White space around prompts is removed.

    Returns:
        At least one prompt. Prompts that come again, and blank lines, are left out; a warning counts them.

    Raises:
        ValueError: No file or no prompts, a file that cannot be read, or a prompt that is empty or no text; the
            message names the line or row.
    """
    if isinstance(source, Edits):
        return source.prompts
    label, found = _rows(source)
    return _distinct(label, found)


def read_edits(source: Prompts) -> Edits:
    """Prompts, and the images to edit where the source has them: each prompt once for each image.

    Args:
        source: As for `read_prompts`; images are in the column `image`, or under this name in objects, as an image or
            a list of images; or as lists in the column `images`; masks are in `mask_image`. Paths are relative to the
            file that holds them.

    Raises:
        ValueError: As `read_prompts`; or an image that is missing or cannot be read; the message names the line or
            row.
    """
    if isinstance(source, Edits):
        return source
    label, found = _rows(source)
    rows = list(found)
    columns = list(dict.fromkeys(column for row in rows for column in row.images))
    if not columns:
        return Edits(_distinct(label, rows))
    blank = [row for row in rows if row.prompt is _BLANK_LINE]
    rows = [row for row in rows if row.prompt is not _BLANK_LINE]
    texts = [_text(label, row) for row in rows]
    images = {
        column: ConditionImages(
            [row.images.get(column) for row in rows], [f"{label}, {row.place}, column '{column}'" for row in rows]
        )
        for column in columns
    }
    first: dict[Any, int] = {}
    for number, asked in enumerate(zip(texts, keys(images, len(texts)), strict=True)):
        first.setdefault(asked, number)
    kept = list(first.values())
    left_out = [f"{len(rows) - len(kept)} whose prompt and image came before"] * (len(kept) < len(rows))
    left_out += [f"{len(blank)} blank line{'s' * (len(blank) != 1)}"] * bool(blank)
    if left_out:
        logger.warning("%s: %d prompts; left out: %s.", label, len(kept), " and ".join(left_out))
    return Edits([texts[number] for number in kept], select(images, kept))


def edits_digest(edits: Edits) -> str:
    """Equal for equal prompts with equal images, for records of what was made from them."""
    images = keys(edits.images, len(edits.prompts)) if edits.images else []
    return key_of(edits.prompts, *(key_of(*own) for own in images)).hex()


def _distinct(label: str, rows: Iterator[_Row] | list[_Row]) -> list[str]:
    """The prompts of some rows, each once."""
    kept: dict[str, str] = {}
    again = blank = 0
    for row in rows:
        if row.prompt is _BLANK_LINE:
            blank += 1
            continue
        text = _text(label, row)
        if text in kept:
            again += 1
        else:
            kept[text] = row.place
    left_out = [f"{blank} blank line{'s' * (blank != 1)}"] * bool(blank)
    left_out += [f"{again} prompt{'s' * (again != 1)} that came before"] * bool(again)
    if left_out:
        logger.warning("%s: %d prompts; left out: %s.", label, len(kept), " and ".join(left_out))
    if not kept:
        raise ValueError(f"{label} has no prompts.")
    return [*kept]


def _text(label: str, row: _Row) -> str:
    """A row's prompt, without white space around it."""
    if not isinstance(row.prompt, str):
        raise ValueError(f"{label}, {row.place}: {row.prompt!r} is no text. Each prompt must be a string.")
    text = row.prompt.strip()
    if not text:
        raise ValueError(f"{label}, {row.place}: the prompt is empty. Remove it, or fill it in.")
    return text


# ---- Kinds of sources --------------------------------------------------------------------------------------------


def _rows(source: str | os.PathLike[str] | Sequence[str] | Dataset) -> tuple[str, Iterator[_Row]]:
    """What messages call a source, and its rows."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        if not path.is_dir() and path.suffix != ".parquet":
            return str(path), _from_file(path)
        dataset, _ = read_source(path, any_columns=True)
        assert isinstance(dataset, Dataset)
        return str(path), _from_dataset(f"{path}", dataset)
    if isinstance(source, Dataset):
        return "prompts", _from_dataset("The data set of prompts", source)
    return "prompts", (_Row(f"number {number}", prompt) for number, prompt in enumerate(source))


def _from_dataset(label: str, dataset: Dataset) -> Iterator[_Row]:
    if "prompt" not in dataset.column_names:
        raise ValueError(f"{label} has no column prompt; found: {', '.join(dataset.column_names)}.")
    named = condition_columns(dataset.column_names)
    undecoded = dataset.select_columns(["prompt", *named.values()]).with_format(None)
    for column in named.values():
        undecoded = undecoded.cast_column(column, undecoded_feature(undecoded.features[column]))
    for row, cells in enumerate(undecoded):
        yield _Row(f"row {row}", cells["prompt"], {name: cells[column] for name, column in named.items()})


def _from_file(path: Path) -> Iterator[_Row]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file. Pass a file of prompts ({_KINDS}) or a list of texts.")
    readers = {".txt": _lines, ".csv": _csv, ".json": _json, ".jsonl": _json_lines}
    if path.suffix not in readers:
        raise ValueError(f"{path}: a file with the suffix {path.suffix!r} is none of {_KINDS}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Prompts must be text in UTF-8.") from error
    return readers[path.suffix](path, text)


def _lines(path: Path, text: str) -> Iterator[_Row]:
    if not text:
        return
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        yield _Row(f"line {number}", line if line.strip() else _BLANK_LINE)


def _csv(path: Path, text: str) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = list(reader.fieldnames or [])
    if columns and "prompt" not in columns:
        raise ValueError(f"{path} has no column prompt; its columns: {', '.join(columns)}.")
    for row in reader:
        # A row that ends early has no prompt.
        yield _row_of(path, f"line {reader.line_num}", row | {"prompt": row["prompt"] or ""})


def _json(path: Path, text: str) -> Iterator[_Row]:
    entries = _parsed(path, "", text) if text.strip() else []
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}; wanted a list of prompts.")
    for number, entry in enumerate(entries):
        yield _row_of(path, f"entry {number}", entry)


def _json_lines(path: Path, text: str) -> Iterator[_Row]:
    for row in _lines(path, text):
        blank = row.prompt is _BLANK_LINE
        yield row if blank else _row_of(path, row.place, _parsed(path, row.place, row.prompt))


def _parsed(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}{', ' * bool(place)}{place}: no JSON ({error}).") from error


def _row_of(path: Path, place: str, entry: Any) -> _Row:
    """A row of a file: a text, or an object with a prompt."""
    if not isinstance(entry, Mapping):
        return _Row(place, entry)
    if "prompt" not in entry:
        raise ValueError(f"{path}, {place}: has no prompt; its names: {', '.join(entry)}.")
    images = {
        name: absolute_cell(entry[column], path.resolve().parent)
        for name, column in condition_columns(entry.keys()).items()
    }
    return _Row(place, entry["prompt"], images)

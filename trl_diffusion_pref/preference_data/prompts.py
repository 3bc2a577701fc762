"""Reads prompts: from a list, a file or a data set, each once."""

import csv
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset

from ..data.content import cell_key
from ..data.decode.cell import CellProblem, undecoded_feature
from ..data.decode.image import decode_image


logger = logging.getLogger(__name__)

Prompts: TypeAlias = str | os.PathLike[str] | Sequence[str] | Dataset
_KINDS = ".txt, .json, .jsonl, .csv"
_BLANK_LINE = object()


def read_prompts(source: Prompts) -> list[str]:
    """Prompts in order, each once.

    Args:
        source: A list of texts; a data set with the column `prompt`; or a file: `.txt` with one prompt per line,
            `.csv` with a column `prompt`, `.jsonl` or `.json` with texts or objects that have a `prompt`. White space
            around prompts is removed.

    Returns:
        At least one prompt. Prompts that come again, and blank lines, are left out; a warning counts them.

    Raises:
        ValueError: No file or no prompts, a file that cannot be read, or a prompt that is empty or no text; the
            message names the line or row.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        label, found = str(path), _from_file(path)
    elif isinstance(source, Dataset):
        if "prompt" not in source.column_names:
            raise ValueError(f"The data set of prompts has no column prompt; found: {', '.join(source.column_names)}.")
        label, found = "prompts", ((f"row {row}", prompt) for row, prompt in enumerate(source["prompt"]))
    else:
        label, found = "prompts", ((f"number {number}", prompt) for number, prompt in enumerate(source))
    kept: dict[str, str] = {}
    again = blank = 0
    for place, prompt in found:
        if prompt is _BLANK_LINE:
            blank += 1
            continue
        if not isinstance(prompt, str):
            raise ValueError(f"{label}, {place}: {prompt!r} is no text. Each prompt must be a string.")
        text = prompt.strip()
        if not text:
            raise ValueError(f"{label}, {place}: the prompt is empty. Remove it, or fill it in.")
        if text in kept:
            again += 1
        else:
            kept[text] = place
    left_out = [f"{blank} blank line{'s' * (blank != 1)}"] * bool(blank)
    left_out += [f"{again} prompt{'s' * (again != 1)} that came before"] * bool(again)
    if left_out:
        logger.warning("%s: %d prompts; left out: %s.", label, len(kept), " and ".join(left_out))
    if not kept:
        raise ValueError(f"{label} has no prompts.")
    return [*kept]


def read_edits(source: Dataset) -> tuple[list[str], list[Any]]:
    """Prompts with the images that they say how to edit, each prompt once for each image.

    Args:
        source: Columns `prompt` and `image`.

    Returns:
        The prompts, and as many cells with images, not decoded.

    Raises:
        ValueError: As `read_prompts`; or an image that is missing or cannot be read; the message names the row.
    """
    undecoded = source.cast_column("image", undecoded_feature(source.features["image"]))
    kept: dict[tuple[str, bytes], Any] = {}
    for row, (prompt, image) in enumerate(zip(undecoded["prompt"], undecoded["image"], strict=True)):
        (text,) = read_prompts([prompt]) if isinstance(prompt, str) and prompt.strip() else (None,)
        if text is None:
            raise ValueError(f"prompts, row {row}: {prompt!r} is empty or no text. Remove it, or fill it in.")
        try:
            kept.setdefault((text, cell_key(decode_image(image))), image)
        except CellProblem as problem:
            raise ValueError(f"prompts, row {row}, column 'image': {problem}.") from problem
    if not kept:
        raise ValueError("prompts has no rows.")
    if left_out := len(undecoded) - len(kept):
        logger.warning("prompts: %d rows; left out: %d whose prompt and image came before.", len(kept), left_out)
    return [text for text, _ in kept], [*kept.values()]


def _from_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each prompt stands, in words, and the prompt."""
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


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if not text:
        return
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        yield f"line {number}", line if line.strip() else _BLANK_LINE


def _csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = list(reader.fieldnames or [])
    if columns and "prompt" not in columns:
        raise ValueError(f"{path} has no column prompt; its columns: {', '.join(columns)}.")
    for row in reader:
        # A row that ends early has no prompt.
        yield f"line {reader.line_num}", row["prompt"] or ""


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    entries = _parsed(path, "", text) if text.strip() else []
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}; wanted a list of prompts.")
    for number, entry in enumerate(entries):
        yield f"entry {number}", _prompt_of(path, f"entry {number}", entry)


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for place, line in _lines(path, text):
        yield place, line if line is _BLANK_LINE else _prompt_of(path, place, _parsed(path, place, line))


def _parsed(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}{', ' * bool(place)}{place}: no JSON ({error}).") from error


def _prompt_of(path: Path, place: str, entry: Any) -> Any:
    if isinstance(entry, dict):
        if "prompt" not in entry:
            raise ValueError(f"{path}, {place}: has no prompt; its names: {', '.join(entry)}.")
        return entry["prompt"]
    return entry

"""A picture of randomly chosen rows: condition images and samples side by side, the prompt below them."""

import heapq
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..data.decode.audio import decode_audio
from ..data.decode.cell import CellProblem, kind_of, read_cell
from ..data.shards import key_of
from .rows import SourceRows
from .sample_facts import first_picture


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]

# In pixels.
_SIDE, _GAP, _MARGIN, _PADDING = 256, 6, 24, 12
_TITLE_SIZE, _TEXT_SIZE, _LINE = 15, 14, 19
_COLUMNS, _PROMPT_LINES = 3, 4
_PAPER, _CARD, _EMPTY = (236, 237, 240), (255, 255, 255), (222, 224, 228)
_INK, _GREY, _GOOD, _BAD = (28, 30, 36), (110, 115, 125), (32, 128, 72), (190, 48, 48)
_WAVE = (60, 100, 170)
# Files with many letters, looked for where systems keep their fonts; the first has those of most languages.
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "arial.ttf",
    "msyh.ttc",
    "malgun.ttf",
)
# A letter that no font has, so that it is drawn as what stands for missing letters.
_NO_LETTER = "\U0010fffe"


class SheetChoice:
    """A random choice of rows, the same for a data set that is stored and one that is streamed.

    Args:
        count: How many are chosen.
        seed: Of the choice.

    Attributes:
        cells: The samples of those that are chosen and the condition images of their rows, by their number, once they
            have been read.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.cells: dict[int, Any] = {}
        # The one that is least likely to stay comes first.
        self._chosen: list[tuple[int, tuple[int, ...]]] = []

    def offer(self, numbers: Iterable[tuple[int, ...]]) -> None:
        """Takes in what there is: row, and numbers of samples."""
        for found in numbers if self.count else ():
            rank = -int.from_bytes(key_of("contact sheet", self.seed, found)[:8])
            if len(self._chosen) < self.count:
                heapq.heappush(self._chosen, (rank, found))
            elif rank > self._chosen[0][0]:
                heapq.heapreplace(self._chosen, (rank, found))

    @property
    def numbers(self) -> list[tuple[int, ...]]:
        """What is chosen of all that was offered."""
        return [found for _, found in self._chosen]

    def keep(self, samples: Iterable[tuple[int, Any]]) -> None:
        """Keeps those samples that are shown, and drops those that no longer are."""
        if self.count:
            shown = {number for _, *numbers in self.numbers for number in numbers}
            rows = {row for row, *_ in self.numbers}
            self.cells = {
                number: cell
                for number, cell in (*self.cells.items(), *samples)
                if number in shown or (SourceRows.is_condition(number) and SourceRows.row_of(number) in rows)
            }


@dataclass(frozen=True)
class SheetSample:
    """A sample on a sheet.

    Args:
        name: What stands above it; "" for nothing.
        cell: Undecoded.
    """

    name: str
    cell: Any


@dataclass(frozen=True)
class SheetEntry:
    """A row on a sheet.

    Args:
        title: What stands above it.
        remarks: What is wrong with it.
        prompt: What stands below it.
        samples: From left to right.
    """

    title: str
    remarks: tuple[str, ...]
    prompt: str
    samples: tuple[SheetSample, ...]


def draw_sheet(path: Path, entries: Sequence[SheetEntry], font: str | os.PathLike[str] | None) -> list[str]:
    """Writes a contact sheet as PNG, in whole or not at all.

    Args:
        path: Its folder is made if it does not exist.
        entries: At least one.
        font: A file for the prompts; None for a font of this machine.

    Returns:
        What the reader should know, in sentences.

    Raises:
        ValueError: The font cannot be read.
    """
    fonts = _fonts(font)
    count = max(len(entry.samples) for entry in entries)
    columns = min(_COLUMNS if count == 1 else _COLUMNS - 1, len(entries))
    cards, unknown = [], 0
    for entry in entries:
        prompt_font, missing = _font_for(entry.prompt, fonts)
        unknown += missing > 0
        cards.append(_card(entry, prompt_font, count))
    rows = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) for row in rows]
    width = columns * cards[0].width + (columns + 1) * _MARGIN
    sheet = Image.new("RGB", (width, sum(heights) + (len(rows) + 1) * _MARGIN), _PAPER)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            left = _MARGIN + column * (card.width + _MARGIN)
            sheet.paste(_CARD, (left, top, left + card.width, top + height))
            sheet.paste(card, (left, top))
        top += height + _MARGIN
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        sheet.save(unfinished, format="PNG")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    if not unknown:
        return []
    what = "The font has" if font is not None else "The fonts found on this machine have"
    return [
        f"{what} not all letters of {unknown} prompt{'s' * (unknown != 1)} on the contact sheet, which are drawn as "
        "boxes; pass font='a file with these letters'."
    ]


def _card(entry: SheetEntry, prompt_font: Font, count: int) -> Image.Image:
    """One row, with white around it, as wide as one of so many samples."""
    width = count * _SIDE + (count - 1) * _GAP + 2 * _PADDING
    lines = _wrapped(entry.prompt, prompt_font, width - 2 * _PADDING)
    named = any(sample.name for sample in entry.samples)
    images_top = _PADDING + _LINE + 4 + named * (_LINE + 2)
    text_top = images_top + _SIDE + 8
    card = Image.new("RGB", (width, text_top + len(lines) * _LINE + _PADDING), _CARD)
    draw, title_font = ImageDraw.Draw(card), ImageFont.load_default(_TITLE_SIZE)
    draw.text((_PADDING, _PADDING), entry.title, _INK, font=title_font)
    if entry.remarks:
        left = _PADDING + title_font.getlength(entry.title + "   ")
        draw.text((left, _PADDING), ", ".join(entry.remarks), _BAD, font=title_font)
    for number, sample in enumerate(entry.samples):
        left = _PADDING + number * (_SIDE + _GAP)
        if sample.name:
            colour = {"chosen": _GOOD, "rejected": _BAD}.get(sample.name, _GREY)
            draw.rectangle((left, images_top - 4, left + _SIDE - 1, images_top - 1), fill=colour)
            draw.text((left, images_top - _LINE - 4), sample.name, colour, font=ImageFont.load_default(_TEXT_SIZE))
        card.paste(_thumbnail(sample.cell), (left, images_top))
        # So that pictures on white have an edge.
        draw.rectangle((left, images_top, left + _SIDE - 1, images_top + _SIDE - 1), outline=_EMPTY)
    for number, line in enumerate(lines):
        draw.text((_PADDING, text_top + number * _LINE), line, _INK, font=prompt_font)
    return card


def _thumbnail(cell: Any) -> Image.Image:
    """A sample in a square: an image or first frame, whole; a waveform; or why there is none."""
    square = Image.new("RGB", (_SIDE, _SIDE), _EMPTY)
    try:
        content = read_cell(cell)
        if kind_of(content) == "audio":
            return _waveform(content, square)
        picture = ImageOps.contain(first_picture(content, _SIDE), (_SIDE, _SIDE), Image.Resampling.LANCZOS)
    except CellProblem as problem:
        font = ImageFont.load_default(_TEXT_SIZE)
        draw = ImageDraw.Draw(square)
        for number, line in enumerate(_wrapped(str(problem), font, _SIDE - 2 * _PADDING, lines=9)):
            draw.text((_PADDING, _PADDING + number * _LINE), line, _BAD, font=font)
        return square
    square.paste(picture, ((_SIDE - picture.width) // 2, (_SIDE - picture.height) // 2))
    return square


def _waveform(cell: object, square: Image.Image) -> Image.Image:
    """The range of the samples in each column of pixels, all channels together."""
    waveform = decode_audio(cell)
    draw, middle = ImageDraw.Draw(square), _SIDE // 2
    for column, part in enumerate(np.array_split(waveform.samples.numpy(), _SIDE, axis=1)):
        if part.size:
            low, high = float(part.min().clip(-1, 1)), float(part.max().clip(-1, 1))
            draw.line((column, middle - high * middle * 0.9, column, middle - low * middle * 0.9), _WAVE)
    seconds = waveform.samples.shape[1] / waveform.rate
    draw.text((_PADDING, _PADDING), f"{seconds:.3g} s, {waveform.rate} Hz", _GREY, ImageFont.load_default(_TEXT_SIZE))
    return square


# ---- Text --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _installed() -> tuple[Font, ...]:
    """Those of `_FONTS` that this machine has, and Pillow's own, which has Latin letters."""
    found: list[Font] = []
    for name in _FONTS:
        try:
            found.append(ImageFont.truetype(name, _TEXT_SIZE))
        # Pillow looks in the folders of the system.
        except OSError:
            continue
    return (*found, ImageFont.load_default(_TEXT_SIZE))


def _fonts(font: str | os.PathLike[str] | None) -> tuple[Font, ...]:
    if font is None:
        return _installed()
    try:
        return (ImageFont.truetype(os.fspath(font), _TEXT_SIZE),)
    except OSError as error:
        raise ValueError(f"font={str(font)!r} cannot be read as a TrueType or OpenType font ({error}).") from error


def _font_for(text: str, fonts: Sequence[Font]) -> tuple[Font, int]:
    """The first font with the fewest missing letters, and how many are missing."""
    letters = {letter for letter in text if not letter.isspace() and unicodedata.category(letter)[0] != "C"}
    missing = [sum(not _has(font, letter) for letter in letters) for font in fonts]
    best = missing.index(min(missing))
    return fonts[best], missing[best]


def _has(font: Font, letter: str) -> bool:
    """Whether a font draws a letter in another way than one that it does not have."""
    return _drawn(font, letter) != _drawn(font, _NO_LETTER)


@lru_cache(maxsize=4096)
def _drawn(font: Font, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def _wrapped(text: str, font: Font, width: int, lines: int = _PROMPT_LINES) -> list[str]:
    """A text in at most so many lines, each as long as the width in pixels allows, and cut where it is longer."""
    text = " ".join(text.split())
    wrapped: list[str] = []
    while text and len(wrapped) < lines:
        end = _fitting(text, font, width)
        # At a space if there is one; languages without spaces are divided between letters.
        if end < len(text) and " " in text[: end + 1]:
            end = text.rindex(" ", 0, end + 1)
        wrapped.append(text[:end])
        text = text[end:].lstrip()
    if text:
        last = wrapped[-1]
        wrapped[-1] = last[: _fitting(last, font, width - int(font.getlength("...")))] + "..."
    return wrapped


def _fitting(text: str, font: Font, width: int) -> int:
    """How many letters of a text fit, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low

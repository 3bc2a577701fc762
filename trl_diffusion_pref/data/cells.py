"""Cells with prompts and with numbers: what they hold, and which cannot be used."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch

from ..diffusion.randomness import CAPTION, generator_for
from .bad_rows import RowProblem
from .layouts import Between, Layout, OneOf


def captions_of(cell: Any) -> list[str]:
    """The captions of a cell of the column `prompt`: one, or several among which training chooses."""
    captions = cell if isinstance(cell, (list, tuple)) else [cell]
    return [caption for caption in captions if isinstance(caption, str)]


def scalar_problems(
    columns: Mapping[str, Sequence[Any]], layout: Layout, lengths: Sequence[int] | np.ndarray | None = None
) -> list[RowProblem]:
    """Numbers that are missing, no numbers, not finite, out of their range, or too few, with their rows from 0.

    Args:
        columns: The cells of the layout's columns of numbers.
        lengths: How many samples each row has, where rows have several numbers of them.
    """
    problems, per_sample = [], layout.samples_per_cell
    for column, cells in columns.items():
        allowed = layout.ranges.get(column)
        for row, cell in enumerate(cells):
            if per_sample is None:
                reason = _problem_of_number(cell, allowed)
            elif not isinstance(cell, (list, tuple, np.ndarray)):
                count = per_sample if layout.fewest_per_cell is None else "so many"
                reason = f"is {_shown(cell)}, not a list of {count} numbers"
            elif len(cell) != (found := per_sample if lengths is None else lengths[row]):
                reason = f"has {len(cell)} numbers for {found} samples"
            else:
                reason = next(filter(None, (_problem_of_number(value, allowed) for value in cell)), None)
            if reason is not None:
                problems.append(RowProblem(row, f"column '{column}'", reason, "unusable label"))
    return problems


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _problem_of_number(value: object, allowed: Between | OneOf | None) -> str | None:
    if not isinstance(value, Real) or (isinstance(value, (bool, np.bool_)) and not isinstance(allowed, OneOf)):
        return f"is {_shown(value)}, not a number"
    if not math.isfinite(value):
        return f"is {float(value)}, not a finite number"
    return None if allowed is None or value in allowed else f"is {float(value):g}, not {allowed}"


def prompt_problems(cells: Sequence[Any]) -> list[RowProblem]:
    """Prompts that are empty or no strings, with their rows, which are counted from 0."""
    problems = []
    for row, cell in enumerate(cells):
        captions = cell if isinstance(cell, (list, tuple)) else [cell]
        for caption in captions or [""]:
            if not isinstance(caption, str):
                kind = "empty prompt" if caption is None else "wrong type"
                reason = "is None" if caption is None else f"is {type(caption).__name__}, not a string"
            elif not caption.strip():
                kind, reason = "empty prompt", "is empty"
            else:
                continue
            problems.append(RowProblem(row, "column 'prompt'", reason, kind))
            break
    return problems


def caption_number(count: int, seed: int, row: int, epoch: int) -> int:
    """Which of a row's captions is used in an epoch: one drawn from the row's own random numbers."""
    if count == 1:
        return 0
    return int(torch.randint(count, (1,), generator=generator_for(seed, CAPTION, row, epoch)))

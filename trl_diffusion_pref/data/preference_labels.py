"""Reads the labels of one row: which of its samples is better, as one number per sample.

Each reader takes the row's label cells by the layout's column names, and the preference dimension, which only
`dimensions` uses. It returns one number per sample, where higher is better, or None if nobody has judged the row.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal


Dimension = Literal["majority", "VQ", "MQ", "TA"]
Cells = Mapping[str, object]
Scores = Sequence[float] | None

PREFERS_FIRST, PREFERS_SECOND, TIE = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)


class LabelProblem(Exception):
    """A row's labels cannot be used.

    Args:
        columns: Where, by the layout's names of columns.
        reason: Completes "row 3, column 'label_0': ...".
    """

    def __init__(self, columns: str | Sequence[str], reason: str) -> None:
        super().__init__(reason)
        self.columns = (columns,) if isinstance(columns, str) else tuple(columns)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _number(column: str, value: object) -> float:
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise LabelProblem(column, f"is {_shown(value)}, not a finite number")


def by_name(cells: Cells, dimension: Dimension) -> Scores:
    """The column's name says which sample was preferred."""
    return PREFERS_FIRST


def one_of(
    cells: Cells, dimension: Dimension, column: str, meanings: Mapping[object, Scores], text: bool = False
) -> Scores:
    """A label with few values.

    Args:
        meanings: The scores that each value stands for.
        text: Whether the value is a number that is written as text.
    """
    if cells.get("has_label") is False:
        return None
    value = cells[column]
    try:
        return meanings[float(value) if text and isinstance(value, str) else value]
    # TypeError: a list, which cannot be a key. ValueError: text that is not a number.
    except (KeyError, TypeError, ValueError) as error:
        raise LabelProblem(column, f"is {_shown(value)}, not one of {', '.join(map(str, meanings))}") from error


def _list_of_numbers(cells: Cells, column: str) -> list[float]:
    values = cells[column]
    if not isinstance(values, (list, tuple)):
        raise LabelProblem(column, f"is {_shown(values)}, not a list with one number per sample")
    return [_number(column, value) for value in values]


def list_of_scores(cells: Cells, dimension: Dimension, column: str, allowed: Sequence[float] = ()) -> Scores:
    """Higher scores are better. `allowed`: the only values that there may be."""
    values = _list_of_numbers(cells, column)
    if allowed and not set(values) <= set(allowed):
        raise LabelProblem(column, f"is {_shown(cells[column])}, not a list of {' and '.join(map(str, allowed))}")
    return values


def list_of_ranks(cells: Cells, dimension: Dimension, column: str) -> Scores:
    """Lower ranks are better."""
    return [-value for value in _list_of_numbers(cells, column)]


def rank(cells: Cells, dimension: Dimension, column: str) -> Scores:
    """The rank of the row's only sample; lower is better."""
    return [-_number(column, cells[column])]


def confidence(cells: Cells, dimension: Dimension, column: str) -> Scores:
    """The probability that the first sample is better; where it was not estimated, the order alone counts."""
    if cells[column] is None:
        return PREFERS_FIRST
    value = _number(column, cells[column])
    if not 0 <= value <= 1:
        raise LabelProblem(column, f"is {value:g}, not in [0, 1]")
    return value, 1 - value


def _vote_shares(first: float, second: float, columns: Sequence[str]) -> Scores:
    if min(first, second) < 0:
        raise LabelProblem(columns, f"{first:g} and {second:g} are not numbers of votes")
    total = first + second
    return (first / total, second / total) if total else None


def votes(cells: Cells, dimension: Dimension, columns: tuple[str, str]) -> Scores:
    """Votes for each of two samples, possibly weighted, as shares."""
    first, second = (_number(column, cells[column]) for column in columns)
    return _vote_shares(first, second, columns)


def votes_in_json(cells: Cells, dimension: Dimension, column: str) -> Scores:
    """`{"a.jpg": 7, "b.jpg": 3}`, or `{"votes": [{"votedFor": "a.jpg"}, ...]}`, or that list alone, as text.

    The images are called as the columns `image1_path` and `image2_path` say, or else "image1" and "image2".
    """
    cell = cells[column]
    try:
        found: Any = json.loads(cell) if isinstance(cell, (str, bytes)) else cell
        voted = found.get("votes", found) if isinstance(found, dict) else found
        if isinstance(voted, list):
            voted = Counter(vote["votedFor"] for vote in voted)
        counts = {str(name): _number(column, count) for name, count in voted.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LabelProblem(
            column,
            f"is {_shown(cell)}, neither the number of votes by image nor a list of votes with 'votedFor', as JSON",
        ) from error
    names = [str(cells.get(f"{image}_path", image)) for image in ("image1", "image2")]
    if not set(counts) <= set(names):
        other = next(name for name in counts if name not in names)
        raise LabelProblem(
            column,
            f"votes for {_shown(other)}, but the images are called {names[0]!r} and {names[1]!r}; add columns "
            "image1_path and image2_path with their names, or votes_image1 and votes_image2",
        )
    return _vote_shares(counts.get(names[0], 0), counts.get(names[1], 0), (column,))


_AB: Mapping[object, Scores] = {"A": PREFERS_FIRST, "B": PREFERS_SECOND, "same": TIE}


def dimensions(cells: Cells, dimension: Dimension, columns: tuple[str, ...]) -> Scores:
    """One dimension, or for "majority" the sample that is better in more of them."""
    asked = columns if dimension == "majority" else (dimension,)
    values = [one_of(cells, dimension, column, _AB) for column in asked]
    first, second = (sum(scores[index] for scores in values if scores is not None) for index in (0, 1))
    return TIE if first == second else PREFERS_FIRST if first > second else PREFERS_SECOND

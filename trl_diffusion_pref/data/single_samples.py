"""Rows of one sample each, also from pairs: a pair says of two samples which one was liked."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets

from .bad_rows import RowProblem
from .known_layouts import recognise_layout
from .layouts import PAIRS, Layout, column_names
from .pair_options import PairOptions
from .pair_rows import undecoded_stream
from .pair_source import PairSource, RowSource, renamed
from .pairs import convert
from .stored import with_column


# Rows of a stream of pairs that are in memory at once.
_PAIRS_AT_ONCE = 16


@dataclass(frozen=True)
class SideSource:
    """The pairs that rows of single samples were made of, one after the other.

    Args:
        sides: Which samples of a pair became rows, in this order.
        column: What they are called in the rows.
        pairs: Where the pairs come from, if they are no rows of the data set.
        rows: How many rows the data set has.
    """

    sides: tuple[str, ...]
    column: str
    pairs: PairSource | None
    rows: int

    @property
    def problems(self) -> list[RowProblem]:
        return [] if self.pairs is None else list(self.pairs.problems)

    def all_problems(self, of_rows: list[RowProblem]) -> list[RowProblem]:
        """Problems of rows and of the pairs' labels, by the rows of the data set."""
        return [*self.problems, *map(self._named, of_rows)]

    def _named(self, problem: RowProblem) -> RowProblem:
        pair, side = divmod(problem.row, len(self.sides))
        place = renamed(problem.place, {self.column: f"'{self.sides[side]}'"})
        problem = replace(problem, row=pair, place=place)
        return problem if self.pairs is None else self.pairs.named(problem)


def single_samples(
    dataset: Dataset | IterableDataset,
    label: str,
    layout: Layout,
    options: PairOptions,
    *,
    sides: Mapping[str, float],
    scalar: str | None,
    soft: bool = False,
) -> tuple[Dataset | IterableDataset, RowSource | None]:
    """A data set as rows of one sample; one that has them already is returned as it is.

    Pairs of any known layout become one row for each side, without copying what `as_pairs` does not copy.

    Args:
        label: How messages call the data set.
        layout: Of the rows; the first of its samples is their column.
        options: How rows become pairs.
        sides: Which of "chosen" and "rejected" become rows, and the number that each gets.
        scalar: The column of these numbers; None for rows without.
        soft: Whether a pair's `soft_label` s, where it has one, takes the numbers' place: s and 1 - s.

    Returns:
        The rows, and where they come from, if they were made of pairs.

    Raises:
        ValueError: As `as_pairs`; or the pairs have a column that is called like that of the rows.
    """
    columns, [column] = column_names(dataset), layout.samples
    is_pairs = set(PAIRS.samples) <= set(columns)
    if not is_pairs and (column in columns or not _known(columns, label, options)):
        return dataset, None
    pairs, _, source = convert(dataset, label, options)
    found = column_names(pairs)
    if column in found:
        raise ValueError(
            f"{label} has the columns chosen and rejected beside {column}, which for this pipeline is the column of "
            f"single samples. Remove one of them: remove_columns(['chosen', 'rejected']), or "
            f"remove_columns('{column}')."
        )
    soft = soft and "soft_label" in found
    kept = [name for name in found if name not in (*PAIRS.samples, "soft_label", scalar)]
    if isinstance(pairs, IterableDataset):
        return _streamed(pairs, column, sides, scalar, kept, soft), None
    parts = []
    for side, number in sides.items():
        part = pairs.select_columns([*kept, side]).rename_column(side, column)
        if scalar is not None:
            values = np.full(len(pairs), number)
            if soft:
                labels = np.asarray(pairs["soft_label"], dtype=np.float64)
                values = labels if side == "chosen" else 1 - labels
            part = with_column(part, scalar, values)
        parts.append(part)
    order = np.arange(len(parts) * len(pairs)).reshape(len(parts), -1).T.flatten()
    rows = parts[0] if len(parts) == 1 else concatenate_datasets(parts).select(order)
    count = len(dataset) if isinstance(dataset, Dataset) else 0
    return rows, SideSource(tuple(sides), column, source, count)


def _known(columns: list[str], label: str, options: PairOptions) -> bool:
    """Whether columns hold pairs in a known layout; where they were to be renamed, an error says why not."""
    try:
        recognise_layout(columns, label, options.column_map)
    except ValueError:
        if options.column_map:
            raise
        return False
    return True


def _streamed(
    pairs: IterableDataset, column: str, sides: Mapping[str, float], scalar: str | None, kept: list[str], soft: bool
) -> IterableDataset:
    features = None
    if pairs.features is not None:
        pairs = undecoded_stream(pairs, [*kept, *sides])
        features = Features({name: pairs.features[name] for name in kept})
        features[column] = pairs.features[next(iter(sides))]
        if scalar is not None:
            features[scalar] = Value("float64")
    split = partial(_split, column=column, sides=dict(sides), scalar=scalar, kept=kept, soft=soft)
    return pairs.map(
        split, batched=True, batch_size=_PAIRS_AT_ONCE, remove_columns=column_names(pairs), features=features
    )


def _split(
    batch: dict[str, list[Any]], column: str, sides: dict[str, float], scalar: str | None, kept: list[str], soft: bool
) -> dict[str, list[Any]]:
    """The rows of a batch of pairs."""
    made: dict[str, list[Any]] = {name: [] for name in (*kept, column, *([scalar] if scalar else []))}
    for pair, chosen in enumerate(batch["chosen"]):
        for side, number in sides.items():
            for name in kept:
                made[name].append(batch[name][pair])
            made[column].append(chosen if side == "chosen" else batch[side][pair])
            if scalar is not None:
                share = batch["soft_label"][pair] if soft else None
                made[scalar].append(number if share is None else share if side == "chosen" else 1 - share)
    return made

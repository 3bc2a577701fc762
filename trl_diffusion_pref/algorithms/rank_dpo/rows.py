"""Which rankings say nothing, found from their scores alone before anything is encoded."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ...data.bad_rows import RowProblem
from ...data.stored import list_lengths
from .loss import RankDPOOptions, wanted_values


# Rankings whose values are computed at once.
_AT_ONCE = 10_000


@dataclass(frozen=True)
class RankingSource:
    """The data set of which rankings were taken.

    Args:
        rows: How many it has.
        problems: Those that were not taken.
        taken: `(N,)`, the row of each ranking.
    """

    rows: int
    problems: Sequence[RowProblem]
    taken: np.ndarray

    def all_problems(self, of_rows: list[RowProblem]) -> list[RowProblem]:
        """Its own problems, and those of the rankings, by its rows."""
        return [*self.problems, *(replace(problem, row=int(self.taken[problem.row])) for problem in of_rows)]


def check_score_columns(columns: Sequence[str], label: str, score_columns: Sequence[str]) -> None:
    """Raises a ValueError where a data set lacks columns of scores, and names those that it may have instead."""
    missing = [name for name in score_columns if name not in columns]
    if not missing:
        return
    # As `make_rankings` calls them.
    by_reward = [name for name in columns if name.startswith("scores/")]
    advice = (
        "Each row needs a list with one score per sample, higher is better; score_columns names the column. Ranks, "
        "where lower is better, become scores by their sign."
    )
    if by_reward:
        advice = f"score_columns={by_reward} takes those that it has."
    raise ValueError(
        f"{label} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; found: {', '.join(columns)}. "
        f"{advice}"
    )


def check_lengths(dataset: Dataset, label: str, column: str, most: int) -> None:
    """Raises a ValueError where a ranking has more samples than `max_samples`, or the column no lists."""
    lengths = list_lengths(dataset, column, label)
    row = int(lengths.argmax())
    if lengths[row] > most:
        raise ValueError(
            f"{label}, row {row}, column '{column}': found {lengths[row]} samples, and max_samples={most}. Set "
            f"max_samples={lengths[row]}, or shorten the lists of samples and scores."
        )


def without_equal(
    dataset: Dataset, label: str, score_columns: Sequence[str], options: RankDPOOptions
) -> tuple[Dataset, RankingSource | None]:
    """The rankings whose samples are not all equally good, and what is left out, which is None for nothing.

    No sample is read or copied. Scores that cannot be used stay, to be named with everything else that cannot.

    Args:
        dataset: With the columns of scores.
        label: How messages call it.

    Raises:
        ValueError: None is left.
    """
    cells = {name: dataset.select_columns(name).with_format(None)[name] for name in score_columns}
    equal = equal_rankings(cells, options)
    if not len(equal):
        return dataset, None
    if len(equal) == len(dataset):
        raise ValueError(
            f"{label}: the samples of each of its {len(dataset)} rankings are all equally good by "
            f"{' and '.join(score_columns)}, so there is nothing to learn from them."
        )
    place = f"column{'s' * (len(score_columns) > 1)} {' and '.join(map(repr, score_columns))}"
    reason = "all samples are equally good"
    problems = [RowProblem(row, place, reason, "of equally good samples", "skip") for row in equal.tolist()]
    taken = np.setdiff1d(np.arange(len(dataset)), equal)
    return dataset.select(taken), RankingSource(len(dataset), problems, taken)


def equal_rankings(columns: Mapping[str, Sequence[Any]], options: RankDPOOptions) -> np.ndarray:
    """The rows whose samples are all equally good by what the loss takes of their scores; `(M,)`, in order.

    Args:
        columns: The cells of each column of scores. Rows with cells that are no lists of equally many finite numbers
            are not among the found ones.
    """
    groups: dict[int, tuple[list[int], list[list[Any]]]] = defaultdict(lambda: ([], []))
    for row, cells in enumerate(zip(*columns.values(), strict=True)):
        if all(map(_is_usable, cells)) and len({len(cell) for cell in cells}) == 1:
            rows, scores = groups[len(cells[0])]
            rows.append(row)
            scores.append(list(cells))
    found: list[int] = []
    for rows, scores in groups.values():
        for start in range(0, len(rows), _AT_ONCE):
            # From `(B, R, k)`, in the precision of a batch.
            table = torch.tensor(scores[start : start + _AT_ONCE], dtype=torch.float32).transpose(0, 1)
            wanted = wanted_values(table, options)
            same = wanted.amax(dim=1) == wanted.amin(dim=1)
            found += np.asarray(rows[start : start + _AT_ONCE])[same.numpy()].tolist()
    return np.asarray(sorted(found), dtype=np.int64)


def _is_usable(cell: Any) -> bool:
    return (
        isinstance(cell, (list, tuple))
        and len(cell) > 1
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in cell)
    )

"""Where pairs come from, so that messages name rows and columns as the user's data set has them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .bad_rows import RowProblem
from .known_layouts import Match
from .pair_rows import PairTable


class RowSource(Protocol):
    """The data set that the rows of a layout were made of.

    Attributes:
        rows: How many rows it has.
        problems: Those of its rows of which nothing was made.
    """

    @property
    def rows(self) -> int: ...

    @property
    def problems(self) -> Sequence[RowProblem]: ...

    def all_problems(self, of_rows: list[RowProblem]) -> list[RowProblem]:
        """Its own problems, and those of the rows that were made, by its rows and columns."""


@dataclass(frozen=True)
class PairSource:
    """The data set that pairs were made of.

    Args:
        match: Its layout.
        table: The pairs.
        rows: How many rows it has.
        problems: Those whose labels cannot be used, of which no pairs were made.
    """

    match: Match
    table: PairTable
    rows: int
    problems: Sequence[RowProblem]

    def named(self, problem: RowProblem) -> RowProblem:
        """A problem of a pair as one of the row that it was made of."""
        pair, match = problem.row, self.match
        row, samples = int(self.table.rows[pair]), {"chosen": self.table.chosen, "rejected": self.table.rejected}
        names = {"prompt": f"'{match.prompt}'"}
        if match.condition is not None:
            names["image"] = f"'{match.condition}'"
        named = [name for name in samples if f"'{name}'" in problem.place]
        for name in named:
            number = int(samples[name][pair])
            if match.layout.shape == "columns":
                names[name] = f"'{match.samples[number]}'"
            elif match.layout.shape == "list":
                names[name] = f"'{match.samples[0]}', number {number}"
            elif len(named) == 1:
                row, names[name] = number, f"'{match.samples[0]}'"
            else:
                names[name] = f"'{match.samples[0]}' of row {number}"
        return replace(problem, row=row, place=renamed(problem.place, names))

    def all_problems(self, of_pairs: Sequence[RowProblem]) -> list[RowProblem]:
        """Problems of pairs and of labels, by the rows of the data set."""
        return [*self.problems, *map(self.named, of_pairs)]


def renamed(place: str, names: Mapping[str, str]) -> str:
    return re.sub(r"'([^']*)'", lambda quoted: names.get(quoted[1], quoted[0]), place)

"""Counts of bad rows and of prompts."""

from collections import Counter
from collections.abc import Iterable, Sequence

from ..data.bad_rows import RowProblem
from .model import InspectedModel
from .parts import BadRows, Prompts, Spread


_LISTED = 10


class BadRowCounter:
    """Counts rows that cannot be used by their first problem, and keeps the first ten problems."""

    def __init__(self) -> None:
        self._first: dict[int, tuple[str, str]] = {}
        self._listed: list[RowProblem] = []

    def add(self, problems: Iterable[RowProblem]) -> None:
        """Takes in problems in any order."""
        for problem in problems:
            found = problem.place, problem.kind
            self._first[problem.row] = min(found, self._first.get(problem.row, found))
            self._listed.append(problem)
            if len(self._listed) > 10 * _LISTED:
                self._listed = sorted(self._listed)[:_LISTED]

    def __contains__(self, row: int) -> bool:
        return row in self._first

    def result(self) -> BadRows:
        """What was counted."""
        kinds = Counter(kind for _, kind in self._first.values())
        examples = [
            {"row": problem.row, "place": problem.place, "reason": problem.reason, "kind": problem.kind}
            for problem in sorted(self._listed)[:_LISTED]
        ]
        return BadRows(len(self._first), dict(kinds.most_common()), examples, sorted(self._first))


class PromptCounter:
    """Counts prompts."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self._numbers: dict[str, int] = {}
        self._of_rows: dict[int, tuple[int, ...]] = {}

    def add(self, row: int, captions: Sequence[str]) -> None:
        """Takes in the captions of one row."""
        self._of_rows[row] = tuple(self._numbers.setdefault(caption, len(self._numbers)) for caption in captions)
        self.rows.update(set(captions))

    def of_row(self, row: int) -> tuple[int, ...]:
        """Equal for rows with equal prompts."""
        return self._of_rows.get(row, ())

    def texts_of(self, row: int) -> list[str]:
        """The captions of a row."""
        texts = list(self._numbers)
        return [texts[number] for number in self.of_row(row)]

    def result(self, model: InspectedModel | None) -> Prompts:
        """What was counted."""
        distinct = list(self.rows)
        repeated = {text: count for text, count in self.rows.most_common() if count > 1}
        return Prompts(
            rows=len(self._of_rows),
            distinct=len(distinct),
            repeated=len(repeated),
            most_repeated=dict(list(repeated.items())[:_LISTED]),
            characters=Spread.of([len(text) for text in distinct]),
            words=Spread.of([len(text.split()) for text in distinct]),
            tokens=model.tokens(distinct, list(self.rows.values())) if model is not None else {},
        )

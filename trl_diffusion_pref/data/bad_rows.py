"""Rows that cannot be used: how they are counted, listed, and left out where the user asks for it."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args


logger = logging.getLogger(__name__)

OnBadRow = Literal["raise", "skip"]
_LISTED = 10
# For it no row is to blame, so that none is left out.
_MISSING_PACKAGE = "missing package"


@dataclass(frozen=True, order=True)
class RowProblem:
    """Why a row cannot be used.

    Args:
        row: Its position in the data set.
        place: Where in the row, such as "column 'chosen'".
        reason: Completes "row 3, column 'chosen': ...".
        kind: By which such rows are counted.
        handling: What happens with the row where an option of its own decides that; None for `on_bad_row`.
    """

    row: int
    place: str
    reason: str
    kind: str
    handling: OnBadRow | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"row {self.row}, {self.place}: {self.reason}"


@dataclass(frozen=True)
class BadRowPolicy:
    """What happens with rows that cannot be used.

    Args:
        on_bad_row: "raise" lists them and stops; "skip" leaves them out and counts them.
        max_bad_share: With "skip", the share of the rows, in [0, 1], above which it stops all the same.
        min_image_side: Pixels that the shorter side of an image must have.
        max_aspect_ratio: What the longer side of an image may be, in shorter sides.

    Raises:
        ValueError: A value that cannot be used.
    """

    on_bad_row: OnBadRow = "raise"
    max_bad_share: float = 0.1
    min_image_side: int = 1
    max_aspect_ratio: float = 8.0

    def __post_init__(self) -> None:
        if self.on_bad_row not in get_args(OnBadRow):
            raise ValueError(f"on_bad_row={self.on_bad_row!r} is none of {', '.join(get_args(OnBadRow))}.")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share={self.max_bad_share} is outside [0, 1].")
        if self.min_image_side < 1:
            raise ValueError(f"min_image_side={self.min_image_side}: it must be at least 1.")
        if self.max_aspect_ratio < 1:
            raise ValueError(f"max_aspect_ratio={self.max_aspect_ratio}: it must be at least 1.")

    def stops(self, problem: RowProblem) -> bool:
        """Whether this problem alone stops a run."""
        return (problem.handling or self.on_bad_row) == "raise"

    def apply(self, problems: Sequence[RowProblem], count: int, label: str) -> dict[str, int]:
        """Raises, or logs what is left out.

        Args:
            problems: Of all processes.
            count: Rows of the data set.
            label: How messages call it.

        Returns:
            How many rows are left out, by kind.

        Raises:
            ValueError: There are bad rows and the policy, or the handling of any of them, is "raise"; or too many for
                "skip", among which those with a handling of their own do not count; or all would be left out; or a
                package is missing.
        """
        if not problems:
            return {}
        # A sample that is in several pairs of a ranking is named once.
        problems = sorted(set(problems))
        first = {problem.row: problem for problem in reversed(problems)}
        kinds = _kinds(first.values())
        shown = [problem for problem in problems if self.stops(problem) or problem.kind == _MISSING_PACKAGE]
        bad = [problem for problem in problems if problem.handling is None]
        if not shown and len({problem.row for problem in bad}) > self.max_bad_share * count:
            shown = bad
        if shown:
            raise ValueError(self._listed(shown, count, label))
        counts = _in_words(kinds)
        if len(first) == count:
            raise ValueError(f"{label}: all {count} rows would be left out ({counts}), and none is left to use.")
        logger.warning(f"{label}: {len(first)} of {count} rows are left out, {len(first) / count:.2%} ({counts}).")
        return kinds

    def _listed(self, problems: Sequence[RowProblem], count: int, label: str) -> str:
        first = {problem.row: problem for problem in reversed(problems)}
        kinds = _kinds(first.values())
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        listed = "\n  ".join([*map(str, problems[:_LISTED]), *more])
        message = (
            f"{label} has rows that cannot be used:\n  {listed}\n{len(first)} of {count} rows: {_in_words(kinds)}.\n"
        )
        if any(problem.kind == _MISSING_PACKAGE for problem in problems):
            return message + "Install what is missing; no row is left out for it."
        if any(map(self.stops, problems)):
            options = ["on_bad_row='skip'"] * any(problem.handling is None for problem in problems)
            # The one kind of problem with an option of its own.
            options += ["on_aspect_difference='skip'"] * any(problem.handling == "raise" for problem in problems)
            return message + f"Repair them, or set {' and '.join(options)} to leave them out."
        return message + (
            f"on_bad_row='skip' leaves out at most max_bad_share={self.max_bad_share:g} of the rows. Look at them, "
            "and raise the option if they may be left out."
        )


def _kinds(problems: Iterable[RowProblem]) -> dict[str, int]:
    """How many there are of each kind, the most frequent first."""
    return dict(Counter(problem.kind for problem in problems).most_common())


def _in_words(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in kinds.items())

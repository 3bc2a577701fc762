"""Rows that cannot be used: how they are counted, listed, and left out where the user asks for it."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args


logger = logging.getLogger(__name__)

OnBadRow = Literal["raise", "skip"]
_LISTED = 10


@dataclass(frozen=True, order=True)
class RowProblem:
    """Why a row cannot be used.

    Args:
        row: Its position in the data set.
        place: Where in the row, such as "column 'chosen'".
        reason: Completes "row 3, column 'chosen': ...".
        kind: By which such rows are counted.
    """

    row: int
    place: str
    reason: str
    kind: str

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

    def apply(self, problems: Sequence[RowProblem], count: int, label: str) -> dict[str, int]:
        """Raises, or logs what is left out.

        Args:
            problems: Of all processes.
            count: Rows of the data set.
            label: How messages call it.

        Returns:
            How many rows are left out, by kind.

        Raises:
            ValueError: There are bad rows and the policy is "raise", or too many for "skip"; or a package is missing,
                for which no row is to blame.
        """
        if not problems:
            return {}
        first = {problem.row: problem for problem in sorted(problems, reverse=True)}
        kinds = dict(Counter(problem.kind for problem in first.values()).most_common())
        share = len(first) / count
        if self.on_bad_row == "raise" or share > self.max_bad_share or "missing package" in kinds:
            raise ValueError(self._listed(problems, first, kinds, count, label))
        counts = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        logger.warning(f"{label}: {len(first)} of {count} rows are left out, {share:.2%} ({counts}).")
        return kinds

    def _listed(
        self,
        problems: Sequence[RowProblem],
        first: dict[int, RowProblem],
        kinds: dict[str, int],
        count: int,
        label: str,
    ) -> str:
        lines = [str(problem) for problem in sorted(problems)]
        more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        listed = "\n  ".join([*lines[:_LISTED], *more])
        counts = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        message = f"{label} has rows that cannot be used:\n  {listed}\n{len(first)} of {count} rows: {counts}.\n"
        if "missing package" in kinds:
            return message + "Install what is missing; no row is left out for it."
        if self.on_bad_row == "raise":
            return message + "Repair them, or set on_bad_row='skip' to leave them out."
        return message + (
            f"on_bad_row='skip' leaves out at most max_bad_share={self.max_bad_share:g} of the rows. Look at them, "
            "and raise the option if they may be left out."
        )

"""How rows become pairs, and how many of them did."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from .known_layouts import KnownLayout
from .preference_labels import Dimension


RankingPairs = Literal["best_worst", "all", "adjacent"]
Ties = Literal["drop", "half", "keep"]


@dataclass(frozen=True)
class PairOptions:
    """How rows become pairs.

    Args:
        column_map: The data set's columns, by the names that its layout has for them: {"prompt": "text", "chosen":
            "good", "rejected": "bad"}, or {"jpg_0": "left"}. The default takes columns by their own names.
        ranking_pairs: Which pairs of a ranking are used: "best_worst", the best sample with the worst; "all"; or
            "adjacent", each sample with the next worse one. Samples that are equally good are in the stored order.
        min_score_difference: Pairs are left out whose scores, ranks, or shares of votes differ by less than this. At
            least 0; needs a layout that has one of these.
        ties: What happens to pairs of equally good samples. "drop" leaves them out, "half" keeps them with a
            `soft_label` of 0.5, "keep" keeps them as if the first one had been preferred.
        soft_label: With ties="half", the `soft_label` of the other pairs where the data have none, in [0, 1].
        label_noise: The share of pairs whose samples are swapped, in [0, 1), for experiments with wrong labels. It is
            decided for each row by `seed` and the row's number. `soft_label` stays, so that it is wrong too.
        preference_dimension: For VideoAlign: visual quality "VQ", motion quality "MQ", text alignment "TA", or
            "majority", the video that is better in more of the three.
        seed: For `label_noise`.

    Raises:
        ValueError: A value that cannot be used, or two that contradict each other.
    """

    column_map: Mapping[str, str] | None = None
    ranking_pairs: RankingPairs = "best_worst"
    min_score_difference: float = 0.0
    ties: Ties = "drop"
    soft_label: float = 1.0
    label_noise: float = 0.0
    preference_dimension: Dimension = "majority"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.column_map is not None and not isinstance(self.column_map, Mapping):
            raise ValueError(
                f"column_map={self.column_map!r} is a {type(self.column_map).__name__}; pass a dictionary of the data "
                "set's columns by the names that its layout has for them."
            )
        choices = {"ranking_pairs": RankingPairs, "ties": Ties, "preference_dimension": Dimension}
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(get_args(literal))}.")
        if not (self.min_score_difference >= 0 and math.isfinite(self.min_score_difference)):
            raise ValueError(f"min_score_difference={self.min_score_difference} must be finite and at least 0.")
        if not 0 <= self.soft_label <= 1:
            raise ValueError(f"soft_label={self.soft_label} is outside [0, 1].")
        if self.soft_label != 1 and self.ties != "half":
            raise ValueError(f"soft_label={self.soft_label} does nothing without ties='half'. Leave it out.")
        if not 0 <= self.label_noise < 1:
            raise ValueError(f"label_noise={self.label_noise} is outside [0, 1).")
        if self.min_score_difference and self.ties != "drop":
            raise ValueError(
                f"ties={self.ties!r} keeps pairs without a difference, which "
                f"min_score_difference={self.min_score_difference} leaves out. Set one of the two."
            )

    def check_layout(self, layout: KnownLayout, label: str) -> None:
        """Raises a ValueError if an option needs something that the data set's layout does not have."""
        if self.min_score_difference and not layout.graded:
            raise ValueError(
                f"min_score_difference={self.min_score_difference} needs scores, ranks or shares of votes; {label} "
                f"has the layout {layout.name}, which says only which sample is better. Leave the option out."
            )
        if self.preference_dimension != "majority" and not layout.dimensions:
            raise ValueError(
                f"preference_dimension={self.preference_dimension!r} needs the columns VQ, MQ and TA; {label} has "
                f"the layout {layout.name}. Leave the option out."
            )


DEFAULT_OPTIONS = PairOptions()


@dataclass(frozen=True)
class PairReport:
    """What became of a data set's rows.

    Args:
        layout: Name of the layout.
        rows: Rows found.
        rankings: Rows, or groups of rows if a ranking has several, that were compared.
        pairs: Pairs made.
        ties_kept: Pairs of equally good samples that are among `pairs`.
        ties_dropped: Those that are left out.
        unlabelled: Rows that nobody has judged, left out.
        too_close: Pairs left out by `min_score_difference`.
        short_rankings: Rankings with fewer than 2 samples, left out.
        swapped: Pairs that `label_noise` has swapped.
    """

    layout: str
    rows: int
    rankings: int
    pairs: int
    ties_kept: int = 0
    ties_dropped: int = 0
    unlabelled: int = 0
    too_close: int = 0
    short_rankings: int = 0
    swapped: int = 0

    @property
    def left_out(self) -> int:
        """Rows and pairs that are left out."""
        return self.ties_dropped + self.unlabelled + self.too_close + self.short_rankings

    def __str__(self) -> str:
        left_out = [
            _counted(self.ties_dropped, "tie", "ties"),
            _counted(self.unlabelled, "row without a label", "rows without a label"),
            _counted(self.too_close, *(f"{noun} closer than min_score_difference" for noun in ("pair", "pairs"))),
            _counted(self.short_rankings, *(f"{noun} of fewer than 2 samples" for noun in ("ranking", "rankings"))),
        ]
        parts = [
            f"{_counted(self.rows, 'row', 'rows')} in the layout {self.layout}"
            + f", {_counted(self.rankings, 'ranking', 'rankings')}," * (self.rankings != self.rows)
            + f" gave {_counted(self.pairs, 'pair', 'pairs') or 'no pairs'}",
            f"left out: {', '.join(filter(None, left_out))}" * bool(self.left_out),
            f"kept: {_counted(self.ties_kept, 'tie', 'ties')}" * bool(self.ties_kept),
            f"swapped by label_noise: {_counted(self.swapped, 'pair', 'pairs')}" * bool(self.swapped),
        ]
        return "; ".join(filter(None, parts))


def _counted(count: int, one: str, many: str) -> str:
    """A number with its noun; nothing for 0."""
    return f"{count} {one if count == 1 else many}" if count else ""

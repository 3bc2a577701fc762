"""The layouts in which preference data sets are published: one table, and which entry fits a data set's columns."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ..families import all_families
from .preference_labels import (
    PREFERS_FIRST,
    PREFERS_SECOND,
    TIE,
    Cells,
    Dimension,
    Scores,
    by_name,
    confidence,
    dimensions,
    list_of_ranks,
    list_of_scores,
    one_of,
    rank,
    votes,
    votes_in_json,
)


@dataclass(frozen=True)
class KnownLayout:
    """Columns in which preferences are published, and what they say.

    Args:
        name: What messages call the layout.
        prompt: The column of prompts.
        samples: Two columns with one sample each, or one column with a list of samples, or with one sample of a
            ranking whose other samples are in other rows.
        labels: Columns that say which sample is better.
        read_scores: Reads the labels of one row. Raises `LabelProblem`.
        shape: Where the samples of one prompt are: in several "columns" of a row, in a "list", or in several "rows".
        optional: Columns that `read_scores` also reads if the data set has them.
        condition: The column of images that the model is conditioned on.
        ranking_id: For the shape "rows": equal in the rows of one ranking.
        graded: Whether the differences of scores mean anything, so that `min_score_difference` can be used.
        shares: Whether the scores of two samples are probabilities, which become `soft_label`.
        dimensions: Whether the labels are one for each `Dimension`.
        hint: What to do if a data set has all columns except `samples`.
    """

    name: str
    prompt: str
    samples: tuple[str, ...]
    labels: tuple[str, ...]
    read_scores: Callable[[Cells, Dimension], Scores]
    shape: Literal["columns", "list", "rows"] = "columns"
    optional: tuple[str, ...] = ()
    condition: str | None = None
    ranking_id: str | None = None
    graded: bool = False
    shares: bool = False
    dimensions: bool = False
    hint: str = ""

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns by which the layout is recognised."""
        ids = (self.condition, self.ranking_id)
        return (self.prompt, *self.samples, *self.labels, *(name for name in ids if name is not None))

    @property
    def media(self) -> tuple[str, ...]:
        """Columns that hold samples and condition images."""
        return self.samples if self.condition is None else (*self.samples, self.condition)


# ---- The table ---------------------------------------------------------------------------------------------------

_PICK_A_PIC: Mapping[object, Scores] = {1: PREFERS_FIRST, 0: PREFERS_SECOND, 0.5: TIE}
_EDIT_REWARD: Mapping[object, Scores] = {"leftvote": PREFERS_FIRST, "rightvote": PREFERS_SECOND, "tie": TIE}
_VQ_MQ_TA = ("VQ", "MQ", "TA")

PAIRS_LAYOUT = KnownLayout("pairs", "prompt", ("chosen", "rejected"), (), by_name, optional=("soft_label",))

# To support another layout, add an entry. Of two that fit, the one with more columns is used, then the earlier one.
KNOWN_LAYOUTS: tuple[KnownLayout, ...] = (
    PAIRS_LAYOUT,
    KnownLayout(
        name="Pick-a-Pic",
        prompt="caption",
        samples=("jpg_0", "jpg_1"),
        labels=("label_0",),
        read_scores=partial(one_of, column="label_0", meanings=_PICK_A_PIC),
        optional=("has_label",),
        hint="This is Pick-a-Pic's variant without images (its name ends in _no_images); yuvalkirstain/pickapic_v2 "
        "has them.",
    ),
    KnownLayout(
        name="Pick-a-Pic as WebDataset",
        prompt="original_prompt.txt",
        samples=("jpg_0.jpg", "jpg_1.jpg"),
        labels=("label_0.txt",),
        read_scores=partial(one_of, column="label_0.txt", meanings=_PICK_A_PIC, text=True),
    ),
    *(
        KnownLayout(
            name="HPDv2's training set",
            prompt="prompt",
            samples=(paths,),
            labels=("human_preference",),
            read_scores=partial(list_of_scores, column="human_preference", allowed=(0, 1)),
            shape="list",
        )
        for paths in ("image_path", "file_path")
    ),
    KnownLayout(
        name="HPDv2's test set",
        prompt="prompt",
        samples=("image_path",),
        labels=("rank",),
        read_scores=partial(list_of_ranks, column="rank"),
        shape="list",
        graded=True,
    ),
    KnownLayout(
        name="HPDv3",
        prompt="prompt",
        samples=("path1", "path2"),
        labels=("confidence",),
        read_scores=partial(confidence, column="confidence"),
        graded=True,
        shares=True,
    ),
    KnownLayout("HPDv3 without confidence", "prompt", ("path1", "path2"), (), by_name),
    KnownLayout(
        name="Rapidata's weighted votes",
        prompt="prompt",
        samples=("image1", "image2"),
        labels=("weighted_results_image1_preference", "weighted_results_image2_preference"),
        read_scores=partial(
            votes, columns=("weighted_results_image1_preference", "weighted_results_image2_preference")
        ),
        graded=True,
        shares=True,
    ),
    KnownLayout(
        name="Rapidata's votes",
        prompt="prompt",
        samples=("image1", "image2"),
        labels=("votes_image1", "votes_image2"),
        read_scores=partial(votes, columns=("votes_image1", "votes_image2")),
        graded=True,
        shares=True,
    ),
    *(
        KnownLayout(
            name=f"Rapidata's {column.replace('_', ' ')}",
            prompt="prompt",
            samples=("image1", "image2"),
            labels=(column,),
            read_scores=partial(votes_in_json, column=column),
            optional=("image1_path", "image2_path"),
            graded=True,
            shares=True,
        )
        for column in ("aggregated_results", "detailed_results")
    ),
    KnownLayout(
        name="VideoAlign",
        prompt="prompt",
        samples=("path_A", "path_B"),
        labels=_VQ_MQ_TA,
        read_scores=partial(dimensions, columns=_VQ_MQ_TA),
        dimensions=True,
    ),
    KnownLayout(
        name="EditReward",
        prompt="instruction",
        samples=("left_output_image", "right_output_image"),
        labels=("vote_type",),
        read_scores=partial(one_of, column="vote_type", meanings=_EDIT_REWARD),
        condition="source_img",
    ),
    KnownLayout("metadata with file names", "prompt", ("chosen_file_name", "rejected_file_name"), (), by_name),
    KnownLayout("verl-omni", "prompt", ("img_win", "img_lose"), (), by_name),
    KnownLayout(
        name="ImageRewardDB",
        prompt="prompt",
        samples=("image",),
        labels=("rank",),
        read_scores=partial(rank, column="rank"),
        shape="rows",
        ranking_id="prompt_id",
        graded=True,
    ),
    *(
        KnownLayout(
            name=f"{samples} with {labels}",
            prompt="prompt",
            samples=("images",),
            labels=(labels,),
            read_scores=partial(read_scores, column=labels),
            shape="list",
            condition=condition,
            graded=True,
        )
        for samples, condition in (("images", None), ("edits", "image"))
        for labels, read_scores in (("scores", list_of_scores), ("ranks", list_of_ranks))
    ),
)


# Columns of published data with one sample and one vote per row.
_SINGLE_VOTES = (
    {"file_name", "caption", "split"},
    {"image", "caption", "split"},
    {"prompt", "image", "label"},
    {"prompt", "image", "reward"},
)


# ---- Which entry fits --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """A layout, and the data set's columns by the layout's names."""

    layout: KnownLayout
    columns: Mapping[str, str]

    @property
    def prompt(self) -> str:
        """The data set's column of prompts."""
        return self.columns[self.layout.prompt]

    @property
    def samples(self) -> tuple[str, ...]:
        """The data set's columns of samples."""
        return tuple(self.columns[name] for name in self.layout.samples)

    @property
    def condition(self) -> str | None:
        """The data set's column of condition images."""
        return None if self.layout.condition is None else self.columns[self.layout.condition]

    @property
    def media(self) -> tuple[str, ...]:
        """The data set's columns that hold samples and condition images."""
        return tuple(self.columns[name] for name in self.layout.media)

    @property
    def labels(self) -> dict[str, str]:
        """The columns that `read_scores` reads, by the layout's names."""
        names = (*self.layout.labels, *self.layout.optional)
        return {name: self.columns[name] for name in names if name in self.columns}


def condition_columns(columns: Collection[str]) -> dict[str, str]:
    """Columns of condition images as families name them, with what they are called here.

    `images` may stand for `image`; beside scores or ranks they are the samples of a ranking.
    """
    named = {"image": "image" if "image" in columns else "images"}
    if named["image"] not in columns or (named["image"] == "images" and {"scores", "ranks"} & set(columns)):
        return {}
    known = {column for family in all_families() for column in family.condition_images}
    return named | {column: column for column in sorted(known - {"image"}) if column in columns}


def _translated(layout: KnownLayout, column_map: Mapping[str, str]) -> dict[str, str]:
    """`column_map` by the layout's names: its column of prompts may be called `prompt`, its condition `image`."""
    ours = {"prompt": layout.prompt}
    if layout.condition is not None:
        ours["image"] = layout.condition
    return {ours.get(name, name): column for name, column in column_map.items()}


def _resolve(layout: KnownLayout, columns: Sequence[str], column_map: Mapping[str, str]) -> dict[str, str]:
    """The data set's columns by the layout's names, as far as there are any."""
    names = (*layout.needed, *layout.optional)
    return {name: name for name in names if name in columns} | {
        name: column for name, column in _translated(layout, column_map).items() if name in names
    }


def recognise_layout(columns: Sequence[str], label: str, column_map: Mapping[str, str] | None = None) -> Match:
    """The layout that a data set's columns have.

    Pairs are preferred to any other layout; then the layout with most columns is.

    Args:
        columns: The data set's.
        label: How messages call the data set.
        column_map: Columns by the name that the layout has for them; `prompt` and `image` are understood in every
            layout.

    Raises:
        ValueError: No layout fits; the message names the nearest one. Or `column_map` names a column that the data
            set does not have.
    """
    column_map = column_map or {}
    missing = [column for column in column_map.values() if column not in columns]
    if missing:
        raise ValueError(
            f"{label} has no column {', '.join(map(repr, missing))}, which column_map names; found: "
            f"{', '.join(columns) or 'none'}."
        )
    fitting = []
    for layout in KNOWN_LAYOUTS:
        found = _resolve(layout, columns, column_map)
        if set(layout.needed) <= set(found) and set(_translated(layout, column_map)) <= set(found):
            fitting.append(Match(layout, found))
    if not fitting:
        raise ValueError(_unknown_layout(columns, label, column_map))
    return max(fitting, key=lambda match: (match.layout is PAIRS_LAYOUT, len(match.layout.needed)))


def _unknown_layout(columns: Sequence[str], label: str, column_map: Mapping[str, str]) -> str:
    """What to say of columns that no layout has."""

    single = next((votes for votes in _SINGLE_VOTES if votes <= set(columns)), None)
    if single is not None and not column_map:
        return (
            f"{label} has one sample and what was said of it in each row ({', '.join(sorted(single))}). Pairs need "
            "two samples of one prompt in each row (prompt, chosen, rejected), or a list of samples with scores. "
            "DiffusionKTOTrainer learns from single votes, FlowRWRTrainer from rewards."
        )

    def share_found(layout: KnownLayout) -> float:
        return len(set(layout.needed) & set(_resolve(layout, columns, column_map))) / len(layout.needed)

    nearest = max(KNOWN_LAYOUTS, key=share_found)
    found = _resolve(nearest, columns, column_map)
    lacking = [name for name in nearest.needed if name not in found]
    unused = [name for name in _translated(nearest, column_map) if name not in found]
    if lacking:
        reason = f"it lacks the column{'s' * (len(lacking) > 1)} {', '.join(lacking)}"
    else:
        reason = f"it has no column {', '.join(map(repr, unused))}, which column_map names"
    hint = f" {nearest.hint}" if nearest.hint and set(lacking) == set(nearest.samples) else ""
    suggested = ", ".join(f"'{name}': 'your_column'" for name in lacking or nearest.needed)
    return (
        f"{label} has no known layout; its columns: {', '.join(columns) or 'none'}. The nearest layout is "
        f"{nearest.name} ({', '.join(nearest.needed)}): {reason}.{hint} Say which of your columns these are, "
        f"column_map={{{suggested}}}; pairs need prompt, chosen and rejected."
    )

"""From scores to how likely a sample is a liked one: by comparison with the other samples of its prompt."""

from typing import Literal

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from ...data.layouts import column_names
from ...data.stored import group_numbers, with_column
from .loss import liked_probability


# Columns of scores, in the order in which they are looked for.
SCORES = ("score", "reward")
# Added to standard deviations, as the released code does.
_SMALL = 1e-4


def liked_by_score(
    scores: np.ndarray, groups: np.ndarray, scale: Literal["group", "batch"], advantage_clip: float
) -> tuple[np.ndarray, np.ndarray]:
    """`p = clip(A / (2 c) + 1/2, 0, 1)` with A the score less its group's mean, over a standard deviation.

    Args:
        scores: `(N,)`, finite.
        groups: `(N,)`, numbers from 0 on: of which prompt each sample is.
        scale: Whose standard deviation: the group's, or that of all scores.
        advantage_clip: c.

    Returns:
        p, `(N,)` float64, 1/2 for samples that score as their group does; and whether all samples of the group have
        one score, `(N,)` bool.
    """
    scores = scores.astype(np.float64)
    counts = np.bincount(groups)
    means = np.bincount(groups, weights=scores) / np.maximum(counts, 1)
    centred = scores - means[groups]
    deviations = np.sqrt(np.bincount(groups, weights=centred**2) / np.maximum(counts, 1))[groups]
    lowest, highest = np.full(len(counts), np.inf), np.full(len(counts), -np.inf)
    np.minimum.at(lowest, groups, scores)
    np.maximum.at(highest, groups, scores)
    equal = (lowest == highest)[groups]
    # Rounding of the mean is no difference.
    centred[equal] = 0.0
    advantages = centred / ((deviations if scale == "group" else scores.std()) + _SMALL)
    return liked_probability(torch.from_numpy(advantages), advantage_clip).numpy(), equal


def with_liked(
    dataset: Dataset | IterableDataset, label: str, scale: Literal["group", "batch"], advantage_clip: float
) -> Dataset | IterableDataset:
    """A data set with the column `label`, made of its scores if it has none; one without scores stays as it is.

    Args:
        label: How messages call the data set.
        scale, advantage_clip: See `liked_by_score`.

    Raises:
        ValueError: A stream with scores, whose groups are not known; labels beside scores, or two columns of scores;
            scores that are no finite numbers.
    """
    columns = column_names(dataset)
    found = [name for name in SCORES if name in columns]
    if not found:
        return dataset
    if len(found) > 1 or "label" in columns:
        both = [*found, *(["label"] if "label" in columns else [])]
        raise ValueError(
            f"{label} has the columns {' and '.join(both)}, and each says how much a sample is liked. Remove all but "
            "one of them: dataset.remove_columns(...)."
        )
    column = found[0]
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{label} is streamed, and the scores of column '{column}' are compared within all samples of a prompt. "
            "Store the data, or give it a column label."
        )
    cells = dataset.select_columns(column).with_format(None)[column]
    scores = np.asarray([np.nan if not isinstance(cell, (int, float)) else cell for cell in cells], dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        more = f", and {len(bad) - 1} more rows" if len(bad) > 1 else ""
        raise ValueError(
            f"{label}, row {bad[0]}, column '{column}': {cells[int(bad[0])]!r} is no finite number{more}. One such "
            "score leaves those of its prompt without a mean; remove these rows."
        )
    liked, _ = liked_by_score(scores, group_numbers(dataset), scale, advantage_clip)
    return with_column(dataset, "label", liked)

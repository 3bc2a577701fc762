"""AI feedback: labels existing pairs and rankings again, by rewards."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from PIL.Image import Image

from ..data.cells import captions_of
from ..data.content import cell_key
from ..data.decode.audio import decode_audio
from ..data.decode.cell import CellProblem, kind_of, read_cell, undecoded_feature
from ..data.decode.image import decode_image
from ..data.known_layouts import PAIRS_LAYOUT, Match, condition_columns
from ..data.layouts import PAIRS, Layout, check_columns
from ..data.pair_rows import PairTable, build_pairs
from ..data.pairs import as_pairs
from ..data.shards import key_of
from ..rewards.scoring import Reward, Rewards, named_rewards
from .pairing import Temperature, combined_scores, preference_probabilities, temperatures_of
from .rows import SAMPLES
from .score_cache import ScoreCache


logger = logging.getLogger(__name__)

SIDES = PAIRS.samples


def relabel(
    dataset: Dataset,
    rewards: Rewards,
    *,
    temperature: Temperature = None,
    batch_size: int = 64,
    output: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Labels pairs or rankings again by rewards; all processes score their share.

    A pair's probability is the mean over rewards of `sigmoid((chosen - rejected) / temperature)`. Where it is below
    1/2, the samples change places, and with them the values of all columns `chosen_...` and `rejected_...`. Equally
    good samples stay where they are, with a `soft_label` of 1/2; they are counted in a message.

    Args:
        dataset: Pairs in any known layout, see docs/dataset_formats.md; or rankings, with the columns `prompt` and
            `images` (`videos`, `audio`). Of several captions of a row the first one is scored. Rewards get condition
            images, an image or a list of them for each sample, as the column `image`.
        rewards: One, several, or several by name, see `rewards.score`.
        temperature: A number, or one by name of the reward. None: each reward's standard deviation within rows, so
            that all rewards count alike.
        batch_size: Samples that are in memory at once while they are scored.
        output: Folder that keeps the scores, so that a run that was killed goes on.

    Returns:
        Pairs with `soft_label`, the probability that the chosen sample is better, at least 1/2; `chosen_score` and
        `rejected_score`; and `chosen_scores/<reward>`, `rejected_scores/<reward>`. Rankings have new `scores`, the
        only reward's own or the Bradley-Terry strengths of several, and `scores/<reward>`; `ranks` are removed.
        The samples of a selection of rows are copied to the cache of `datasets`, those of a whole data set are not.

    Raises:
        ValueError: No known layout, no rows, or a sample that cannot be decoded; the message names row and column.
        RewardError: A reward fails; the message names it, the row and the column.
        TypeError: Not a stored data set.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset is a {type(dataset).__name__}; pass a datasets.Dataset, one split, not a stream.")
    named = named_rewards(rewards)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; it must be a positive integer.")
    columns: tuple[str, ...] = tuple(name for name in SAMPLES.values() if isinstance(dataset.features.get(name), List))
    ranked = "prompt" in dataset.column_names and "chosen" not in dataset.column_names and bool(columns)
    if not ranked:
        dataset = as_pairs(dataset, "dataset")
    columns = columns[:1] if ranked else SIDES
    check_columns(dataset, "dataset", Layout(samples=columns))
    scores = _Scoring(dataset, columns).run(named, batch_size, output)
    temperatures = temperatures_of(temperature, {name: [row[name] for row in scores] for name in named})
    return (_ranked_again if ranked else _paired_again)(dataset, scores, temperatures)


class _Scoring:
    """Scores all samples of a data set.

    Args:
        columns: The two columns of a pair, or the one of a ranking's list.
    """

    def __init__(self, dataset: Dataset, columns: tuple[str, ...]) -> None:
        self.columns = columns
        named = condition_columns(dataset.column_names)
        # The column `images` of a ranking holds its samples.
        self.conditions = {name: column for name, column in named.items() if column not in columns}
        self.captions = [(captions_of(cell) or [""])[0] for cell in dataset["prompt"]]
        media = [*columns, *self.conditions.values()]
        cells = dataset.select_columns(media).with_format(None)
        for name in media:
            wanted = undecoded_feature(cells.features[name])
            cells = cells if wanted == cells.features[name] else cells.cast_column(name, wanted)
        self.cells = cells

    def run(
        self, rewards: Mapping[str, Reward], batch_size: int, output: str | os.PathLike[str] | None
    ) -> list[dict[str, list[float]]]:
        """Of each row, by name of the reward, a score for each of its samples."""
        places: list[tuple[int, int]] = []
        keys: list[str] = []
        rows: list[list[str]] = []
        for row in range(len(self.cells)):
            of_row = self._of_row(row) if output is not None or len(self.columns) == 1 else self.columns
            rows.append([])
            edited = [] if output is None else list(self._of_conditions(cell_key, row).values())
            for number, cell in enumerate(of_row):
                content = b"" if output is None else self._guarded(cell_key, cell, row, number)
                key = key_of(row, number) if output is None else key_of(self.captions[row], content, *edited)
                places.append((row, number))
                rows[-1].append(key.hex())
            keys += rows[-1]
        cache = ScoreCache(None if output is None else Path(output) / "scores", rewards, refuse_blank=False)
        cache.fill(
            keys,
            [self.captions[row] for row, _ in places],
            lambda position: self._decoded(*places[position]),
            at_once=batch_size,
            describe=lambda position: self._where(*places[position]),
            columns=lambda position: self._of_conditions(_decoded_images, places[position][0]),
        )
        return [cache.of(of_row) for of_row in rows]

    def _of_row(self, row: int) -> list[Any]:
        values = self.cells[row]
        return list(values[self.columns[0]]) if len(self.columns) == 1 else [values[name] for name in self.columns]

    def _of_conditions(self, function: Callable[[Any], Any], row: int) -> dict[str, Any]:
        """What a function makes of a row's condition images, by their column."""
        cells = self.cells[row] if self.conditions else {}
        return {name: self._guarded(function, cells[column], row, column) for name, column in self.conditions.items()}

    def _where(self, row: int, number: int | str) -> str:
        """Where a sample is by its number, or a condition image by its column."""
        if isinstance(number, str):
            return f"row {row}, column '{number}'"
        if len(self.columns) == 1:
            return f"row {row}, column '{self.columns[0]}', number {number}"
        return f"row {row}, column '{self.columns[number]}'"

    def _decoded(self, row: int, number: int) -> Any:
        return self._guarded(_decode, self._of_row(row)[number], row, number)

    def _guarded(self, function: Callable[[Any], Any], cell: Any, row: int, number: int | str) -> Any:
        try:
            return function(read_cell(cell))
        except CellProblem as problem:
            raise ValueError(f"{self._where(row, number)}: {problem}. Repair the row or leave it out.") from problem


def _decode(content: Any) -> Any:
    """What rewards take: an image, frames or audio; the file of a video, which rewards of videos decode."""
    kind = kind_of(content)
    if kind == "audio":
        return decode_audio(content)
    if isinstance(content, (list, tuple)):
        return [decode_image(frame) for frame in content]
    return content if kind == "video" else decode_image(content)


def _decoded_images(content: Any) -> Image | list[Image]:
    """A condition image, or a list of them."""
    return [decode_image(one) for one in content] if isinstance(content, (list, tuple)) else decode_image(content)


def _paired_again(
    pairs: Dataset, scores: Sequence[Mapping[str, list[float]]], temperatures: Mapping[str, float]
) -> Dataset:
    first_better = np.array([preference_probabilities(row, temperatures)[0, 1] for row in scores])
    swapped = first_better < 0.5
    soft_labels = np.where(swapped, 1 - first_better, first_better)
    ties = int((first_better == 0.5).sum())
    logger.log(
        logging.WARNING if ties else logging.INFO,
        "%d pairs were labelled again: %d have changed places, %d are equally good and have a soft_label of 1/2.",
        len(pairs),
        int(swapped.sum()),
        ties,
    )
    combined = [combined_scores(row, temperatures) for row in scores]
    new = {"score": combined} | {f"scores/{name}": [row[name] for row in scores] for name in temperatures}
    # Columns of the two samples, which change places with them.
    kinds = [name.removeprefix("chosen_") for name in pairs.column_names if name.startswith("chosen_")]
    old = {kind: [f"{side}_{kind}" for side in SIDES] for kind in kinds}
    for kind, names in old.items():
        if kind not in new and set(names) <= set(pairs.column_names):
            if pairs.features[names[0]] != pairs.features[names[1]]:
                raise ValueError(f"The columns {' and '.join(names)} have different types, and may change places.")
            new[kind] = [list(both) for both in zip(*(pairs[name] for name in names), strict=True)]
    for kind, values in new.items():
        for number, side in enumerate(SIDES):
            name = f"{side}_{kind}"
            column = [value[number != swap] for value, swap in zip(values, swapped.tolist(), strict=True)]
            feature = pairs.features.get(name) or Value("float64")
            if name in pairs.column_names:
                pairs = pairs.remove_columns(name)
            pairs = pairs.add_column(name, column, feature=feature)
    rows, flipped = np.arange(len(pairs)), swapped.astype(np.int64)
    match = Match(PAIRS_LAYOUT, {name: name for name in ("prompt", *SIDES)})
    return build_pairs(pairs, match, PairTable(rows, flipped, 1 - flipped, soft_labels), "dataset")


def _ranked_again(
    rankings: Dataset, scores: Sequence[Mapping[str, list[float]]], temperatures: Mapping[str, float]
) -> Dataset:
    new = {"scores": [combined_scores(row, temperatures) for row in scores]}
    new |= {f"scores/{name}": [list(row[name]) for row in scores] for name in temperatures}
    rankings = rankings.remove_columns([name for name in (*new, "ranks") if name in rankings.column_names])
    for name, values in new.items():
        rankings = rankings.add_column(name, values, feature=List(Value("float64")))
    logger.info("%d rankings were labelled again.", len(rankings))
    return rankings

"""Builds rows of prompt, chosen and rejected from the numbers of the samples, without decoding any."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Audio, Dataset, Features, Image, IterableDataset, Value, Video, concatenate_datasets
from datasets.fingerprint import Hasher

from .decode.cell import undecoded_feature
from .known_layouts import PAIRS_LAYOUT, Match
from .layouts import column_names, dataset_fingerprint
from .stored import stored_rows, whole_table


# How many rows with lists of samples, or of a stream, are in memory at once.
_ROWS_AT_ONCE = 16

# Position in the batch, chosen cell, rejected cell, soft label.
MakeRows = Callable[[dict[str, list[Any]], list[int]], Iterable[tuple[int, Any, Any, float | None]]]


@dataclass(frozen=True)
class PairTable:
    """The pairs of a stored data set.

    Args:
        rows: `(P,)` int64, the row of each pair.
        chosen: `(P,)` int64, the number of the chosen sample in its row; of rankings with one sample per row, its row.
        rejected: `(P,)` int64, likewise.
        soft_labels: `(P,)` float64 in [0, 1], or None.
    """

    rows: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    soft_labels: np.ndarray | None


def build_pairs(dataset: Dataset, match: Match, table: PairTable, label: str) -> Dataset:
    """The rows of a table of pairs; see `as_pairs` for what is copied."""
    build = {"columns": _from_columns, "list": _from_lists, "rows": _from_rows}[match.layout.shape]
    return build(dataset.with_format(None), match, table, label)


def _kept_columns(match: Match, columns: Sequence[str]) -> list[str]:
    """Columns that stay beside the pairs: a layout's own columns mean nothing there, but those of pairs may."""
    used = {*match.columns.values(), "prompt", "chosen", "rejected", "soft_label"}
    return [name for name in columns if match.layout is PAIRS_LAYOUT and name not in used]


def _renamed(match: Match, columns: Sequence[str], chosen: int) -> dict[str, str]:
    """The data set's columns, by what they become, where the sample with this number is chosen."""
    names = {"prompt": match.prompt, "chosen": match.samples[chosen], "rejected": match.samples[1 - chosen]}
    if match.condition is not None:
        names["image"] = match.condition
    return names | {name: name for name in _kept_columns(match, columns)}


def _from_columns(dataset: Dataset, match: Match, table: PairTable, label: str) -> Dataset:
    """Two columns that change places in some rows: two selections of the same files, put together in order."""
    first, second = (dataset.features[column] for column in match.samples)
    if first != second:
        raise ValueError(
            f"{label}: the columns {match.samples[0]} ({first}) and {match.samples[1]} ({second}) have different "
            "types. Give them the same one: dataset.cast_column."
        )
    stored, whole = stored_rows(dataset), whole_table(dataset)
    parts, positions = [], []
    for chosen in (0, 1):
        position = np.flatnonzero(table.chosen == chosen)
        if len(position) == 0:
            continue
        rows = stored[table.rows[position]]
        names = _renamed(match, dataset.column_names, chosen)
        part = whole.select_columns([*dict.fromkeys(names.values())])
        if table.soft_labels is not None:
            # Equal rows have equal labels, so that one number per row of the table is enough.
            soft_labels = np.zeros(len(whole))
            soft_labels[rows] = table.soft_labels[position]
            part, names = part.add_column("soft_label", soft_labels), {**names, "soft_label": "soft_label"}
        part = part.select(rows).rename_columns({old: new for new, old in names.items()})
        parts.append(part.select_columns([*names]))
        positions.append(position)
    if len(parts) == 1:
        return parts[0]
    return concatenate_datasets(parts).select(np.argsort(np.concatenate(positions)))


def _element(feature: Any) -> Any:
    """The type of a list's elements."""
    return feature[0] if isinstance(feature, list) else feature.feature


def _undecoded_struct(feature: Any) -> Any:
    """The type of undecoded media in rows that `map` makes: encoding audio and video by type needs torchcodec."""
    if isinstance(feature, (Audio, Video)):
        return {"bytes": Value("binary"), "path": Value("string")}
    return undecoded_feature(feature)


def _from_lists(dataset: Dataset, match: Match, table: PairTable, label: str) -> Dataset:
    """Lists of samples: the samples of each pair are copied to the cache."""
    [column] = match.samples
    sample = _element(dataset.features[column])
    features = Features({"prompt": dataset.features[match.prompt]})
    features |= {name: _undecoded_struct(sample) for name in ("chosen", "rejected")}
    columns = [match.prompt, column]
    if match.condition is not None:
        features["image"] = _undecoded_struct(dataset.features[match.condition])
        columns.append(match.condition)
    if table.soft_labels is not None:
        features["soft_label"] = Value("float64")
    rows, starts = np.unique(table.rows, return_index=True)  # rows are in ascending order
    ends = [*starts[1:], len(table.rows)]
    source = dataset.select_columns(columns).select(rows)

    def pairs_of(batch: pa.Table, numbers: list[int]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {name: [] for name in features}
        for row, number in zip(batch.to_pylist(), numbers, strict=True):
            for pair in range(starts[number], ends[number]):
                made["prompt"].append(row[match.prompt])
                made["chosen"].append(row[column][table.chosen[pair]])
                made["rejected"].append(row[column][table.rejected[pair]])
                if match.condition is not None:
                    made["image"].append(row[match.condition])
                if table.soft_labels is not None:
                    made["soft_label"].append(table.soft_labels[pair])
        return made

    parts = [table.rows, table.chosen, table.rejected, table.soft_labels]
    # As Arrow, whose cells are undecoded; `datasets` would copy a list whose type is cast.
    pairs = source.with_format("arrow").map(
        pairs_of,
        batched=True,
        batch_size=_ROWS_AT_ONCE if sample != Value("string") else 1000,
        with_indices=True,
        remove_columns=source.column_names,
        features=features,
        new_fingerprint=Hasher.hash([dataset_fingerprint(dataset), match.columns, parts]),
        desc=f"Pairs of {label}",
    )
    pairs = pairs.with_format(None)
    for name in ("chosen", "rejected"):
        if isinstance(sample, (Audio, Image, Video)):
            pairs = pairs.cast_column(name, sample)
    return pairs if match.condition is None else pairs.cast_column("image", dataset.features[match.condition])


def _from_rows(dataset: Dataset, match: Match, table: PairTable, label: str) -> Dataset:
    """Rankings with one sample per row: the samples of each pair are copied to the cache."""
    [column] = match.samples
    halves = []
    for names, rows in (
        ({"prompt": match.prompt, "chosen": column}, table.chosen),
        ({"rejected": column}, table.rejected),
    ):
        half = dataset.select_columns([*names.values()]).select(rows)
        # As Arrow, whose cells are undecoded.
        half = half.with_format("arrow").flatten_indices(features=half.features).with_format(None)
        halves.append(half.rename_columns({old: new for new, old in names.items()}))
    pairs = concatenate_datasets(halves, axis=1)
    return pairs if table.soft_labels is None else pairs.add_column("soft_label", table.soft_labels)


@dataclass(frozen=True)
class _StreamPairs:
    """Makes the pairs of a batch; the function that `map` calls, which data loader workers get by pickling.

    Args:
        match: The stream's layout.
        make_rows: The pairs of a batch of rows with these numbers.
        kept: The stream's columns beside prompt and samples, by what they become.
        soft: Whether the pairs have soft labels.
    """

    match: Match
    make_rows: MakeRows
    kept: dict[str, str]
    soft: bool

    def __call__(self, batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        names = ["prompt", "chosen", "rejected", *self.kept, *["soft_label"] * self.soft]
        made: dict[str, list[Any]] = {name: [] for name in names}
        for position, chosen, rejected, soft_label in self.make_rows(batch, rows):
            made["prompt"].append(batch[self.match.prompt][position])
            made["chosen"].append(chosen)
            made["rejected"].append(rejected)
            for name, column in self.kept.items():
                made[name].append(batch[column][position])
            if self.soft:
                made["soft_label"].append(soft_label)
        return made


def undecoded_stream(dataset: IterableDataset, columns: Sequence[str]) -> IterableDataset:
    """A stream with media as bytes or paths."""
    for column in columns:
        wanted = undecoded_feature(dataset.features[column])
        if wanted != dataset.features[column]:
            dataset = dataset.cast_column(column, wanted)
    return dataset


def stream_pairs(dataset: IterableDataset, match: Match, make_rows: MakeRows, soft: bool) -> IterableDataset:
    """A stream's pairs, made as its rows are read.

    Args:
        make_rows: The pairs of a batch of rows with these numbers.
        soft: Whether the pairs have soft labels.
    """
    # Another format, such as tensors or Arrow tables, would reach the function that makes the pairs.
    dataset = dataset.with_format(None)
    columns = column_names(dataset)
    kept = {name: name for name in _kept_columns(match, columns)}
    if match.condition is not None:
        kept["image"] = match.condition
    features = None
    if dataset.features is not None:
        dataset = undecoded_stream(dataset, [*match.media, *kept.values()])
        sample = dataset.features[match.samples[0]]
        sample = _element(sample) if match.layout.shape == "list" else sample
        features = Features({"prompt": dataset.features[match.prompt]})
        features |= {name: _undecoded_struct(sample) for name in ("chosen", "rejected")}
        features |= {name: _undecoded_struct(dataset.features[column]) for name, column in kept.items()}
        if soft:
            features["soft_label"] = Value("float64")
    return dataset.map(
        _StreamPairs(match, make_rows, kept, soft),
        batched=True,
        batch_size=_ROWS_AT_ONCE,
        with_indices=True,
        remove_columns=columns,
        features=features,
    )

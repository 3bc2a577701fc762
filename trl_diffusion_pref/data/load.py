"""Loads pairs from the Hub, from files and folders of any known kind."""

import csv
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    LargeList,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from .decode.cell import undecoded_feature
from .folders import FOLDER_NAMES, kind_of_file, load_pair_folders, load_tars, pair_folders
from .known_layouts import recognise_layout
from .layouts import column_names
from .pair_options import PairOptions, RankingPairs, Ties
from .pairs import as_pairs
from .preference_labels import Dimension


Source = str | os.PathLike[str]

# By suffix: the loader of `datasets`; "webdataset" is read by `load_tars`.
_LOADERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
# Words in the path of a file that tell its split; the first one is its name.
_SPLITS = (
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation"),
    ("train", "training"),
)
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# The columns of samples of rows that are no pairs.
SINGLE_SAMPLES = ("image", "video", "audio")


def load_pairs(
    source: Source | Sequence[Source] | Dataset | IterableDataset | DatasetDict | IterableDatasetDict,
    *,
    split: str = "train",
    streaming: bool = False,
    column_map: Mapping[str, str] | None = None,
    ranking_pairs: RankingPairs = "best_worst",
    min_score_difference: float = 0.0,
    ties: Ties = "drop",
    soft_label: float = 1.0,
    label_noise: float = 0.0,
    preference_dimension: Dimension = "majority",
    seed: int = 0,
) -> Dataset | IterableDataset:
    """Loads pairs of samples from any source and any known layout.

    Args:
        source: One of these:

            * a name on the Hub, or a data set that is loaded already
            * a parquet, JSON, JSON Lines, CSV or Arrow file; several of them as a glob or a list; or a folder of them.
              Relative paths in columns of samples are relative to the file that contains them
            * a folder written by `save_to_disk`
            * a folder with `metadata.jsonl` or `metadata.csv` and the files that it names
            * a folder with two folders of files with equal names: `w` and `l`, `chosen` and `rejected`, `win` and
              `lose`, `good` and `bad`, or `preferred` and `rejected`; captions in `x.txt` or `x.caption` beside the
              preferred file
            * a WebDataset tar, several of them, or a folder of them
        split: Of a data set that has several. Files that are named one by one are one split.
        streaming: Whether rows are read when they are needed, in place of a copy in the cache of `datasets`.
        column_map, ranking_pairs, min_score_difference, ties, soft_label, label_noise, preference_dimension, seed: See
            `PairOptions`.

    Returns:
        Pairs as `as_pairs` makes them.

    Raises:
        ValueError: The source does not exist, cannot be read, or has no known layout or no pairs.
    """
    options = PairOptions(
        column_map=column_map,
        ranking_pairs=ranking_pairs,
        min_score_difference=min_score_difference,
        ties=ties,
        soft_label=soft_label,
        label_noise=label_noise,
        preference_dimension=preference_dimension,
        seed=seed,
    )
    dataset, label = read_source(source, split=split, streaming=streaming, column_map=column_map)
    return as_pairs(dataset, label, options)


def read_source(
    source: Source | Sequence[Source] | Dataset | IterableDataset | DatasetDict | IterableDatasetDict,
    *,
    split: str = "train",
    streaming: bool = False,
    column_map: Mapping[str, str] | None = None,
    any_columns: bool = False,
) -> tuple[Dataset | IterableDataset, str]:
    """The rows of a source as they are stored, and what messages call it.

    Args:
        source, split, streaming, column_map: As for `load_pairs`.
        any_columns: Whether files may have columns of no known layout. Paths are then made absolute in the columns
            `image`, `video` and `audio`.

    Raises:
        ValueError: The source does not exist or cannot be read, or, without `any_columns`, files have no known layout.
    """
    if isinstance(source, (str, os.PathLike)):
        label = str(source)
    elif isinstance(source, (Dataset, IterableDataset, DatasetDict, IterableDatasetDict)):
        label = "the data set"
    else:
        label = f"{source[0]} and {len(source) - 1} more" if len(source) > 1 else ", ".join(map(str, source))
    return _Reader(label, split, streaming, column_map, any_columns).read(source), label


def has_splits(source: Source) -> bool:
    """Whether a path or a name on the Hub may have several splits; of others `load_pairs` reads all rows for any."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return not path.exists() and not glob.has_magic(str(path))
    if (path / "state.json").exists() or any((path / name).is_file() for name in _METADATA):
        return False
    return pair_folders(path) is None


class _Reader:
    """Reads one source as a data set in whatever layout it has."""

    def __init__(
        self, label: str, split: str, streaming: bool, column_map: Mapping[str, str] | None, any_columns: bool
    ) -> None:
        self.label, self.split, self.streaming, self.column_map = label, split, streaming, column_map
        self.any_columns = any_columns

    def read(self, source: Any) -> Dataset | IterableDataset:
        """The data set of a source that `load_pairs` takes."""
        if isinstance(source, (DatasetDict, IterableDatasetDict)):
            return self._stored(self._split_of(source))
        if isinstance(source, (Dataset, IterableDataset)):
            return self._stored(source)
        if not isinstance(source, (str, os.PathLike)):
            return self._files([self._existing(Path(path).expanduser()) for path in source])
        path = Path(source).expanduser()
        if path.is_dir():
            return self._folder(path)
        if path.exists():
            return self._files([path])
        if glob.has_magic(str(path)):
            found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]
            return self._files(found or [self._existing(path)])
        if isinstance(source, str) and _may_be_on_the_hub(source):
            return self._from_hub(source)
        return self._files([self._existing(path)])

    # ---- Folders -------------------------------------------------------------------------------------------------

    def _folder(self, folder: Path) -> Dataset | IterableDataset:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            stored = load_from_disk(str(folder))
            return self._stored(self._split_of(stored) if isinstance(stored, DatasetDict) else stored)
        for place in (folder / self.split, folder):
            for name in _METADATA:
                if (place / name).is_file():
                    return self._metadata(place / name)
        folders = pair_folders(folder)
        if folders is not None:
            return self._stored(load_pair_folders(*folders))
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        loaders = {_LOADERS[path.suffix]: path for path in files if path.suffix in _LOADERS}
        if not files:
            raise ValueError(f"{folder} is empty.")
        if not loaders:
            suffixes = ", ".join(sorted({path.suffix or "none" for path in files}))
            names = ", ".join("/".join(names) for names in FOLDER_NAMES)
            raise ValueError(
                f"{folder} has no file that can be read; suffixes: {suffixes}. It needs {', '.join(_LOADERS)} files, "
                f"{' or '.join(_METADATA[:2])} beside the samples, or two folders with files of equal names ({names})."
            )
        if len(loaders) > 1:
            raise ValueError(
                f"{folder} mixes kinds of files: {', '.join(map(str, loaders.values()))}. Name those to read."
            )
        by_split: dict[str, list[Path]] = {}
        for path in files:
            if path.suffix in _LOADERS:
                by_split.setdefault(_split_by_name(path.relative_to(folder)), []).append(path)
        return self._files(self._split_of(by_split))

    def _metadata(self, file: Path) -> Dataset | IterableDataset:
        """A folder of samples that a file names."""
        with _explained(file):
            named = {name: value for name, value in _first_row(file).items() if name.endswith("_file_name")}
        # The folder loaders for video and audio need torchcodec; paths do not.
        if named and all(kind_of_file(str(value)) == "image" for value in named.values()):
            return self._load("imagefolder", [file])
        return self._files([file])

    # ---- Files ---------------------------------------------------------------------------------------------------

    def _files(self, files: Sequence[Path]) -> Dataset | IterableDataset:
        if not files:
            raise ValueError("The list of files is empty.")
        by_loader: dict[str, Path] = {}
        for file in files:
            if file.suffix not in _LOADERS:
                raise ValueError(f"{file}: a file with the suffix {file.suffix!r} is none of {', '.join(_LOADERS)}.")
            by_loader.setdefault(_LOADERS[file.suffix], file)
        if len(by_loader) > 1:
            raise ValueError(f"{self.label} mixes kinds of files: {', '.join(map(str, by_loader.values()))}.")
        [loader] = by_loader
        if loader == "webdataset":
            return load_tars(files, label=self.label, column_map=self.column_map, streaming=self.streaming)
        # Those of one folder together, since paths are relative to it.
        folders: dict[Path, list[Path]] = {}
        for file in files:
            folders.setdefault(file.resolve().parent, []).append(file)
        parts = [self._resolved(self._load(loader, group), folder) for folder, group in folders.items()]
        return parts[0] if len(parts) == 1 else concatenate_datasets(parts)

    def _load(self, loader: str, files: Sequence[Path]) -> Dataset | IterableDataset:
        with _explained(", ".join(map(str, files[:3])) + ", ..." * (len(files) > 3)):
            if loader == "arrow" and not self.streaming and all(map(_is_arrow_stream, files)):
                # These are mapped into memory as they are; the loader would copy them to the cache.
                return concatenate_datasets([Dataset.from_file(str(file)) for file in files])
            return load_dataset(
                loader,
                data_files={self.split: [glob.escape(str(file)) for file in files]},
                split=self.split,
                streaming=self.streaming,
            )

    def _resolved(self, dataset: Dataset | IterableDataset, folder: Path) -> Dataset | IterableDataset:
        """The data set with absolute paths in columns of samples."""
        columns = column_names(dataset)
        try:
            media = recognise_layout(columns, self.label, self.column_map).media
        except ValueError:
            if not self.any_columns or self.column_map:
                raise
            media = tuple(name for name in SINGLE_SAMPLES if name in columns)
        # Pairs may have condition images beside what their layout is recognised by.
        media = tuple(dict.fromkeys([*media, *(name for name in ("image", "images") if name in columns)]))
        if dataset.features is not None:
            media = tuple(name for name in media if _holds_paths(dataset.features[name]))
        if isinstance(dataset, IterableDataset):
            features = dataset.features
            if features is not None:
                features = Features({name: undecoded_feature(feature) for name, feature in features.items()})
                dataset = dataset.cast(features)
            return dataset.map(partial(_absolute_cells, columns=media, folder=folder), features=features)
        for name in media:
            feature = dataset.features[name]
            paths = [absolute_cell(cell, folder) for cell in dataset[name]]
            # The column alone is replaced, in memory; the others are not copied.
            dataset = dataset.remove_columns(name).add_column(name, paths, feature=feature)
        return dataset

    # ---- The Hub, splits and errors ------------------------------------------------------------------------------

    def _from_hub(self, name: str) -> Dataset | IterableDataset:
        try:
            return load_dataset(name, split=self.split, streaming=self.streaming)
        # Also DatasetNotFoundError, which is a FileNotFoundError.
        except OSError as error:
            raise ValueError(
                f"{name!r} is neither a file or folder here ({_nearest(Path(name))}), nor a data set of the Hub that "
                f"can be loaded: {error}"
            ) from error
        # Another split than those that exist, several configurations, or a loading script.
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"The data set {name!r} cannot be loaded with split={self.split!r}: {error} If it needs other "
                "arguments, load it yourself and pass the result: load_pairs(datasets.load_dataset(...))."
            ) from error

    def _stored(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        return dataset.to_iterable_dataset() if self.streaming and isinstance(dataset, Dataset) else dataset

    def _split_of(self, splits: Mapping[str, Any]) -> Any:
        if self.split not in splits:
            raise ValueError(f"{self.label} has no split {self.split!r}; its splits: {', '.join(splits)}.")
        return splits[self.split]

    def _existing(self, path: Path) -> Path:
        if not path.exists():
            what = "no file matches" if glob.has_magic(str(path)) else "there is no file or folder"
            raise ValueError(f"{path}: {what} ({_nearest(path)}).")
        return path


@contextmanager
def _explained(source: object) -> Iterator[None]:
    """Errors of the loaders as a ValueError that names the source."""
    try:
        yield
    # Arrow's errors and those of text and JSON are ValueErrors or OSErrors.
    except (DatasetGenerationError, ValueError, OSError) as error:
        # The loaders chain what was wrong with the file below an error without content.
        cause = error.__cause__ or error
        raise ValueError(f"{source} cannot be read ({type(cause).__name__}: {cause}).") from error


def _may_be_on_the_hub(source: str) -> bool:
    """Whether a text is a name, or an owner and a name; not a path to a file."""
    parts = source.split("/")
    return len(parts) <= 2 and all(parts) and source[0] not in ".~" and Path(source).suffix not in _LOADERS


def _nearest(path: Path) -> str:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return f"the nearest folder that exists is {folder}"


def _split_by_name(path: Path) -> str:
    """The split of a file in a folder: NAME-00000-of-00010 as the Hub has them, or a word in its path, or "train"."""
    shard = re.match(r"(.+)-\d{5}-of-\d{5}", path.name)
    if shard:
        return shard[1]
    words = re.split("[^a-z]+", str(path).lower())
    return next((names[0] for names in _SPLITS if set(names) & set(words)), "train")


def _holds_paths(feature: Any) -> bool:
    if isinstance(feature, (List, LargeList)):
        feature = feature.feature
    return feature in (Value("string"), Value("large_string"))


def _is_arrow_stream(file: Path) -> bool:
    """Whether an Arrow file is in the streaming format, in which `datasets` writes; the other one has a signature."""
    with open(file, "rb") as start:
        return start.read(6) != b"ARROW1"


def _absolute_cells(row: dict[str, Any], columns: Sequence[str], folder: Path) -> dict[str, Any]:
    return {column: absolute_cell(row[column], folder) for column in columns}


def absolute_cell(cell: Any, folder: Path) -> Any:
    """A path, or each of a list, that is relative to a folder; URLs, absolute paths and all else unchanged."""
    if isinstance(cell, list):
        return [absolute_cell(item, folder) for item in cell]
    if not isinstance(cell, str) or "://" in cell or cell.startswith("data:") or os.path.isabs(cell):
        return cell
    return str(folder / cell)


def _first_row(file: Path) -> dict[str, Any]:
    """The first row of a JSON Lines, CSV or parquet file."""
    if file.suffix == ".parquet":
        return next(iter(next(pq.ParquetFile(file).iter_batches(batch_size=1)).to_pylist()), {})
    with open(file, encoding="utf-8", newline="") as lines:
        if file.suffix == ".csv":
            return next(csv.DictReader(lines), {})
        return json.loads(next(iter(lines), "{}"))

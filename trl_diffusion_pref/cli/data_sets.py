"""Data sets by name, path or glob, one or several."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, Image, IterableDataset, Value, concatenate_datasets, interleave_datasets

from ..data import PAIRS, Layout, load_encoded_dataset
from ..data.encoded import EncodedDataset, is_encoded_dataset
from ..data.load import has_splits, read_source
from ..data.pairs import as_pairs
from ..preference_data import read_prompts
from ..shapes import preference_pairs
from ..training.config import DiffusionPreferenceConfig
from .parser import UsageError
from .run_options import DataOptions


# Columns of condition images.
_CONDITIONS = ("image", "images")

AnyRows: TypeAlias = Dataset | IterableDataset | EncodedDataset


def training_data(
    options: DataOptions, config: DiffusionPreferenceConfig, layout: Layout = PAIRS
) -> tuple[AnyRows, AnyRows | None]:
    """The rows to train on, and those to evaluate on where the config evaluates.

    Args:
        layout: Of the trainer; without columns of samples, prompts are enough.

    Raises:
        UsageError: Weights that do not fit.
        ValueError: A data set that cannot be read, or lacks the split.
    """
    names, weights = options.dataset_name, options.dataset_weights
    undivided = next((name for name in names if not _has_splits(name)), None)
    if undivided is not None and options.dataset_train_split != "train":
        raise UsageError(f"{undivided} has no splits, so dataset_train_split cannot choose one. Leave it out.")
    evaluates = config.eval_strategy != "no" or config.eval_on_start
    if options.eval_dataset_name and not evaluates:
        raise UsageError("eval_dataset_name has no effect without evaluation. Add --eval_strategy steps.")
    if evaluates and undivided is not None and not options.eval_dataset_name:
        raise UsageError(
            f"{undivided} has no splits, and would be trained on and evaluated on. Name other rows by "
            "--eval_dataset_name, or leave out the evaluation."
        )
    pairs = layout.is_pairs
    others = (options.eval_dataset_name or names) if evaluates else []
    # Mixed rows are converted to pairs here, and then all are: the trainer has one set of options for both.
    mixed = pairs and max(len(names), len(others)) > 1
    mixture = _Mixture(config, mixed, layout)
    train = mixture.read(names, weights, options.dataset_train_split, streaming=options.dataset_streaming)
    evaluation = mixture.read(others, None, options.dataset_test_split, streaming=False) if evaluates else None
    if mixed:
        # They were applied, and the rows have our names of columns.
        config.column_map, config.min_score_difference = None, 0.0
    return train, evaluation


def _has_splits(name: str) -> bool:
    return _is_shapes(name) or (has_splits(name) and not is_encoded_dataset(name))


def _is_shapes(name: str) -> bool:
    return name.partition(":")[0] == "shapes" and not Path(name).exists()


class _Mixture:
    """Reads one or several data sets as one.

    Args:
        convert: Whether rows become pairs with our names of columns.
        layout: Of the rows.
    """

    def __init__(self, config: DiffusionPreferenceConfig, convert: bool, layout: Layout) -> None:
        self.config, self.convert, self.pairs, self.prompts_alone = (
            config,
            convert,
            layout.is_pairs,
            not layout.samples,
        )
        self.column_map = config.column_map if isinstance(config.column_map, dict) else None
        # The trainer exchanges the labels of all rows together.
        self.pair_options = replace(config.pair_options(), label_noise=0.0)

    def read(self, names: Sequence[str], weights: Sequence[float] | None, split: str, *, streaming: bool) -> AnyRows:
        """The rows of all, one after the other or drawn with the weights as probabilities.

        Raises:
            UsageError: Weights, or data sets that do not fit together.
        """
        _check_weights(names, weights)
        parts: list[Any] = []
        for name in names:
            rows = one_data_set(name, split, self.column_map, streaming=streaming, pairs=self.pairs)
            if isinstance(rows, EncodedDataset) and len(names) > 1:
                raise UsageError(f"{name} is encoded already, and cannot be mixed with others. Encode the mixture.")
            converted = self.convert and not isinstance(rows, EncodedDataset)
            parts.append(as_pairs(rows, name, self.pair_options) if converted else rows)
        if len(parts) == 1:
            return parts[0]
        if any(isinstance(part, IterableDataset) for part in parts):
            parts = [part.to_iterable_dataset() if isinstance(part, Dataset) else part for part in parts]
        parts = self._with_equal_columns(names, parts)
        if weights is None:
            return concatenate_datasets(parts)
        shares = [weight / sum(weights) for weight in weights]
        how = "first_exhausted"
        return interleave_datasets(parts, probabilities=shares, seed=self.config.seed, stopping_strategy=how)

    def _with_equal_columns(self, names: Sequence[str], parts: list[Any]) -> list[Any]:
        """The columns that all have, of prompts without samples. Where some have soft labels, others' are certain."""
        labels = (*_CONDITIONS, getattr(self.config, "soft_label_column", "soft_label"))
        for wanted in labels if self.pairs else ():
            lacking = [name for name, part in zip(names, parts, strict=True) if wanted not in part.column_names]
            # What `as_pairs` makes of votes may be missing where there are none.
            if lacking and len(lacking) < len(parts) and wanted != "soft_label":
                raise UsageError(f"{lacking[0]} has no column {wanted!r}, which other data sets of the mixture have.")
        soft = [part for part in parts if self.pairs and "soft_label" in part.column_names]
        for number, part in enumerate(parts):
            if soft and "soft_label" not in part.column_names:
                feature = soft[0].features["soft_label"] if soft[0].features else Value("float32")
                parts[number] = part.map(lambda _: {"soft_label": 1.0}).cast_column("soft_label", feature)
        common = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
        common = [name for name in common if not self.prompts_alone or name in ("prompt", *_CONDITIONS)]
        parts = [part.select_columns(common) for part in parts]
        for column in common:
            # Some have images, others paths.
            if any(isinstance((part.features or {}).get(column), Image) for part in parts):
                parts = [part.cast_column(column, Image()) for part in parts]
        return parts


def _check_weights(names: Sequence[str], weights: Sequence[float] | None) -> None:
    if weights is None:
        return
    if len(weights) != len(names):
        raise UsageError(f"dataset_weights has {len(weights)} numbers for {len(names)} data sets; give one for each.")
    wrong = next((weight for weight in weights if not (math.isfinite(weight) and weight > 0)), None)
    if wrong is not None:
        raise UsageError(f"dataset_weights has {wrong}; weights must be positive and finite.")


def one_data_set(
    name: str, split: str, column_map: dict[str, str] | None, *, streaming: bool = False, pairs: bool = True
) -> AnyRows:
    """Rows as they are stored; trainers recognise their layout."""
    if _is_shapes(name):
        return _shapes(name, split)
    if is_encoded_dataset(name):
        return load_encoded_dataset(name)
    if not pairs and Path(name).suffix == ".txt":
        return Dataset.from_dict({"prompt": read_prompts(name)})
    rows, _ = read_source(name, split=split, streaming=streaming, column_map=column_map, any_columns=not pairs)
    return rows


def _shapes(name: str, split: str) -> Dataset:
    count = name.partition(":")[2] or "512"
    if not count.isdigit() or not int(count):
        raise UsageError(f"{name!r}: write shapes:512 for 512 pairs of drawn shapes.")
    seeds = {"train": 0, "test": 1}
    if split not in seeds:
        raise UsageError(f"{name} has the splits train and test, not {split!r}.")
    return preference_pairs(int(count), seed=seeds[split])

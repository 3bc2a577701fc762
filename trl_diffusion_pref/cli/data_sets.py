"""Data sets by name, path or glob, one or several."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset, Value, concatenate_datasets, interleave_datasets

from ..data import PAIRS, Layout, load_encoded_dataset
from ..data.encoded import EncodedDataset, is_encoded_dataset
from ..data.load import has_splits, load_pairs, read_source
from ..preference_data import read_prompts
from ..shapes import preference_pairs
from ..training.config import DiffusionPreferenceConfig
from .parser import UsageError
from .run_options import DataOptions


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
    streaming, pairs = options.dataset_streaming, layout.samples == PAIRS.samples
    train = _mixture(names, weights, options.dataset_train_split, config, streaming=streaming, pairs=pairs)
    if not evaluates:
        return train, None
    others = options.eval_dataset_name or names
    return train, _mixture(others, None, options.dataset_test_split, config, streaming=False, pairs=pairs)


def _has_splits(name: str) -> bool:
    return _is_shapes(name) or (has_splits(name) and not is_encoded_dataset(name))


def _is_shapes(name: str) -> bool:
    return name.partition(":")[0] == "shapes" and not Path(name).exists()


def _mixture(
    names: Sequence[str],
    weights: Sequence[float] | None,
    split: str,
    config: DiffusionPreferenceConfig,
    *,
    streaming: bool,
    pairs: bool,
) -> AnyRows:
    if weights is not None:
        if len(weights) != len(names):
            raise UsageError(
                f"dataset_weights has {len(weights)} numbers for {len(names)} data sets; give one for each."
            )
        wrong = next((weight for weight in weights if not (math.isfinite(weight) and weight > 0)), None)
        if wrong is not None:
            raise UsageError(f"dataset_weights has {wrong}; weights must be positive and finite.")
    if len(names) == 1:
        return one_data_set(names[0], split, config, streaming=streaming, pairs=pairs)
    parts: list[Any] = []
    for name in names:
        rows = one_data_set(name, split, config, streaming=streaming, pairs=pairs)
        if isinstance(rows, EncodedDataset):
            raise UsageError(f"{name} is encoded already, and cannot be mixed with others. Encode the mixture.")
        parts.append(load_pairs(rows, split=split, **_pair_options(config)) if pairs else rows)
    if pairs:
        parts = _with_equal_columns(parts)
        # The parts have our names of columns now.
        config.column_map = None
    if weights is None:
        return concatenate_datasets(parts)
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(parts, probabilities=shares, seed=config.seed, stopping_strategy="first_exhausted")


def one_data_set(
    name: str, split: str, config: DiffusionPreferenceConfig, *, streaming: bool = False, pairs: bool = True
) -> AnyRows:
    """Rows as they are stored; trainers recognise their layout."""
    if _is_shapes(name):
        return _shapes(name, split)
    if is_encoded_dataset(name):
        return load_encoded_dataset(name)
    if not pairs and Path(name).suffix == ".txt":
        return Dataset.from_dict({"prompt": read_prompts(name)})
    column_map = config.column_map if isinstance(config.column_map, dict) else None
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


def _pair_options(config: DiffusionPreferenceConfig) -> dict[str, Any]:
    # Not label_noise: the trainer exchanges the labels of all rows together.
    names = ("column_map", "ranking_pairs", "min_score_difference", "ties")
    return {name: getattr(config, name) for name in names}


def _with_equal_columns(parts: list[Any]) -> list[Any]:
    """Pairs of which some have soft labels: the others' are certain."""
    soft = [part for part in parts if "soft_label" in part.column_names]
    names = {name for part in parts for name in part.column_names}
    equal = []
    for part in parts:
        if soft and "soft_label" not in part.column_names:
            feature = soft[0].features["soft_label"] if soft[0].features else Value("float32")
            part = part.map(lambda _: {"soft_label": 1.0}).cast_column("soft_label", feature)
        common = [name for name in ("prompt", "chosen", "rejected", "soft_label") if name in names]
        equal.append(part.select_columns(common))
    return equal

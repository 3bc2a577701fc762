"""A trainer's `eval_dataset`: none, one data set, or several by their names."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset


T = TypeVar("T")


def named_datasets(eval_dataset: Any) -> Iterator[tuple[str, Dataset | IterableDataset]]:
    """The data sets by the names under which the loop evaluates them; "" where there is one."""
    if isinstance(eval_dataset, dict):
        yield from eval_dataset.items()
    elif eval_dataset is not None:
        yield "", eval_dataset


def all_datasets(train_dataset: Any, eval_dataset: Any) -> list[Dataset | IterableDataset]:
    """Those that there are."""
    evaluation = [dataset for _, dataset in named_datasets(eval_dataset)]
    return [dataset for dataset in [train_dataset, *evaluation] if dataset is not None]


def for_each_dataset(function: Callable[[Any, str], T], eval_dataset: Any) -> dict[str, T] | T | None:
    """What `function(dataset, what)` returns, in the form of `eval_dataset`; `what` names a data set in messages."""
    if isinstance(eval_dataset, dict):
        return {name: function(dataset, f"eval_dataset[{name!r}]") for name, dataset in eval_dataset.items()}
    return None if eval_dataset is None else function(eval_dataset, "eval_dataset")

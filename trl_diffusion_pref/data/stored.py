"""What is said and added about the rows of stored data sets without reading, or copying, their samples."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.fingerprint import Hasher

from .layouts import Layout, dataset_fingerprint


def stored_rows(dataset: Dataset) -> np.ndarray:
    """`(N,)` int64: the row of `dataset.data` that each row is.

    `select`, `shuffle` and others keep the table and make such a mapping; `datasets` has no public name for it.
    """
    if dataset._indices is None:
        return np.arange(len(dataset))
    return dataset._indices.column(0).to_numpy().astype(np.int64)


def whole_table(dataset: Dataset) -> Dataset:
    """All rows of `dataset.data`: a column cannot be added to a selection without copying it."""
    return Dataset(
        dataset.data,
        info=dataset.info.copy(),
        split=dataset.split,
        fingerprint=Hasher.hash([dataset_fingerprint(dataset), "all rows"]),
    )


def list_lengths(dataset: Dataset, column: str, label: str) -> np.ndarray:
    """`(N,)`: how many samples each row has in a column of lists.

    Raises:
        ValueError: The column has no lists.
    """
    cells = dataset.data.column(column)
    if not (
        pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type) or pa.types.is_fixed_size_list(cells.type)
    ):
        raise ValueError(f"{label}, column '{column}': holds {dataset.features[column]}, not lists of samples.")
    lengths = pc.fill_null(pc.list_value_length(cells), 0).to_numpy()
    return lengths[stored_rows(dataset)]


def lengths_of_rows(dataset: Dataset, layout: Layout, label: str) -> np.ndarray:
    """`(N,)`: how many samples each row has; of lists of a length that is not allowed, which are problems, one."""
    if layout.fewest_per_cell is None:
        return np.full(len(dataset), layout.num_samples)
    lengths = list_lengths(dataset, layout.samples[0], label)
    return np.where((lengths >= layout.fewest_per_cell) & (lengths <= layout.num_samples), lengths, 1)


def with_column(dataset: Dataset, name: str, values: np.ndarray) -> Dataset:
    """A data set with a column of numbers, without copying its other columns.

    Args:
        values: `(N,)`, or `(N, M)` for lists of M; equal for rows that are the same row of the stored table.
    """
    stored, whole = stored_rows(dataset), whole_table(dataset)
    of_whole = np.zeros((len(whole), *values.shape[1:]), dtype=values.dtype)
    of_whole[stored] = values
    return whole.add_column(name, list(of_whole) if values.ndim > 1 else of_whole).select(stored)


def group_numbers(dataset: Dataset) -> np.ndarray:
    """`(N,)` int64: rows with the same prompt, or the same captions, have the same number; from 0, as they come."""
    numbers: dict[str, int] = {}
    cells = dataset.select_columns("prompt").with_format(None)["prompt"]
    return np.asarray([numbers.setdefault(json.dumps(cell), len(numbers)) for cell in cells], dtype=np.int64)

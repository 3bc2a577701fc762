"""Which columns a data set must have, and what their cells may hold."""

from typing import Any

from datasets import Dataset, IterableDataset


PAIR_COLUMNS = ("prompt", "chosen", "rejected")


def dataset_fingerprint(dataset: Dataset) -> str:
    """The fingerprint that `datasets` keeps of a data set's content and history; it has no public name for it."""
    return dataset._fingerprint


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns, from the first row where a stream does not know them before it is read."""
    return dataset.column_names or list(next(iter(dataset), {}))


def check_columns(dataset: Any, what: str, needed: tuple[str, ...] = PAIR_COLUMNS) -> None:
    """Refuses what is not a data set with the needed columns.

    Args:
        dataset: What the caller passed.
        what: "train_dataset" or "eval_dataset", for the message.
        needed: Column names.

    Raises:
        ValueError: No data set, an empty one, or missing columns.
        TypeError: Not a `datasets.Dataset` or `IterableDataset`.
    """
    if dataset is None:
        raise ValueError(
            f"{what} is missing: pass a datasets.Dataset with the column{'s' * (len(needed) > 1)} {', '.join(needed)}."
        )
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"{what} is a {type(dataset).__name__}; pass a datasets.Dataset or IterableDataset (one split, not a "
            "dictionary of splits)."
        )
    columns = column_names(dataset)
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(
            f"{what} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; found: "
            f"{', '.join(columns) or 'none'}. Rename yours: "
            f"dataset.rename_columns({{'your_name': '{missing[0]}'}})."
        )
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{what} has no rows.")


def prompt_problem(prompt: Any) -> str | None:
    """What is wrong with a cell of the prompt column, or None."""
    if not isinstance(prompt, str):
        return f"is {type(prompt).__name__}, not a string"
    if not prompt.strip():
        return "is empty"
    return None


def check_prompts(prompts: list[Any], rows: list[int], what: str) -> None:
    """Refuses prompts that are empty or no strings, naming the rows.

    Raises:
        ValueError: With the first ten offending rows.
    """
    problems = [
        f"row {row}, column 'prompt': {problem}"
        for row, prompt in zip(rows, prompts, strict=True)
        if (problem := prompt_problem(prompt))
    ]
    raise_row_problems(problems, what)


def raise_row_problems(problems: list[str], what: str) -> None:
    """Raises a ValueError that lists up to ten problems, if there are any, and how to drop rows."""
    if not problems:
        return
    more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
    raise ValueError(
        f"{what} has rows that cannot be used:\n  "
        + "\n  ".join(problems[:10])
        + more
        + "\nRepair them, or leave them out: dataset.filter(lambda row, i: i not in bad_rows, with_indices=True)."
    )

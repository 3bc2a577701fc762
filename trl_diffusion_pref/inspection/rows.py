"""The rows of a source as they are stored, with the samples that training would use, and the pairs that they make."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

from datasets import Dataset, IterableDataset

from ..data.bad_rows import RowProblem
from ..data.decode.cell import undecoded_feature
from ..data.known_layouts import PAIRS_LAYOUT, Match, condition_columns, recognise_layout
from ..data.layouts import column_names
from ..data.load import SINGLE_SAMPLES
from ..data.pair_options import PairOptions, PairReport
from ..data.pairs import plan_pairs, row_pairs


Item = TypeVar("Item")
Content = Literal["pairs", "samples", "prompts", "unknown"]
# A sample's number: its row, then its place in the row. The last places are those of condition images, so many for
# each of their columns.
_PLACES = 2**20
_CONDITIONS, _OF_COLUMN = _PLACES - 2**12, 2**10
# How many rows with samples, and how many with prompts alone, are in memory at once.
_ROWS_AT_ONCE, _PROMPTS_AT_ONCE = 16, 1000


@dataclass(frozen=True)
class Sample:
    """One cell with a sample.

    Args:
        number: By which pairs refer to it.
        cell: Undecoded.
    """

    number: int
    cell: Any


@dataclass(frozen=True)
class SourceRow:
    """A row.

    Args:
        row: Its position.
        prompt: As it is stored.
        samples: Those of which pairs are made, then the condition images.
    """

    row: int
    prompt: Any
    samples: list[Sample]


@dataclass(frozen=True)
class FoundPair:
    """A pair.

    Args:
        row: Whose prompt it has.
        chosen: The number of the chosen sample.
        rejected: Likewise.
        soft_label: The probability that the chosen one is better, where it is known.
    """

    row: int
    chosen: int
    rejected: int
    soft_label: float | None = None


class SourceRows:
    """The rows of a data set, one pass of which finds the pairs.

    Args:
        dataset: As it is stored.
        label: How messages call it.
        options: How rows become pairs.
        max_rows: How many rows are read at most.

    Attributes:
        conditions: Columns of condition images, by what families call them.
        content: What the rows are; "unknown" has nothing that could be trained on.
        layout_problem: Why the rows are no pairs, with the nearest layout; None for pairs.
        pairs: Of the rows that have been read; of a stored data set all of them.
        problems: Rows whose labels cannot be used, likewise.
        count: How many rows have been read.
        total: How many will be, as far as that is known.

    Raises:
        ValueError: The options do not fit, or a ranking has several rows in a stream.
    """

    def __init__(
        self, dataset: Dataset | IterableDataset, label: str, options: PairOptions, max_rows: int | None
    ) -> None:
        self.label, self.options = label, options
        columns = column_names(dataset)
        self.columns = _described_columns(dataset, columns)
        self.match, self.layout_problem = _recognise(columns, label, options)
        self.prompt_column: str | None = "prompt" if "prompt" in columns else None
        self.sample_columns: tuple[str, ...] = ()
        if self.prompt_column is not None:
            self.sample_columns = tuple(name for name in SINGLE_SAMPLES if name in columns)[:1]
        self.conditions: dict[str, str] = {}
        if self.match is not None:
            self.prompt_column, self.sample_columns = self.match.prompt, self.match.samples
            if self.match.condition is not None:
                self.conditions = {"image": self.match.condition}
            elif self.match.layout is PAIRS_LAYOUT:
                self.conditions = condition_columns(columns)
        self._lists: set[str] = set()
        self.pairs: list[FoundPair] = []
        self.problems: list[RowProblem] = []
        self.rows_in_source: int | None = None
        self.count = 0
        self._counts = Counter[str]()
        self._report: PairReport | None = None
        if isinstance(dataset, IterableDataset):
            self._check_stream()
            self._dataset: Dataset | IterableDataset = dataset if max_rows is None else dataset.take(max_rows)
            self.total = max_rows
            return
        self.rows_in_source = len(dataset)
        self._dataset = dataset if max_rows is None else dataset.select(range(min(max_rows, len(dataset))))
        if self.match is not None and len(dataset):
            self._plan(self._dataset, self.match)
        self.total = len(self._wanted_rows())

    def _check_stream(self) -> None:
        if self.match is not None and self.match.layout.shape == "rows":
            raise ValueError(
                f"{self.label} is a stream in the layout {self.match.layout.name}, in which a ranking has several "
                "rows, so that its pairs are not known before all is read. Load the data set without streaming."
            )

    def _plan(self, dataset: Dataset, match: Match) -> None:
        table, self._report, self.problems = plan_pairs(dataset, match, self.label, self.options)
        several_rows = match.layout.shape == "rows"
        # A sample that has a row of its own is in the first place of it.
        rows = table.rows * _PLACES
        chosen, rejected = (
            (numbers * _PLACES if several_rows else rows + numbers).tolist()
            for numbers in (table.chosen, table.rejected)
        )
        soft = [None] * len(rows) if table.soft_labels is None else table.soft_labels.tolist()
        self.pairs = [FoundPair(*pair) for pair in zip(table.rows.tolist(), chosen, rejected, soft, strict=True)]

    # ---- What there is -------------------------------------------------------------------------------------------

    @property
    def content(self) -> Content:
        if self.match is not None:
            return "pairs"
        if self.prompt_column is None:
            return "unknown"
        return "samples" if self.sample_columns else "prompts"

    @property
    def report(self) -> PairReport | None:
        """What became of the rows that have been read; None where they are no pairs."""
        if self.match is None:
            return None
        if self._report is not None:
            return self._report
        counts = {"pairs": 0, **self._counts}
        return PairReport(layout=self.match.layout.name, rows=self.count, rankings=self.count, **counts)

    @property
    def is_cut(self) -> bool:
        """Whether `max_rows` left rows out, as far as that is known."""
        if self.rows_in_source is None:
            return self.total is not None and self.count >= self.total
        return self.count < self.rows_in_source

    @staticmethod
    def row_of(number: int) -> int:
        """The row of a sample."""
        return number // _PLACES

    @staticmethod
    def is_condition(number: int) -> bool:
        """Whether a sample's number is that of a condition image."""
        return number % _PLACES >= _CONDITIONS

    @staticmethod
    def condition_name(number: int) -> str:
        """What a condition image is called beside samples."""
        return "source" if number % _PLACES < _CONDITIONS + _OF_COLUMN else "mask"

    def place(self, number: int) -> str:
        """Where in its row a sample is, in words."""
        index = number % _PLACES
        if index >= _CONDITIONS:
            number_of_column, place = divmod(index - _CONDITIONS, _OF_COLUMN)
            column = list(self.conditions.values())[number_of_column]
            return f"column '{column}'" + f", number {place}" * (column in self._lists)
        if self.match is not None and self.match.layout.shape == "list":
            return f"column '{self.sample_columns[0]}', number {index}"
        return f"column '{self.sample_columns[index]}'"

    # ---- Reading -------------------------------------------------------------------------------------------------

    def _wanted_rows(self) -> list[int]:
        """The rows of a stored data set that training would use."""
        assert isinstance(self._dataset, Dataset)
        if self.content == "pairs":
            return sorted({row for pair in self.pairs for row in (pair.row, *map(self.row_of, _numbers(pair)))})
        return list(range(len(self._dataset))) if self.content != "unknown" else []

    def __iter__(self) -> Iterator[list[SourceRow]]:
        """A few rows at a time, samples undecoded."""
        if isinstance(self._dataset, IterableDataset):
            yield from self._streamed(self._dataset)
            return
        self.count = len(self._dataset)
        numbers = dict[int, set[int]]()
        for pair in self.pairs:
            for number in _numbers(pair):
                numbers.setdefault(self.row_of(number), set()).add(number % _PLACES)
        columns = [*dict.fromkeys(filter(None, (self.prompt_column, *self.sample_columns, *self.conditions.values())))]
        # As Arrow, whose cells are undecoded: to cast columns would copy lists of images.
        stored = self._dataset.with_format("arrow").select_columns(columns)
        for rows in _in_parts(self._wanted_rows(), _ROWS_AT_ONCE if self.sample_columns else _PROMPTS_AT_ONCE):
            cells = stored[rows].to_pylist()
            yield [
                self._row(row, values, sorted(numbers.get(row, {0}))) for row, values in zip(rows, cells, strict=True)
            ]

    def _streamed(self, dataset: IterableDataset) -> Iterator[list[SourceRow]]:
        media = (*self.sample_columns, *self.conditions.values())
        for column in media if dataset.features is not None else ():
            wanted = undecoded_feature(dataset.features[column])
            if wanted != dataset.features[column]:
                dataset = dataset.cast_column(column, wanted)
        for batch in _in_parts(dataset, _ROWS_AT_ONCE):
            read = []
            for values in batch:
                row = self._with_pairs(self.count, values)
                self.count += 1
                read += [row] if row is not None else []
            yield read

    def _with_pairs(self, row: int, values: dict[str, Any]) -> SourceRow | None:
        """A row of a stream, whose pairs are noted; None for one of which there are none."""
        if self.content == "unknown":
            return None
        if self.match is None:
            return self._row(row, values, [0])
        cells = {name: values[column] for name, column in self.match.labels.items()}
        count = len(self.sample_columns)
        if self.match.layout.shape == "list":
            count = len(values[self.sample_columns[0]] or [])
        pairs = row_pairs(row, cells, count, self.match, self.options, self._counts)
        if isinstance(pairs, RowProblem):
            self.problems.append(pairs)
            return None
        first = row * _PLACES
        self.pairs += [FoundPair(row, first + pair.chosen, first + pair.rejected, pair.soft_label) for pair in pairs]
        indices = {index for pair in pairs for index in (pair.chosen, pair.rejected)}
        return self._row(row, values, sorted(indices)) if indices else None

    def _row(self, row: int, values: dict[str, Any], indices: Sequence[int]) -> SourceRow:
        cells = [values[column] for column in self.sample_columns]
        if self.match is not None and self.match.layout.shape == "list":
            cells = cells[0]
        samples = [Sample(row * _PLACES + index, cells[index]) for index in indices if self.sample_columns]
        for number, column in enumerate(self.conditions.values()):
            cell, first = values[column], row * _PLACES + _CONDITIONS + number * _OF_COLUMN
            if isinstance(cell, list):
                self._lists.add(column)
            # An empty list is a cell that cannot be used.
            several = cell if isinstance(cell, list) and cell else [cell]
            samples += [Sample(first + index, one) for index, one in enumerate(several)]
        return SourceRow(row, values[self.prompt_column] if self.prompt_column else None, samples)


def _in_parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """So many at a time, as they are read."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


def _numbers(pair: FoundPair) -> tuple[int, int]:
    return pair.chosen, pair.rejected


def _described_columns(dataset: Dataset | IterableDataset, columns: Sequence[str]) -> dict[str, str]:
    """The columns with their types, in words; a stream may not know them."""
    features = dataset.features
    return {name: "" if features is None else _described(features[name]) for name in columns}


def _described(feature: Any) -> str:
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return f"list of {_described(inner)}"
    if isinstance(feature, dict):
        return "structure"
    return str(getattr(feature, "dtype", None) or type(feature).__name__) if not _is_media(feature) else _name(feature)


def _is_media(feature: Any) -> bool:
    return type(feature).__name__ in ("Image", "Video", "Audio")


def _name(feature: Any) -> str:
    return type(feature).__name__.lower()


def _recognise(columns: Sequence[str], label: str, options: PairOptions) -> tuple[Match | None, str | None]:
    """The layout, or why there is none."""
    try:
        match = recognise_layout(columns, label, options.column_map)
    except ValueError as error:
        if options.column_map:
            raise
        return None, str(error)
    options.check_layout(match.layout, label)
    return match, None

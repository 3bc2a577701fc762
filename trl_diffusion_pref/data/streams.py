"""Streamed data sets: rows are encoded as they are read, one batch ahead of the step."""

import itertools
import logging
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from textwrap import shorten
from threading import Lock
from typing import Any, NamedTuple

import torch
from datasets import IterableDataset
from torch import Tensor

from .bad_rows import RowProblem
from .batch import CONDITION, PROMPT, SCALAR, grouped
from .cells import caption_number, captions_of, prompt_problems, scalar_problems
from .encoding import PreparedRow, RowEncoder
from .options import as_stored
from .prompts import truncation_report, without_truncation_messages
from .stream_reading import Chunk, Progress, StreamPart, StreamRow, check_source, one_ahead


logger = logging.getLogger(__name__)

# Rows after which the share of bad ones means something, unless the stream is shorter.
_ENOUGH_ROWS = 200


# A tokenizer keeps its padding and truncation between calls: of two readings at once, each in a thread of its own, one
# would get the other's.
_TOKENIZING = Lock()


class UsableRow(NamedTuple):
    """A row that was read and decoded without a problem, and the epoch in which it was read."""

    row: StreamRow
    prepared: PreparedRow
    epoch: int


class EncodedStream:
    """A streamed data set, whose rows are encoded whenever they are read.

    Args:
        source: Its columns are those of the layout; samples undecoded.
        encoder: Encodes rows of one size.
        label: How messages call the data set.
        scalars: Columns of numbers.

    Attributes:
        left_out: How many rows this process has left out in training, by kind.

    Raises:
        ValueError: The stream was split among processes before, or shuffled without a seed.
    """

    def __init__(self, source: IterableDataset, encoder: RowEncoder, label: str, scalars: Sequence[str]) -> None:
        check_source(source, label)
        self.source, self.encoder, self.label, self.scalars = source.with_format(None), encoder, label, scalars
        self.pipeline, self.family = encoder.pipeline, encoder.family
        self.left_out: dict[str, int] = {}
        self._seen, self._bad, self._reported = 0, Counter[str](), set[str]()

    def evaluation_batches(self, batch_size: int, *, process: tuple[int, int]) -> Generator[dict[str, Any]]:
        """Collated batches in the order of the stream, each encoded while the one before is used.

        Rows are numbered from 0, and each process gets every n-th. All processes get equally many batches, of at least
        one row each: a process that has no usable row in a turn takes one of another process, which then comes twice.

        Args:
            batch_size: Rows of a batch at most.
            process: This process and how many there are.

        Raises:
            ValueError: Rows cannot be used and `on_bad_row` is "raise", too many cannot, or there are none.
        """
        return one_ahead(self._evaluation_batches(batch_size, *process))

    def _evaluation_batches(self, batch_size: int, index: int, count: int) -> Iterator[dict[str, Any]]:
        part = StreamPart(self.source, chunk_size=batch_size * count, progress=Progress())
        found = False
        for chunk in itertools.takewhile(lambda chunk: chunk.rows, part):
            others = [[row] for position, row in enumerate(chunk.rows) if position % count != index]
            for rows in filter(None, [chunk.rows[index::count], *others]):
                batch = self.encode(self.usable(*self.prepared(chunk._replace(rows=rows))))
                if batch is not None:
                    found = True
                    yield batch
                    break
        self.check_share(finished=True)
        if not found:
            raise ValueError(f"{self.label} has no rows that can be used.")

    # ---- Rows ----------------------------------------------------------------------------------------------------

    def prepared(self, chunk: Chunk, reader: int = 0, readers: int = 1) -> tuple[Chunk, list[PreparedRow]]:
        """Decodes rows; called in a loader's worker.

        Args:
            reader: Number of the reader among all readers of all processes.
            readers: How many there are: rows get numbers that no other row of the epoch has.
        """
        numbers = [row.number * readers + reader for row in chunk.rows]
        with ThreadPoolExecutor(max_workers=4) as pool:
            return chunk, self.encoder.prepare(pool, numbers, [row.cells for row in chunk.rows])

    def usable(self, chunk: Chunk, prepared: Sequence[PreparedRow], read_by: str = "") -> list[UsableRow]:
        """The rows of a chunk that can be used.

        Args:
            prepared: Its rows, decoded.
            read_by: Whose numbers the rows have, for messages.

        Raises:
            ValueError: Rows cannot be used and `on_bad_row` is "raise", too many cannot, or a package is missing.
        """
        cells = [row.cells for row in chunk.rows]
        problems = [replace(problem, row=n) for n, row in enumerate(prepared) for problem in row.problems]
        problems += prompt_problems([row["prompt"] for row in cells])
        problems += scalar_problems({name: [row[name] for row in cells] for name in self.scalars}, self.encoder.layout)
        self._seen += len(cells)
        if problems:
            self._leave_out([_named(problem, chunk.rows[problem.row]) for problem in problems], read_by)
        bad = {problem.row for problem in problems}
        rows = zip(chunk.rows, prepared, strict=True)
        return [UsableRow(row, own, chunk.epoch) for n, (row, own) in enumerate(rows) if n not in bad]

    def encode(self, rows: Sequence[UsableRow], read_by: str = "") -> dict[str, Any] | None:
        """A collated batch of those whose encoding is finite; None if there are none.

        Raises:
            ValueError: As `usable`.
        """
        if not rows:
            return None
        encoded, problems = self.encoder.encode([row.prepared for row in rows])
        if problems:
            by_number = {row.prepared.row: row.row for row in rows}
            self._leave_out([_named(problem, by_number[problem.row]) for problem in problems], read_by)
        bad = {problem.row for problem in problems}
        kept = [(row, own) for row, own in zip(rows, encoded, strict=True) if row.prepared.row not in bad]
        if not kept:
            return None
        for row, _ in kept:
            self._report({kind: f"is streamed: {text}" for kind, text in row.prepared.notes.items()})
        conditioning: list[dict[str, Tensor]] = [{} for _ in kept]
        if kept[0][0].prepared.seen is None:
            conditioning = self._conditioning([self._caption(row) for row, _ in kept])
        self._check_condition_sizes([own for _, own in kept])
        return grouped(
            [
                {"row": row.prepared.row, **own, **prompt}
                | {SCALAR + name: torch.as_tensor(row.row.cells[name], dtype=torch.float32) for name in self.scalars}
                for (row, own), prompt in zip(kept, conditioning, strict=True)
            ]
        )

    def _check_condition_sizes(self, rows: Sequence[Mapping[str, Tensor]]) -> None:
        """Raises where the condition images of a batch have several sizes.

        Raises:
            ValueError: They have.
        """
        sizes = {tuple((name, *row[name].shape) for name in row if name.startswith(CONDITION)) for row in rows}
        if len(sizes) > 1:
            raise ValueError(
                f"{self.label} is streamed, and a batch has rows with {len(sizes)} sizes or numbers of condition "
                f"images, which {type(self.pipeline).__name__} brings to sizes of their own. Set "
                "per_device_train_batch_size=1 (with gradient_accumulation_steps), bring the images to one size, or "
                "store the data: without streaming=True, batches have rows of one size each."
            )

    def _caption(self, row: UsableRow) -> str:
        """The caption, or the one of several that the row has in this epoch."""
        captions = captions_of(row.row.cells["prompt"])
        return captions[caption_number(len(captions), self.encoder.options.seed, row.prepared.row, row.epoch)]

    def _conditioning(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        with _TOKENIZING:
            report = truncation_report(prompts, self.pipeline, self.family)
        if report:
            self._report({"truncation": f"is streamed, and so far: {report}"})
        with _TOKENIZING, without_truncation_messages(self.pipeline):
            encoded = self.family.encode_prompts(self.pipeline, prompts)
        dtype = self.encoder.options.stored_dtype(self.family.text_dtype(self.pipeline))
        return [
            {PROMPT + name: as_stored(tensor[row], dtype) for name, tensor in encoded.items()}
            for row in range(len(prompts))
        ]

    def _report(self, notes: Mapping[str, str]) -> None:
        """Warns of each kind once."""
        for kind, text in notes.items():
            if kind not in self._reported:
                self._reported.add(kind)
                logger.warning("%s %s", self.label, text)

    # ---- Rows that cannot be used --------------------------------------------------------------------------------

    @property
    def bad_rows(self) -> dict[str, int]:
        """How many rows were left out so far, by kind; those of batches that are made ahead among them."""
        return dict(self._bad)

    def _leave_out(self, problems: Sequence[RowProblem], read_by: str) -> None:
        policy = self.encoder.options.bad_rows
        stops = any(policy.stops(problem) or problem.kind == "missing package" for problem in problems)
        if stops:
            label = f"{self.label}, which is streamed{read_by},"
            replace(policy, on_bad_row="raise").apply(problems, self._seen, label)
        self._bad.update({problem.row: problem.kind for problem in problems}.values())
        first = {problem.kind: problem for problem in sorted(problems, reverse=True)}
        self._report({kind: f"has rows that are left out; the first: {problem}" for kind, problem in first.items()})
        self.check_share()

    def check_share(self, *, finished: bool = False) -> None:
        """Raises if too many rows are left out.

        Args:
            finished: Whether the stream was read to its end; else few rows say nothing.

        Raises:
            ValueError: Their share is above `max_bad_share`.
        """
        allowed, bad = self.encoder.options.bad_rows.max_bad_share, sum(self._bad.values())
        if (finished or self._seen >= _ENOUGH_ROWS) and bad > allowed * self._seen:
            kinds = ", ".join(f"{number} {kind}" for kind, number in self._bad.most_common())
            raise ValueError(
                f"{self.label}, which is streamed: {bad} of the first {self._seen} rows cannot be used, "
                f"{bad / self._seen:.0%} ({kinds}). on_bad_row='skip' leaves out at most max_bad_share={allowed:g} of "
                "the rows. Look at them, and raise the option if they may be left out."
            )


def _named(problem: RowProblem, row: StreamRow) -> RowProblem:
    """A problem by the row's number where it was read, with its prompt, by which it is found in the data."""
    captions = captions_of(row.cells["prompt"])
    prompt = f" (prompt {shorten(captions[0], 60, placeholder='...')!r})" if captions and captions[0].strip() else ""
    return replace(problem, row=row.number, place=problem.place + prompt)

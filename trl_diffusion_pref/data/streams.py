"""Streamed data sets: read in parts by processes and loader workers, encoded one batch ahead of the step."""

import copy
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from ..diffusion.randomness import ORDER, generator_for
from .bad_rows import RowProblem
from .batch import PROMPT, SCALAR, grouped
from .encoding import PreparedRow, RowEncoder
from .layouts import captions_of, prompt_problems
from .options import as_stored
from .prompts import truncation_report, without_truncation_messages


logger = logging.getLogger(__name__)

# Rows after which the share of bad ones means something.
_ENOUGH_ROWS = 200


@dataclass(frozen=True)
class Place:
    """Where the reading of a stream goes on.

    Rows are shuffled within blocks, and a block is read again from its beginning.

    Args:
        epoch: How often the stream was read to its end.
        state: `datasets`' own, at the beginning of the block; None for that of the stream.
        before: Rows before the block.
        taken: Rows of the block that were handed out.
    """

    epoch: int = 0
    state: dict[str, Any] | None = None
    before: int = 0
    taken: int = 0


@dataclass(frozen=True)
class _Example:
    row: int
    cells: dict[str, Any]
    place: Place


class _Examples(torch.utils.data.IterableDataset):
    """This process's part of a stream, undecoded; each worker of a loader reads its part of it.

    Args:
        source: The part of this process.
        block: Rows that are shuffled with each other; 1 keeps the order.
        seed: Of the order.
        endless: Whether to begin again at the end.
        places: By worker, where to go on.
        process: This process and how many there are, for the rows' numbers.
    """

    def __init__(
        self,
        source: IterableDataset,
        *,
        block: int,
        seed: int,
        endless: bool,
        places: Mapping[int, Place],
        process: tuple[int, int] = (0, 1),
    ) -> None:
        self.source, self.block, self.seed, self.endless = source, block, seed, endless
        self.places, self.process = places, process

    def __iter__(self) -> Iterator[_Example]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        index, count = self.process
        place = self.places.get(worker, Place())
        while True:
            self.source.set_epoch(place.epoch)
            if place.state is not None:
                self.source.load_state_dict(place.state)
            rows, before, skipped, found = iter(self.source), place.before, place.taken, False
            while True:
                state = copy.deepcopy(self.source.state_dict())
                block = list(itertools.islice(rows, self.block))
                if not block:
                    break
                found = True
                generator = generator_for(self.seed, ORDER, place.epoch, index, worker, before)
                order = torch.randperm(len(block), generator=generator).tolist()
                for taken, number in enumerate(order[skipped:], start=skipped + 1):
                    row = ((before + number) * count + index) * workers + worker
                    yield _Example(row, block[number], Place(place.epoch, state, before, taken))
                before, skipped = before + len(block), 0
            if not self.endless or not (found or place.before):
                return
            place = Place(place.epoch + 1)


@dataclass(frozen=True)
class _Rows:
    """Rows of one batch, decoded, and where the worker that read them goes on."""

    prepared: list[PreparedRow]
    cells: list[dict[str, Any]]
    worker: int
    place: Place


class EncodedStream:
    """A streamed data set, whose rows are encoded whenever they are read.

    Args:
        source: Its columns are those of the layout; samples undecoded.
        encoder: Encodes rows of one size.
        label: How messages call the data set.
        scalars: Columns of numbers.

    Attributes:
        places: By worker, where the batches that were taken end.
        next_worker: Whose batch comes next.
        workers: How many read.
    """

    description = "place in the stream"
    per_process = True

    def __init__(self, source: IterableDataset, encoder: RowEncoder, label: str, scalars: Sequence[str]) -> None:
        self.source, self.encoder, self.label, self.scalars = source, encoder, label, scalars
        self.pipeline, self.family = encoder.pipeline, encoder.family
        self.places: dict[int, Place] = {}
        self.next_worker = self.workers = 0
        self._seen, self._left_out, self._reported = 0, Counter[str](), set[str]()

    # ---- Loaders -------------------------------------------------------------------------------------------------

    def training_batches(
        self, batch_size: int, *, process: tuple[int, int], workers: int, block: int, seed: int
    ) -> Iterator[dict[str, Any]]:
        """Collated batches without end, each encoded while the step before is taken.

        Every process and worker reads rows of its own; each row comes once before any comes again to the worker that
        reads it.

        Args:
            process: This process and how many there are.
            workers: Loader workers that read and decode; 0 does it in this process.
            block: Rows that each worker shuffles with each other.
            seed: Of the order.
        """
        part = split_dataset_by_node(self.source, *process)
        if workers > part.num_shards:
            logger.warning(
                f"{self.label}: {part.num_shards} of {workers} loader workers read, since it has no more shards for "
                "each process."
            )
        self.workers = min(workers, part.num_shards)
        if self.places.keys() - set(range(max(self.workers, 1))):
            raise ValueError(
                f"{self.label} was read by {len(self.places)} workers before, and by {self.workers} now, so that it "
                "cannot go on where it was. Resume with the same dataloader_num_workers."
            )
        options: dict[str, Any] = {"block": max(block, 1), "seed": seed, "endless": True}
        examples = _Examples(part, places=dict(self.places), process=process, **options)
        read = self._in_turn(self._loader(examples, batch_size, self.workers))
        with ThreadPoolExecutor(max_workers=1) as ahead:

            def encode() -> tuple[_Rows, dict[str, Any]] | None:
                for rows in read:
                    if (batch := self._encode(rows)) is not None:
                        return rows, batch
                return None

            upcoming = ahead.submit(encode)
            while (result := upcoming.result()) is not None:
                upcoming = ahead.submit(encode)
                rows, batch = result
                self.places[rows.worker] = rows.place
                self.next_worker = (rows.worker + 1) % max(self.workers, 1)
                yield batch
        raise ValueError(f"{self.label} has no rows.")

    def evaluation_batches(self, batch_size: int, *, process: tuple[int, int]) -> Iterator[dict[str, Any]]:
        """Collated batches in the order of the stream, numbered from 0, of which each process gets every n-th.

        All processes get equally many batches of one size: some rows come twice at the end. So a row that cannot be
        used is an error here, whatever `on_bad_row` says.
        """
        index, count = process
        examples = _Examples(self.source, block=1, seed=0, endless=False, places={})
        numbered = (example for example in examples)
        while group := list(itertools.islice(numbered, batch_size * count)):
            whole = list(itertools.islice(itertools.cycle(group), batch_size * count))
            batch = self._encode(self._prepared(whole[index::count]), strict=True)
            assert batch is not None
            yield batch

    def _loader(self, examples: _Examples, batch_size: int, workers: int) -> DataLoader:
        own = torch.Generator().manual_seed(0)  # else the loader draws from the global one
        return DataLoader(examples, batch_size, num_workers=workers, collate_fn=self._prepared, generator=own)

    def _in_turn(self, loader: DataLoader) -> Iterator[_Rows]:
        """Batches of the workers in the order in which they were read before an interruption.

        A new loader begins with its first worker, whichever was next.
        """
        rows, first = iter(loader), self.next_worker
        while turn := list(itertools.islice(rows, max(self.workers, 1))):
            yield from turn[first:]
            yield from turn[:first]

    # ---- Rows ----------------------------------------------------------------------------------------------------

    def _prepared(self, examples: Sequence[_Example]) -> _Rows:
        """Decodes rows; called in a loader's worker."""
        info = get_worker_info()
        numbers, cells = [example.row for example in examples], [example.cells for example in examples]
        with ThreadPoolExecutor(max_workers=4) as pool:
            prepared = self.encoder.prepare(pool, numbers, cells)
        return _Rows(prepared, cells, info.id if info else 0, examples[-1].place)

    def _encode(self, rows: _Rows, *, strict: bool = False) -> dict[str, Any] | None:
        """A collated batch, or None if no row can be used."""
        prompts = prompt_problems([cells["prompt"] for cells in rows.cells])
        wrong = {problem.row: problem for problem in prompts}
        problems = [problem for row in rows.prepared for problem in row.problems]
        good = []
        for index, row in enumerate(rows.prepared):
            if index in wrong:
                problems.append(RowProblem(row.row, wrong[index].place, wrong[index].reason, wrong[index].kind))
            elif not row.problems:
                good.append((row, rows.cells[index]))
        tensors, unusable = self.encoder.encode([row for row, _ in good]) if good else ([], [])
        self._apply_policy([*problems, *unusable], len(rows.prepared), strict=strict)
        names = {problem.row for problem in unusable}
        kept = [(row, cells, own) for (row, cells), own in zip(good, tensors, strict=True) if row.row not in names]
        if not kept:
            return None
        for row, _, _ in kept:
            self._report({kind: f"is streamed: {text}" for kind, text in row.notes.items()})
        captions = [self._caption(cells["prompt"], row.row, rows.place.epoch) for row, cells, _ in kept]
        conditioning = self._conditioning(captions)
        return grouped(
            [
                {"row": row.row, **own, **conditioning[index]}
                | {SCALAR + name: torch.as_tensor(cells[name], dtype=torch.float32) for name in self.scalars}
                for index, (row, cells, own) in enumerate(kept)
            ]
        )

    def _caption(self, cell: Any, row: int, epoch: int) -> str:
        captions = captions_of(cell)
        if len(captions) == 1:
            return captions[0]
        generator = generator_for(self.encoder.options.seed, ORDER, row, epoch)
        return captions[int(torch.randint(len(captions), (1,), generator=generator))]

    def _conditioning(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        report = truncation_report(prompts, self.pipeline, self.family)
        if report:
            self._report({"truncation": f"is streamed, and so far: {report}"})
        with without_truncation_messages(self.pipeline):
            encoded = self.family.encode_prompts(self.pipeline, prompts)
        dtype = self.encoder.options.stored_dtype(self.family.text_dtype(self.pipeline))
        return [
            {PROMPT + name: as_stored(tensor[row], dtype) for name, tensor in encoded.items()}
            for row in range(len(prompts))
        ]

    def _report(self, notes: Mapping[str, str]) -> None:
        """Each kind once."""
        for kind, text in notes.items():
            if kind not in self._reported:
                self._reported.add(kind)
                logger.warning("%s %s", self.label, text)

    def _apply_policy(self, problems: Sequence[RowProblem], count: int, *, strict: bool) -> None:
        policy = self.encoder.options.bad_rows
        self._seen += count
        self._left_out.update({problem.row: problem.kind for problem in problems}.values())
        if strict or policy.on_bad_row == "raise" or any(problem.kind == "missing package" for problem in problems):
            replace(policy, on_bad_row="raise").apply(problems, count, f"{self.label}, which is streamed,")
        if problems:
            self._report({problem.kind: f"has rows that are left out; the first: {problem}" for problem in problems})
        share = sum(self._left_out.values()) / self._seen
        if self._seen >= _ENOUGH_ROWS and share > policy.max_bad_share:
            raise ValueError(
                f"{self.label}: {share:.0%} of the first {self._seen} rows cannot be used "
                f"({', '.join(f'{number} {kind}' for kind, number in self._left_out.items())}), more than "
                f"max_bad_share={policy.max_bad_share:g}."
            )

    # ---- Checkpoints ---------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Begins at the beginning."""
        self.places.clear()
        self.next_worker = 0

    def state_dict(self) -> dict[str, Tensor]:
        places = {worker: asdict(place) for worker, place in self.places.items()}
        text = json.dumps({"places": places, "next_worker": self.next_worker})
        return {"json": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        stored = json.loads(bytes(state["json"].tolist()))
        self.places = {int(worker): Place(**place) for worker, place in stored["places"].items()}
        self.next_worker = stored["next_worker"]

    def depends_on(self) -> dict[str, Any]:
        return {}


class StreamLoader:
    """What transformers' loop takes for a data loader: calls a function for each pass.

    Args:
        dataset: The stream, for the loop's questions about it.
        batches: Called for each pass.
        batch_size: Of one process.
    """

    def __init__(
        self, dataset: EncodedStream, batches: Callable[[], Iterator[dict[str, Any]]], batch_size: int
    ) -> None:
        self.dataset, self.batches, self.batch_size = dataset, batches, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.batches()

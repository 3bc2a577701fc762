"""Reads the rows of a stream in parts, by processes and loader workers, in shuffled blocks and from any place on."""

import itertools
import logging
import multiprocessing
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info

from ..diffusion.randomness import ORDER, generator_for


logger = logging.getLogger(__name__)

Item = TypeVar("Item")
# Above it, a seed was drawn by the operating system.
_LARGEST_SEED = 2**64


@dataclass(frozen=True)
class Place:
    """Where a reader goes on in an epoch.

    Rows are shuffled within blocks, and a block that was handed out in part is read again from its beginning.

    Args:
        state: `datasets`' own, at the beginning of the block; None to read the epoch's rows before the block again.
        before: Rows before the block.
        taken: Rows of the block that were handed out.
    """

    state: dict[str, Any] | None = None
    before: int = 0
    taken: int = 0

    @property
    def handed_out(self) -> int:
        """Rows of the epoch that were handed out."""
        return self.before + self.taken


@dataclass(frozen=True)
class Progress:
    """How far a process has read a stream.

    Args:
        epoch: How often it was read to its end.
        places: By reader, where it goes on; readers that are missing begin.
        turn: The reader whose rows come next.
    """

    epoch: int = 0
    places: Mapping[int, Place] = field(default_factory=dict)
    turn: int = 0

    def as_json(self) -> dict[str, Any]:
        """Strings, numbers, lists and dictionaries."""
        return {**asdict(self), "places": {str(reader): asdict(place) for reader, place in self.places.items()}}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Progress":
        """What `as_json` gave."""
        places = {int(reader): Place(**place) for reader, place in stored["places"].items()}
        return cls(stored["epoch"], places, stored["turn"])


class StreamRow(NamedTuple):
    """A row as it is read.

    Args:
        number: Its position among the rows that its reader reads in this epoch.
        cells: Undecoded.
        place: Where the reader goes on after it.
    """

    number: int
    cells: dict[str, Any]
    place: Place


class Chunk(NamedTuple):
    """Rows that one reader read one after the other; none where it has read its part of the epoch."""

    epoch: int
    reader: int
    rows: list[StreamRow]


class StreamPart(torch.utils.data.IterableDataset):
    """The rows of one process in chunks; each worker of a loader reads a part of them. Every pass is an epoch.

    Args:
        source: The whole stream.
        process: This process and how many there are.
        block: Rows that a reader shuffles with each other; 1 keeps the order.
        seed: Of the order.
        chunk_size: Rows of a chunk.
        progress: Where the first pass goes on.
    """

    def __init__(
        self,
        source: IterableDataset,
        process: tuple[int, int] = (0, 1),
        *,
        block: int = 1,
        seed: int = 0,
        chunk_size: int,
        progress: Progress,
    ) -> None:
        self.source, self.process, self.block, self.seed = source, process, block, seed
        self.chunk_size, self.epoch, self.places = chunk_size, progress.epoch, progress.places
        # A buffer of `datasets` forgets its rows when it is resumed.
        self.can_go_on = not own_shuffling(source)

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        reader = info.id if info else 0
        epoch, place = self.epoch, self.places.get(reader, Place())
        # A worker stays for the next pass, and counts the epochs itself.
        self.epoch, self.places = epoch + 1, {}
        chunk: list[StreamRow] = []
        for row in self._rows(reader, epoch, place):
            chunk.append(row)
            # The same borders in a resumed epoch.
            if row.place.handed_out % self.chunk_size == 0:
                yield Chunk(epoch, reader, chunk)
                chunk = []
        if chunk:
            yield Chunk(epoch, reader, chunk)
        yield Chunk(epoch, reader, [])

    def _rows(self, reader: int, epoch: int, place: Place) -> Iterator[StreamRow]:
        # A stream of this pass alone: all workers share the epoch of one stream, and add to it at the same time, and
        # all readings of one stream share the places in its files. `shard` copies what has them.
        part = split_dataset_by_node(self.source.shard(1, 0), *self.process)
        part.set_epoch(epoch)
        if place.state is not None:
            part.load_state_dict(place.state)
        rows = iter(part)
        if place.state is None:
            next(itertools.islice(rows, place.before, place.before), None)
        state, before, skipped = place.state, place.before, place.taken
        while block := list(itertools.islice(rows, self.block)):
            order = list(range(len(block)))
            if self.block > 1:
                generator = generator_for(self.seed, ORDER, epoch, self.process[0], reader, before)
                order = torch.randperm(len(block), generator=generator).tolist()
            for taken, number in enumerate(order[skipped:], start=skipped + 1):
                yield StreamRow(before + number, block[number], Place(state, before, taken))
            before, skipped = before + len(block), 0
            state = part.state_dict() if self.can_go_on else None


class Readers(Generic[Item]):
    """The readers of a process: loader workers, or the process itself.

    Making one starts the workers, which should happen in the main thread. `close` ends them.

    Args:
        part: What they read.
        workers: How many; 0 for the process itself.
        prefetch: Chunks that each worker reads ahead; None for torch's default.
        prepare: Called with each chunk, in the worker.
        turn: The reader whose rows come first.
    """

    def __init__(
        self,
        part: StreamPart,
        workers: int,
        prefetch: int | None,
        prepare: Callable[[Chunk], tuple[Chunk, Item]],
        turn: int,
    ) -> None:
        self.count, self.turn = max(workers, 1), turn
        # Copies of this process have the pipeline that `prepare` needs without copying it.
        fork = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
        self.loader: DataLoader = DataLoader(
            part,
            batch_size=None,
            collate_fn=prepare,  # type: ignore[arg-type]  # without a batch size it takes items
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            # An epoch may be short.
            persistent_workers=workers > 0,
            multiprocessing_context="fork" if fork else None,
            # Else the loader draws from the global one.
            generator=torch.Generator().manual_seed(0),
        )
        self.iterator = iter(self.loader)

    def close(self) -> None:
        """Ends the workers now: kept alive by a traceback, they would end with it, in the midst of something else."""
        if shutdown := getattr(self.iterator, "_shutdown_workers", None):
            shutdown()

    def epochs(self) -> Iterator[Iterator[tuple[Chunk, Item, int]]]:
        """For each epoch its chunks in turn, what `prepare` made of each, and the reader whose turn is after it.

        A loader begins with its first worker, whichever's turn it is.
        """
        while True:
            yield self._epoch()
            self.turn = 0
            self.iterator = iter(self.loader)

    def _epoch(self) -> Iterator[tuple[Chunk, Item, int]]:
        waiting: dict[int, deque[tuple[Chunk, Item]]] = defaultdict(deque)
        active = deque(range(self.count))
        active.rotate(-self.turn)
        while active:
            reader = active.popleft()
            while not waiting[reader]:
                chunk, item = next(self.iterator)
                waiting[chunk.reader].append((chunk, item))
            chunk, item = waiting[reader].popleft()
            if chunk.rows:
                active.append(reader)
                yield chunk, item, active[0]
        # The loader still has to learn that its workers are done.
        for _ in self.iterator:
            pass


def own_shuffling(source: IterableDataset) -> bool:
    """Whether a stream has a shuffle buffer of its own: `IterableDataset.shuffle`, which has no public trace."""
    return any(type(node).__name__ == "BufferShuffledExamplesIterable" for node in _nodes(source))


def check_source(source: IterableDataset, label: str) -> None:
    """Raises for a stream that processes cannot share, or whose order no other process finds.

    Raises:
        ValueError: It was split among processes already, or shuffled without a seed.
    """
    if getattr(source, "_distributed", None):
        raise ValueError(
            f"{label} was split by split_dataset_by_node, and would be split again. Pass the whole stream; each "
            "process reads its part."
        )
    for node in _nodes(source):
        seeds = getattr(getattr(getattr(node, "generator", None), "bit_generator", None), "seed_seq", None)
        entropy = getattr(seeds, "entropy", None)
        if isinstance(entropy, int) and entropy >= _LARGEST_SEED:
            raise ValueError(
                f"{label} was shuffled or interleaved without a seed, so that neither a resumed run nor another "
                "process finds the same order. Give shuffle() or interleave_datasets() a seed, or leave it to "
                "shuffle_buffer."
            )


def _nodes(source: IterableDataset) -> Iterator[object]:
    """What a stream is made of, such as files, a function of `map`, a shuffle buffer."""
    nodes = [getattr(source, "_ex_iterable", None)]
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        yield node
        nodes += [getattr(node, "ex_iterable", None), *(getattr(node, "ex_iterables", None) or ())]


def one_ahead(items: Iterator[Item]) -> Generator[Item]:
    """The same items, the next of which is made in a thread while the caller uses the present one."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        upcoming = thread.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]  # not the end


def num_readers(source: IterableDataset, processes: int, workers: int, label: str) -> int:
    """How many loader workers a process can use: each reads shards of its own."""
    shards = split_dataset_by_node(source, 0, processes).num_shards
    if workers > shards:
        logger.warning(
            f"{label}: {shards} of {workers} loader workers in each process read, since the stream has "
            f"{source.num_shards} shards for {processes} processes. More files, or datasets' reshard(), give more."
        )
    return min(workers, shards)

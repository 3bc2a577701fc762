"""What the loop takes for data loaders of streams; the one for training knows its place, for checkpoints."""

import json
import logging
import weakref
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from .encoding import PreparedRow
from .stream_reading import Chunk, Progress, Readers, StreamPart, num_readers, one_ahead, own_shuffling
from .streams import EncodedStream, UsableRow


logger = logging.getLogger(__name__)


class StreamLoader:
    """Batches of a stream for training, without end: what transformers' loop takes for a data loader.

    Every process and each of its loader workers reads rows of its own. A process reads each row of its part once
    before it reads any again; rows that cannot be used are replaced by the next ones, so that batches are full. Its
    place in the stream is part of the run's checkpoints.

    Args:
        stream: What is read.
        batch_size: Rows of a batch of one process.
        process: This process and how many there are.
        workers: Loader workers that read and decode; 0 does it in this process.
        block: Rows that each reader shuffles with each other; 0 and 1 keep the order.
        seed: Of the order.
        prefetch: Batches that each worker reads ahead; None for torch's default.

    Attributes:
        dataset: The stream, for the loop's questions about it.
        progress: Where the batches that were handed out end.
    """

    description = "place in the stream"
    per_process = True

    def __init__(
        self,
        stream: EncodedStream,
        batch_size: int,
        *,
        process: tuple[int, int],
        workers: int,
        block: int,
        seed: int,
        prefetch: int | None = None,
    ) -> None:
        self.dataset, self.batch_size, self.process = stream, batch_size, process
        self.block, self.seed, self.prefetch = max(block, 1), seed, prefetch
        self.workers = num_readers(stream.source, process[1], workers, stream.label)
        self.progress = Progress()
        self._readers: Readers | None = None
        self._batches: weakref.ref[Generator[dict[str, Any]]] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches from where the last ones ended, each encoded while the one before is used.

        Raises:
            ValueError: As `EncodedStream.usable`; or this process has no rows that can be used.
        """
        self.close()
        if own_shuffling(self.dataset.source) and self.progress != Progress():
            logger.warning(
                f"{self.dataset.label} has a shuffle buffer of its own, whose rows no checkpoint has: the epoch is "
                "read from its beginning to find the place. With shuffle_buffer instead, it would go on at once."
            )
        part = StreamPart(
            self.dataset.source,
            self.process,
            block=self.block,
            seed=self.seed,
            chunk_size=self.batch_size,
            progress=self.progress,
        )
        self._readers = Readers(part, self.workers, self.prefetch, self._prepared, self.progress.turn)
        batches = self._handed_out(self._readers)
        # The reading should end where nobody holds it.
        self._batches = weakref.ref(batches)
        return batches

    def close(self) -> None:
        """Ends the reading and its workers, which would live as long as the traceback of an error that holds them."""
        batches = self._batches() if self._batches is not None else None
        if batches is not None:
            batches.close()
        if self._readers is not None:
            self._readers.close()
        self._batches = self._readers = None

    def _handed_out(self, readers: Readers) -> Generator[dict[str, Any]]:
        try:
            with closing(one_ahead(self._encoded(readers))) as batches:
                for batch, self.progress, left_out in batches:
                    self.dataset.left_out.update(left_out)
                    yield batch
        finally:
            readers.close()

    def _encoded(self, readers: Readers) -> Generator[tuple[dict[str, Any], Progress, dict[str, int]]]:
        """Batches, where to go on after them, and how many rows were left out until then."""
        stream, waiting, progress = self.dataset, list[tuple[UsableRow, Progress]](), self.progress
        for number, epoch in enumerate(readers.epochs()):
            # A resumed epoch may be at its end, and what remains of it says little about bad rows.
            resumed = number == 0 and bool(progress.places)
            found = False
            for chunk, prepared, turn in epoch:
                usable = stream.usable(chunk, prepared, self._read_by(chunk))
                found = found or bool(usable)
                places = progress.places if progress.epoch == chunk.epoch else {}
                last = chunk.rows[-1]
                for row in usable:
                    reader = turn if row.row is last else chunk.reader
                    progress = Progress(chunk.epoch, {**places, chunk.reader: row.row.place}, reader)
                    waiting.append((row, progress))
                # Rows that cannot be used are behind too.
                progress = Progress(chunk.epoch, {**places, chunk.reader: last.place}, turn)
                while len(waiting) >= self.batch_size:
                    rows, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
                    batch = stream.encode([row for row, _ in rows], self._read_by(chunk))
                    if batch is not None:
                        yield batch, rows[-1][1], stream.bad_rows
            if resumed:
                continue
            if not found:
                part = f" for process {self.process[0]} of {self.process[1]}" if self.process[1] > 1 else ""
                raise ValueError(f"{stream.label}, which is streamed, has no rows that can be used{part}.")
            stream.check_share(finished=True)

    def _prepared(self, chunk: Chunk) -> tuple[Chunk, list[PreparedRow]]:
        (index, count), readers = self.process, max(self.workers, 1)
        return self.dataset.prepared(chunk, index * readers + chunk.reader, count * readers)

    def _read_by(self, chunk: Chunk) -> str:
        if self.process[1] == 1 and self.workers <= 1 and chunk.epoch == 0:
            return ""
        return (
            f" (rows as loader worker {chunk.reader} of process {self.process[0]} counts them in epoch {chunk.epoch})"
        )

    # ---- Checkpoints ---------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Begins at the beginning."""
        self.close()
        self.progress = Progress()

    def state_dict(self) -> dict[str, Tensor]:
        text = json.dumps(self.progress.as_json())
        return {"json": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.progress = Progress.from_json(json.loads(bytes(state["json"].tolist())))

    def depends_on(self) -> dict[str, Any]:
        return {
            "the number of processes": self.process[1],
            "the number of readers in each process (dataloader_num_workers)": max(self.workers, 1),
            "shuffle_buffer": self.block,
            "data_seed": self.seed,
            "the stream's number of shards": self.dataset.source.num_shards,
        }


class StreamEvaluationLoader:
    """`EncodedStream.evaluation_batches` as transformers' loop takes a data loader.

    Args:
        dataset: The stream.
        batch_size: Rows of a batch of one process.
        process: This process and how many there are.
    """

    def __init__(self, dataset: EncodedStream, batch_size: int, process: tuple[int, int]) -> None:
        self.dataset, self.batch_size, self.process = dataset, batch_size, process

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.dataset.evaluation_batches(self.batch_size, process=self.process)

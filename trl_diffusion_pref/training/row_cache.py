"""Numbers per row of a data set, computed once and kept beside a record of what they were computed from."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets.fingerprint import Hasher
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import Batch, EncodedDataset, EncodedStream
from .config import DiffusionPreferenceConfig
from .metrics import padded
from .process_state import restored_generators


# Seconds between two saves of an unfinished table.
_SAVE_EVERY = 60.0


class RowCache:
    """Computes numbers for the rows of encoded data sets with all processes, and keeps them.

    Args:
        model: What is called; in evaluation mode, without gradients and in the run's precision.
        batches: Called as `batches(dataset, batch_size)`; this process's batches, from a prepared loader.
        args: Their cache folder holds the files, and their batch size for evaluation is the default here.
        depends_on: What all numbers depend on beside the data, the model and the precision.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        batches: Callable[[EncodedDataset | EncodedStream, int], Iterable[Batch]],
        args: DiffusionPreferenceConfig,
        depends_on: dict[str, Any],
    ) -> None:
        self.accelerator, self.model, self.batches, self.depends_on = accelerator, model, batches, depends_on
        self.folder, self.batch_size = args.cache_folder(), args.per_device_eval_batch_size

    def load_or_compute(
        self,
        dataset: EncodedDataset | EncodedStream,
        compute: Callable[[Batch], Tensor],
        record: dict[str, Any],
        file: Path | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """One tensor per row.

        Args:
            dataset: The rows of a stream are numbered in its order.
            compute: From a batch on the device to a tensor `(B, ...)`.
            record: What the numbers depend on: strings and numbers. "what" names them.
            file: Default: derived from the record, so that another record is another file.
            batch_size: Rows at once; default the cache's.

        Returns:
            `(rows, ...)` float32 on the CPU, by the rows' positions, in every process; NaN for rows that are left out.

        Raises:
            ValueError: The named file was made from something else; the message says what differs.
        """
        if isinstance(dataset, EncodedStream):
            return self._of_stream(dataset, compute, record["what"])
        record = self.depends_on | record
        record |= {
            "data": dataset.fingerprint,
            "rows": len(dataset),
            "precision": self.accelerator.mixed_precision,
        }
        file = file or self.folder / f"rows-{Hasher.hash(record)}.safetensors"
        # All must decide alike, also where nodes have caches of their own.
        if all(gather_object([file.is_file()])):
            return _load(file, record)
        table = self._compute(dataset, compute, record, file, batch_size or self.batch_size)
        self.accelerator.wait_for_everyone()
        return table

    def _of_stream(self, stream: EncodedStream, compute: Callable[[Batch], Tensor], what: str) -> Tensor:
        """The same for a stream, computed every time, since nothing tells whether its content is what it was."""
        of_rows: dict[int, Tensor] = {}
        bar = {"desc": what, "disable": not self.accelerator.is_main_process}
        for rows, values in self._values(tqdm(self.batches(stream, self.batch_size), **bar), compute, self.batch_size):
            of_rows.update(zip(rows.tolist(), values, strict=True))
        table = torch.full((max(of_rows) + 1, *next(iter(of_rows.values())).shape), torch.nan)
        table[list(of_rows)] = torch.stack([*of_rows.values()])
        return table

    def _values(
        self, batches: Iterable[Batch], compute: Callable[[Batch], Tensor], batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows `(N,)` and their values `(N, ...)` float32 of all processes, on the CPU."""
        was_training = self.model.training
        self.model.eval()
        try:
            with restored_generators(self.accelerator.device), torch.no_grad():
                for batch in batches:
                    # Not around the loader: a CPU's autocast takes one half precision, and rows may be kept in the
                    # other.
                    with self.accelerator.autocast():
                        values = compute(batch).float()
                    # Where processes cannot share rows evenly, some come twice.
                    values, rows = self.accelerator.gather(padded((values, batch.rows), batch_size))
                    yield rows.cpu(), values.cpu()
        finally:
            self.model.train(was_training)

    def _compute(
        self,
        dataset: EncodedDataset,
        compute: Callable[[Batch], Tensor],
        record: dict[str, Any],
        file: Path,
        batch_size: int,
    ) -> Tensor:
        """Computes the rows that an interrupted run has not computed, and writes the file."""
        unfinished, table, saves = file.with_suffix(".unfinished"), None, self.accelerator.is_local_main_process
        missing = np.arange(len(dataset))
        if all(gather_object([_fits(unfinished, record)])):
            table = _load(unfinished, record)
            missing = np.flatnonzero(table[torch.from_numpy(dataset.rows)].flatten(1).isnan().all(dim=1).numpy())
        total = math.ceil(len(missing) / batch_size / self.accelerator.num_processes)
        bar = {"desc": record["what"], "total": total, "disable": not self.accelerator.is_main_process}
        saved, batches = time.monotonic(), self.batches(dataset.subset(missing), batch_size) if len(missing) else ()
        for rows, values in self._values(tqdm(batches, **bar), compute, batch_size):
            if table is None:
                table = torch.full((int(dataset.rows.max()) + 1, *values.shape[1:]), torch.nan)
            table[rows] = values
            if saves and time.monotonic() - saved > _SAVE_EVERY:
                _save(table, unfinished, record)
                saved = time.monotonic()
        assert table is not None
        if saves:
            _save(table, file, record)
            unfinished.unlink(missing_ok=True)
        return table


def _save(table: Tensor, file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(f".{uuid4().hex}")
    save_file({"table": table}, written, metadata={"record": json.dumps(record)})
    written.replace(file)


def _fits(file: Path, record: dict[str, Any]) -> bool:
    try:
        return file.is_file() and _load(file, record) is not None
    except ValueError:
        return False


def _load(file: Path, record: dict[str, Any]) -> Tensor:
    with safe_open(file, "pt") as opened:
        stored = json.loads((opened.metadata() or {}).get("record", "{}"))
        expected = json.loads(json.dumps(record))
        different = [
            f"{key}: made with {stored.get(key)!r}, this run has {expected.get(key)!r}"
            for key in sorted(stored.keys() | expected.keys())
            if stored.get(key) != expected.get(key)
        ]
        if different:
            listed = "\n  ".join(different)
            raise ValueError(
                f"{file} was made from something else:\n  {listed}\nUse another folder, or remove the file to "
                "compute it again."
            )
        return opened.get_tensor("table")

"""Numbers per row of a data set, computed once and kept beside a record of what they were computed from."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from datasets.fingerprint import Hasher
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import Batch, dataset_fingerprint
from .config import DiffusionPreferenceConfig
from .process_state import restored_generators


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
        batches: Callable[[Dataset, int], Iterable[Batch]],
        args: DiffusionPreferenceConfig,
        depends_on: dict[str, Any],
    ) -> None:
        self.accelerator, self.model, self.batches, self.depends_on = accelerator, model, batches, depends_on
        self.folder, self.batch_size = args.cache_folder(), args.per_device_eval_batch_size

    def load_or_compute(
        self,
        dataset: Dataset,
        compute: Callable[[Batch], Tensor],
        record: dict[str, Any],
        file: Path | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """One tensor per row.

        Args:
            compute: From a batch on the device to a tensor `(B, ...)`.
            record: What the numbers depend on: strings and numbers. "what" names them.
            file: Default: derived from the record, so that another record is another file.
            batch_size: Rows at once; default the cache's.

        Returns:
            `(len(dataset), ...)` float32 on the CPU, in order, in every process.

        Raises:
            ValueError: The named file was made from something else; the message says what differs.
        """
        record = self.depends_on | record
        record |= {
            "data": dataset_fingerprint(dataset),
            "rows": len(dataset),
            "precision": self.accelerator.mixed_precision,
        }
        file = file or self.folder / f"rows-{Hasher.hash(record)}.safetensors"
        # All must decide alike, also where nodes have caches of their own.
        if all(gather_object([file.is_file()])):
            return _load(file, record)
        table = self._compute(dataset, compute, record["what"], batch_size or self.batch_size).cpu().contiguous()
        if self.accelerator.is_local_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".unfinished")
            save_file({"table": table}, unfinished, metadata={"record": json.dumps(record)})
            unfinished.replace(file)
        self.accelerator.wait_for_everyone()
        return table

    def _compute(self, dataset: Dataset, compute: Callable[[Batch], Tensor], what: str, batch_size: int) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        parts, rows = [], []
        total = math.ceil(len(dataset) / batch_size / self.accelerator.num_processes)
        bar = {"desc": what, "total": total, "disable": not self.accelerator.is_main_process}
        with restored_generators(self.accelerator.device), torch.no_grad(), self.accelerator.autocast():
            for batch in tqdm(self.batches(dataset, batch_size), **bar):
                values, numbers = self.accelerator.gather_for_metrics((compute(batch).float(), batch.rows))
                parts.append(values.cpu())
                rows.append(numbers.cpu())
        self.model.train(was_training)
        table, order = torch.cat(parts), torch.cat(rows).argsort()
        if len(table) != len(dataset):
            raise RuntimeError(f"{len(table)} of {len(dataset)} rows were computed; please report this.")
        return table[order]


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

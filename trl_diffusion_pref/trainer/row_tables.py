"""Numbers per row of a data set, computed once and kept beside a record of what they were computed from."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets.fingerprint import Hasher
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def load_or_compute(
    folder: Path,
    record: dict[str, Any],
    compute: Callable[[], Tensor],
    accelerator: Accelerator,
    name: str | None = None,
) -> Tensor:
    """Loads a table from a folder, or computes it with all processes and writes it there.

    Args:
        folder: Of the file; made if it is not there.
        record: What the numbers depend on: strings and numbers.
        compute: Called by all processes; gives all of them the whole table `(rows, ...)`.
        name: The file's stem. Default: derived from the record, so that another record is another file.

    Raises:
        ValueError: The named file was made from something else; the message says what differs.
    """
    file = folder / f"{name or 'rows-' + Hasher.hash(record)}.safetensors"
    # All must decide alike, also where nodes have caches of their own.
    if all(gather_object([file.is_file()])):
        return _load(file, record)
    table = compute().cpu().contiguous()
    if accelerator.is_local_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        save_file({"table": table}, unfinished, metadata={"record": json.dumps(record)})
        unfinished.replace(file)
    accelerator.wait_for_everyone()
    return table


def compute_for_rows(
    batches: Iterable[dict[str, Tensor]],
    compute: Callable[[dict[str, Tensor]], Tensor],
    model: nn.Module,
    accelerator: Accelerator,
    count: int,
) -> Tensor:
    """Computes a table with all processes, in evaluation mode, without gradients and in the run's precision.

    Args:
        batches: This process's, from a loader that `accelerator` prepared, with `row`.
        compute: From a batch to a tensor `(B, ...)`.
        model: What `compute` calls.
        count: Of the data set's rows.

    Returns:
        `(count, ...)` float32 on the CPU, in order of rows, in every process.
    """
    was_training = model.training
    model.eval()
    parts, rows = [], []
    with torch.no_grad(), accelerator.autocast():
        for inputs in batches:
            values, numbers = accelerator.gather_for_metrics((compute(inputs).float(), inputs["row"]))
            parts.append(values.cpu())
            rows.append(numbers.cpu())
    model.train(was_training)
    table, order = torch.cat(parts), torch.cat(rows).argsort()
    if len(table) != count:
        raise RuntimeError(f"{len(table)} of {count} rows were computed; please report this.")
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
            raise ValueError(
                f"{file} was made from something else:\n  "
                + "\n  ".join(different)
                + "\nUse another folder, or remove "
                "the file to compute it anew."
            )
        return opened.get_tensor("table")

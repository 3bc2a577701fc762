"""Values of samples on their way to the log."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor


# Values that a step returns for what watches the run, and that are not logged.
STOP = "asked to stop"
UNLOGGED = ("time", STOP)


def pair_metrics(
    loss: Tensor, rewards: tuple[Tensor, Tensor], errors: tuple[Tensor, Tensor], model_time: Tensor
) -> dict[str, Tensor]:
    """What every trainer on pairs logs, from losses, and rewards and errors of (chosen, rejected), each `(B,)`.

    Args:
        model_time: `(2B,)`, the denoiser's times of both samples.
    """
    chosen, rejected = (reward.detach() for reward in rewards)
    return {
        "loss": loss,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "mse/chosen": errors[0].detach(),
        "mse/rejected": errors[1].detach(),
        "time": model_time.chunk(2)[0].float(),
    }


def where(counted: Tensor, values: Tensor) -> Tensor:
    """Values `(B,)` without gradient, NaN where they do not count, which means then leave out."""
    return values.detach().where(counted, torch.nan)


def gathered(values: dict[str, Tensor], accelerator: Accelerator, batch_size: int) -> Tensor:
    """Per-sample values of all processes, `(samples, names)` float32, in the order of the processes.

    Processes may have unequally many samples: the last batch of a bucket is smaller, and so is one with bad rows.

    Args:
        values: `(B,)` each, of this process's batch.
        batch_size: Rows of a full batch, which is the same in all processes and at least B.
    """
    table = torch.stack([value.detach().float() for value in values.values()], dim=1)
    if accelerator.num_processes == 1:
        return table
    # The first column tells samples from padding, because any number, also NaN, can be a sample's value.
    rows, names = table.shape
    full = table.new_zeros(max(rows, batch_size), names + 1)
    full[:rows, 0] = 1
    full[:rows, 1:] = table
    full = accelerator.gather(full)
    return full[full[:, 0] == 1, 1:]


def padded(tensors: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """Tensors `(B, ...)` with `count` rows, the last one repeated, so that all processes gather equally many."""
    missing = count - len(tensors[0])
    if missing <= 0:
        return tensors
    return tuple(torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) for tensor in tensors)


def joined(values: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """An evaluation's values as one array, also where `eval_do_concat_batches=False` leaves a list of batches."""
    return np.concatenate(values) if isinstance(values, list) else np.asarray(values)


def each_row_once(rows: Any, values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows `(N,)` in order and their values `(N, ...)`; some come twice where processes cannot share them evenly."""
    distinct, first = np.unique(joined(rows), return_index=True)
    return distinct, joined(values)[first]


def means_of(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Means of the columns of values `(N, M)`, over the samples that have a value; without the names that none has.

    The loss is one of all samples: a single NaN among them is its mean.
    """
    columns = zip(names, values.astype(np.float64).T, strict=True)
    known = {name: column if name in ("loss", "ema_loss") else column[~np.isnan(column)] for name, column in columns}
    return {name: float(column.mean()) for name, column in known.items() if len(column)}

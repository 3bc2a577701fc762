"""Losses and weights that became NaN or infinite: where they are, and the error that stops the run."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .checkpoints import last_complete_checkpoint


class NonFiniteLossError(FloatingPointError):
    """The loss or the weights became NaN or infinite; the message names step, rows and the last good checkpoint."""


def non_finite_error(step: int, what: str, output_dir: Path) -> NonFiniteLossError:
    """The error to raise at a step; `what` is what was found."""
    good, _ = last_complete_checkpoint(output_dir)
    return NonFiniteLossError(
        f"At step {step} {what}. Training stopped. Last good checkpoint: "
        f"{good or 'none was saved'}. Look at these rows, lower learning_rate, or train in higher precision."
    )


def non_finite_weights(model: nn.Module) -> list[str]:
    """Names of the parameters that are not finite, in any process: each may hold shards of its own."""
    bad = [
        name
        for name, parameter in model.named_parameters()
        if not bool(torch.isfinite(_own_part(parameter.detach())).all())
    ]
    return sorted(set(gather_object(bad)))


def _own_part(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def non_finite_losses(losses: Tensor, rows: Tensor, accelerator: Accelerator) -> str | None:
    """What is wrong with a training batch's losses, or None.

    Args:
        losses: Of all processes.
        rows: This process's, gathered only if something is wrong.
    """
    finite = torch.isfinite(losses)
    if bool(finite.all()):
        return None
    bad = sorted(set(accelerator.gather(rows)[~finite].tolist()))
    return f"the loss is {losses[~finite][0].item()} for the rows {bad} of train_dataset"

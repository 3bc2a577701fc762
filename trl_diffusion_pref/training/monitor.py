"""Watches a run: averages what is logged, stops at NaN, at divergence and when asked to, and saves before it stops."""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState

from ..diffusion.noise import NoiseProcess
from .checkpoint import Checkpointer, checkpoint_problem, last_usable_checkpoint
from .config import DiffusionPreferenceConfig, GuardedConfig
from .divergence import DivergenceError, DivergenceGuard
from .metrics import STOP, UNLOGGED, gathered
from .preemption import Preempted, StopSignal


logger = get_logger(__name__)


class StepMonitor(TrainerCallback):
    """Takes each micro-batch's values in training.

    Args:
        args: Of the run; a `GuardedConfig` where the algorithm has chosen samples.
        accelerator: Gathers values from all processes.
        checkpointer: Of the run; the guard takes part in its checkpoints.
        save: Writes a checkpoint of the present step and returns its folder.
        process: Its times are the guard's.
    """

    def __init__(
        self,
        args: DiffusionPreferenceConfig,
        accelerator: Accelerator,
        checkpointer: Checkpointer,
        save: Callable[[], Path],
        process: NoiseProcess,
    ) -> None:
        self.args, self.accelerator, self.checkpointer, self.save = args, accelerator, checkpointer, save
        self.stop_signal, self._stops = StopSignal(), False
        self.guard: DivergenceGuard | None = None
        self.only_warns = isinstance(args, GuardedConfig) and args.divergence_guard == "warn"
        if isinstance(args, GuardedConfig) and args.divergence_guard != "off":
            self.guard = DivergenceGuard(args.divergence_window, process, **args.divergence_margins())
            checkpointer.parts["divergence_guard"] = self.guard
        self.reset()

    def reset(self) -> None:
        """Forgets values that were not logged, and that the run was to stop."""
        self._values: dict[str, list[float]] = defaultdict(list)
        self._stops = False

    def record(self, model: nn.Module, values: dict[str, Tensor], rows: Tensor, step: int) -> None:
        """Takes a micro-batch's values `(B,)` by name, NaN where a sample has no such value.

        Args:
            step: How many steps were taken before.

        Raises:
            NonFiniteLossError: A loss is not finite, in any process.
        """
        # All processes must stop at one step, and one alone may have been asked.
        asked = torch.full_like(values["loss"], self.stop_signal.received is not None)
        values = {**values, STOP: asked}
        samples = gathered(values, self.accelerator, self.args.train_batch_size)
        names = list(values)
        by_name = dict(zip(names, samples.unbind(dim=1), strict=True))
        self._stops = self._stops or bool(by_name[STOP].any())
        problem = non_finite_losses(by_name["loss"], rows)
        if problem:
            # The weights of the last whole step, unless they are kept already, untrained or themselves wrecked.
            finite, kept = not non_finite_weights(model), checkpoint_problem(self.checkpointer.folder(step)) is None
            if step > 0 and finite and not kept:
                self.save()
            raise non_finite_error(step + 1, problem, self.checkpointer.output_dir)
        if self.guard is not None:
            chosen = ~by_name["mse/chosen"].isnan()
            reference = by_name.get("mse/ref_chosen")
            self.guard.record(
                by_name["mse/chosen"][chosen],
                None if reference is None else reference[chosen],
                by_name["time"][chosen],
            )
        for name, mean in zip(names, samples.nanmean(dim=0).tolist(), strict=True):
            # transformers logs the loss. Samples without a value have NaN, which no batch may have throughout.
            if name not in ("loss", *UNLOGGED) and not math.isnan(mean):
                self._values[name].append(mean)

    def check_weights(self, model: nn.Module, step: int) -> None:
        """Raises a NonFiniteLossError if weights that are about to be written are not finite."""
        if bad := non_finite_weights(model):
            finding = f"the weights of {bad[0]} are not finite, so no checkpoint was written"
            raise non_finite_error(step, finding, self.checkpointer.output_dir)

    def take_means(self) -> dict[str, float]:
        """The metrics' means over the micro-batches since the last call."""
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return means

    def on_step_end(self, args, state, control, **kwargs) -> None:
        finding = self.guard and self.guard.check()
        if not finding:
            if self._ends_early(state):
                # Evaluations may take longer than there is until the process is killed.
                control.should_save, control.should_evaluate = True, False
            return
        finding = f"At step {state.global_step} {finding}"
        advice = (
            "Start again, or from an earlier checkpoint, with a lower learning_rate (try a tenth); of the options "
            "that the loss has, a higher beta, margin_clip, winner_preserving_mu or sft_weight help too. "
            "divergence_guard='warn' only warns."
        )
        if self.only_warns:
            logger.warning(f"{finding} {advice}")
            return
        folder = self.save()
        self.checkpointer.mark_as_diverged(folder, finding, should_save=self.args.should_save)
        raise DivergenceError(f"{finding} Training stopped; the weights are in {folder}. {advice}")

    def _ends_early(self, state: TrainerState) -> bool:
        return self._stops and state.global_step < state.max_steps

    def on_save(self, args, state, control, **kwargs) -> None:
        if not self._ends_early(state):
            return
        self.accelerator.wait_for_everyone()
        message = (
            f"The run was asked to stop ({self.stop_signal.received or 'a signal to another process'}). Step "
            f"{state.global_step} of {state.max_steps} is saved in {self.checkpointer.folder(state.global_step)}; the "
            "same command with resume_from_checkpoint='auto' goes on from there."
        )
        logger.warning(message)
        raise Preempted(message)


class NonFiniteLossError(FloatingPointError):
    """The loss or the weights became NaN or infinite; the message names step, rows and the last good checkpoint."""


def non_finite_error(step: int, finding: str, output_dir: Path) -> NonFiniteLossError:
    """The error to raise at a step."""
    good, _ = last_usable_checkpoint(output_dir)
    return NonFiniteLossError(
        f"At step {step} {finding}. Training stopped. Last good checkpoint: "
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


def non_finite_losses(losses: Tensor, rows: Tensor) -> str | None:
    """What is wrong with a training batch's losses, or None.

    Args:
        losses: Of all processes, in their order.
        rows: This process's, gathered only if something is wrong; processes may have unequally many.
    """
    finite = torch.isfinite(losses)
    if bool(finite.all()):
        return None
    # As objects, because their number differs between processes.
    every_row = gather_object(rows.tolist())
    bad = sorted({row for row, good in zip(every_row, finite.tolist(), strict=True) if not good})
    return f"the loss is {losses[~finite][0].item()} for the rows {bad} of train_dataset"

"""The old policy: the weights that generate, which follow the trained ones from phase to phase."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from ...training.blocks import copy_of
from ...training.references import OLD_POLICY_ADAPTER, FrozenAdapter, FrozenModel, Reference


def old_policy_of(model: nn.Module, accelerator: Accelerator) -> Reference:
    """A copy of the trained weights, or of the adapter, that moves."""
    if isinstance(model, PeftModel):
        return FrozenAdapter(model, OLD_POLICY_ADAPTER)
    # In half precision a small step would be rounded away.
    return FrozenModel(copy_of(model).float(), accelerator)


def old_policy_decay(step: int, schedule: Literal["half", "slow"]) -> float:
    """How much of the old policy stays after a step, in [0, 1): the released code's two schedules."""
    return min(0.001 * step, 0.5) if schedule == "half" else min(0.0075 * max(step - 75, 0), 0.999)


class MoveOldPolicy(TrainerCallback):
    """Moves the old policy towards the trained weights at the end of each phase.

    Within a phase it stays as it was when the samples were generated, which the loss compares with.

    Args:
        old_policy: See `old_policy_of`.
        trained: Gives the trained model, unwrapped.
        every: Steps of a phase.
        schedule: See `old_policy_decay`.
    """

    def __init__(
        self, old_policy: Reference, trained: Callable[[], nn.Module], every: int, schedule: Literal["half", "slow"]
    ) -> None:
        self.old_policy, self.trained, self.every, self.schedule = old_policy, trained, every, schedule

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every == 0:
            decay = old_policy_decay(state.global_step, self.schedule)
            self.old_policy.move_towards(self.trained(), 1 - decay)


@contextmanager
def in_pipeline(old_policy: Reference, model: nn.Module) -> Iterator[None]:
    """Within it, the pipeline that holds the trained model samples with the old policy's weights.

    Args:
        model: The trained one, unwrapped.
    """
    with old_policy.applied():
        if isinstance(old_policy, FrozenAdapter):
            yield
            return
        # The pipeline has the trained module itself, or several within it, so their weights change places.
        own = list(model.parameters())
        kept = [parameter.data for parameter in own]
        try:
            for parameter, old in zip(own, old_policy.module.parameters(), strict=True):
                parameter.data = old.data.to(parameter.dtype)
            yield
        finally:
            for parameter, data in zip(own, kept, strict=True):
                parameter.data = data

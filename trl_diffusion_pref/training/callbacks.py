"""What happens between steps."""

from collections.abc import Callable

from torch import nn
from transformers import TrainerCallback

from .references import Reference


class MoveReference(TrainerCallback):
    """Moves a reference towards the trained weights every so many steps.

    Args:
        reference: With weights of its own.
        trained: Gives the trained model, unwrapped.
        alpha: Share of the trained weights in the moved reference, in (0, 1].
        every: Steps between two moves.
    """

    def __init__(self, reference: Reference, trained: Callable[[], nn.Module], alpha: float, every: int = 1) -> None:
        self.reference, self.trained, self.alpha, self.every = reference, trained, alpha, every

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every == 0:
            self.reference.move_towards(self.trained(), self.alpha)

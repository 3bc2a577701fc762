"""What happens between steps."""

from collections.abc import Callable

from torch import nn
from transformers import TrainerCallback

from ..data import EncodedDataset
from ..data.buckets import BucketBatchSampler
from .references import Reference


class SetEpoch(TrainerCallback):
    """Tells an encoded data set, and a sampler of batches that has one, which epoch begins."""

    def __init__(self, dataset: EncodedDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        # In the middle of a resumed epoch it is not a whole number.
        epoch = int((state.epoch or 0.0) + 1e-6)
        self.dataset.set_epoch(epoch)
        sampler = getattr(kwargs.get("train_dataloader"), "batch_sampler", None)
        if isinstance(sampler, BucketBatchSampler):
            sampler.set_epoch(epoch)


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

"""What happens between steps."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

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


class EpochOfStream(TrainerCallback):
    """Counts the share of the steps as the epoch, also in a resumed run: a stream does not know how long it is."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        state.epoch = state.global_step / state.max_steps


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


# These take a config that is a dictionary, as diffusers' models have it, and need the model itself.
_TAKE_DICTIONARIES = ("wandb", "trackio", "swanlab", "comet_ml")


class _Config(dict):
    """A diffusers model's config with the methods that trackers call."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self, default=str)


class _Reported:
    """A model as trackers see it."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self.config = model, _Config(getattr(model, "config", None) or {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def make_trackers_start(callbacks: Iterable[TrainerCallback]) -> None:
    """Lets transformers' trackers report the config of a diffusers model.

    TensorBoard, MLflow, Neptune and ClearML call methods of `model.config` that diffusers' configs lack, and would end
    the run before its first step.
    """
    kinds = tuple(kind for name, kind in INTEGRATION_TO_CALLBACK.items() if name not in _TAKE_DICTIONARIES)
    for callback in callbacks:
        if type(callback) in kinds:
            callback.on_train_begin = partial(_begin, callback.on_train_begin)  # type: ignore[method-assign]


def _begin(on_train_begin: Callable[..., Any], args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
    if isinstance(kwargs.get("model"), nn.Module):
        kwargs["model"] = _Reported(kwargs["model"])
    return on_train_begin(args, state, control, **kwargs)

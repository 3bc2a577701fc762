"""The exponential moving average of the trained weights, which is evaluated and saved beside them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import TrainerCallback

from .config import DiffusionPreferenceConfig


# Its name in checkpoints, and before the names of its metrics.
EMA = "ema"


class WeightsEMA(TrainerCallback):
    """Averages the trained weights over the steps, with diffusers' `EMAModel`.

    After step k the average moves to `decay average + (1 - decay) weights` with
    `decay = min(ema_max_decay, 1 - (1 + (k - 1) / ema_inv_gamma) ** -ema_power)`. After the first step, whose decay is
    0, it is the weights themselves. It is kept in float32, because in half precision a step of `1 - decay` would be
    rounded away.

    Args:
        model: What is trained, unwrapped. Only its parameters that get gradients are averaged: of a LoRA its own.
        args: Of the run.
        read_from: Gives this average the values in a checkpoint, by its folder.

    Attributes:
        model: As above.
    """

    description = "moving average of the weights"
    per_process = False

    def __init__(self, model: nn.Module, args: DiffusionPreferenceConfig, read_from: Callable[[Path], None]) -> None:
        self.model, self.args, self.read_from = model, args, read_from
        self.trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        self.reset()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averaged weights; afterwards its own again, to the last bit."""
        held = [tensor.detach().clone() for tensor in self.trained.values()]
        try:
            self.average.copy_to(self.trained.values())
            yield
        finally:
            with torch.no_grad():
                for tensor, before in zip(self.trained.values(), held, strict=True):
                    tensor.copy_(before)

    # ---- Between steps -------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # The loop may have moved the model since.
        self.average.to(device=next(iter(self.trained.values())).device)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.average.step(self.trained.values())

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The loop has given the model that checkpoint's weights.
            self.read_from(Path(state.best_model_checkpoint))

    # ---- Checkpoints ---------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Begins again at the present weights."""
        self.average = EMAModel(
            self.trained.values(),
            decay=self.args.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=self.args.ema_inv_gamma,
            power=self.args.ema_power,
            foreach=True,
        )
        self.average.to(dtype=torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        averages = dict(zip(self.trained, self.average.shadow_params, strict=True))
        return {"steps": torch.tensor(self.average.optimization_step), **averages}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average.optimization_step = int(state["steps"])
        for name, average in zip(self.trained, self.average.shadow_params, strict=True):
            average.copy_(state[name])

    def depends_on(self) -> dict[str, Any]:
        # The decay may be changed between two runs.
        return {}


def weights_to_evaluate(ema: WeightsEMA | None) -> list[tuple[str, AbstractContextManager[None]]]:
    """The weights to evaluate: what stands before the names of their metrics, and the context that applies them."""
    own: tuple[str, AbstractContextManager[None]] = ("", nullcontext())
    return [own] if ema is None else [own, (f"{EMA}_", ema.applied())]

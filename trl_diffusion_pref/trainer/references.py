"""The reference that a preference is measured against: five ways to have one, with one interface."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import use_adapter


REFERENCE_ADAPTER = "reference"
_FILE = "reference.safetensors"


class Reference(ABC):
    """Gives the module to call in place of the trained one."""

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Within it, the yielded module computes the reference's predictions, without gradients and dropout."""
        with torch.no_grad(), self._switched() as module:
            was_training = module.training
            module.eval()
            try:
                yield module
            finally:
                module.train(was_training)

    @abstractmethod
    def _switched(self):
        """Context manager that yields the module."""

    def parameters(self) -> dict[str, Tensor]:
        """The reference's own weights by name; empty where it has none."""
        return {}

    def move_towards(self, model: nn.Module, alpha: float) -> None:
        """`reference = (1 - alpha) reference + alpha model` (TR-DPO, arXiv 2404.09656, equation 3)."""
        raise NotImplementedError(f"{type(self).__name__} has no weights of its own to move.")

    def save(self, folder: Path) -> None:
        """Writes the reference's own weights into a checkpoint."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.parameters().items()}
        save_file(weights, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote.

        Raises:
            ValueError: The checkpoint has none.
        """
        if not (folder / _FILE).is_file():
            raise ValueError(
                f"{folder} holds no weights of a moving reference or teacher ({_FILE}), so it was trained with a "
                "fixed one. Resume with the options of the run (teacher, sync_ref_model), or start a new one."
            )
        stored = load_file(folder / _FILE)
        for name, parameter in self.parameters().items():
            parameter.data.copy_(stored[name])


def _move(reference: Iterable[Tensor], trained: Iterable[Tensor], alpha: float) -> None:
    """All tensors in one call: one by one, the calls take longer than the arithmetic of small models and LoRAs."""
    reference = list(reference)
    # A moving reference may be in float32 beside a trained model in half precision, and one call takes one dtype.
    trained = [tensor.to(own.dtype) for own, tensor in zip(reference, trained, strict=True)]
    get_ema_multi_avg_fn(1 - alpha)(reference, trained, None)


class AdapterOff(Reference):
    """The base model under a new adapter: no second model."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    @contextmanager
    def _switched(self) -> Iterator[nn.Module]:
        with use_adapter(self.model, None):
            yield self.model


class Itself(Reference):
    """The model before training, called as it is; only for precomputing errors."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def _switched(self) -> Iterator[nn.Module]:
        yield self.model


class FrozenAdapter(Reference):
    """A frozen copy of an adapter that was trained before; the base model is shared."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.trained = model.active_adapter
        model.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(model.peft_config[self.trained]))
        self.move_towards(model, 1.0)
        model.set_adapter(self.trained)

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        # One walk: `get_parameter` for each would take several times as long as moving the weights.
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            # The last one, and only what has a copy: the model may have a part that is called like the adapter.
            layer, found, rest = f"{name}.".rpartition(f".{self.trained}.")
            frozen = f"{layer}.{REFERENCE_ADAPTER}.{rest}".rstrip(".")
            if found and frozen in parameters:
                yield frozen, parameters[frozen], parameter

    @contextmanager
    def _switched(self) -> Iterator[nn.Module]:
        with use_adapter(self.model, REFERENCE_ADAPTER):
            yield self.model

    def parameters(self) -> dict[str, Tensor]:
        return {name: frozen for name, frozen, _ in self._pairs()}

    def move_towards(self, model: nn.Module, alpha: float) -> None:
        _, frozen, trained = zip(*self._pairs(), strict=True)
        _move(frozen, trained, alpha)


class FrozenModel(Reference):
    """A whole second denoiser: a copy of the starting weights, or the user's."""

    def __init__(self, module: nn.Module, accelerator: Accelerator) -> None:
        module = module.eval().requires_grad_(False)
        if accelerator.state.deepspeed_plugin is not None:
            self.module = prepare_deepspeed(module, accelerator)
        elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
            self.module = prepare_fsdp(module, accelerator)
        else:
            self.module = accelerator.prepare_model(module, evaluation_mode=True)

    @contextmanager
    def _switched(self) -> Iterator[nn.Module]:
        yield self.module

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())

    def move_towards(self, model: nn.Module, alpha: float) -> None:
        _move(self.module.parameters(), model.parameters(), alpha)


class MoveReference(TrainerCallback):
    """Moves a reference towards the trained weights every so many steps."""

    def __init__(self, trainer: Trainer, reference: Reference, alpha: float, every: int = 1) -> None:
        self.trainer, self.reference, self.alpha, self.every = trainer, reference, alpha, every

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every == 0:
            self.reference.move_towards(self.trainer.accelerator.unwrap_model(self.trainer.model), self.alpha)

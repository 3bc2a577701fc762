"""The reference that a preference is measured against: five ways to have one, with one interface."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import use_adapter

from .blocks import copy_of


REFERENCE_ADAPTER, OLD_POLICY_ADAPTER = "reference", "old_policy"


class Reference:
    """Gives the module to call in place of the trained one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Within it, the yielded module computes the reference's predictions, without gradients and dropout."""
        with torch.no_grad(), self._switched():
            was_training = self.module.training
            self.module.eval()
            try:
                yield self.module
            finally:
                self.module.train(was_training)

    def _switched(self) -> AbstractContextManager[None]:
        """Context in which the module computes the reference. Default: none is needed."""
        return nullcontext()

    def parameters(self) -> dict[str, Tensor]:
        """The reference's own weights by name; empty where it has none."""
        return {}

    def move_towards(self, model: nn.Module, alpha: float) -> None:
        """`reference = (1 - alpha) reference + alpha model` (TR-DPO, arXiv 2404.09656, equation 3)."""
        raise NotImplementedError(f"{type(self).__name__} has no weights of its own to move.")

    # ---- Checkpoints of a reference that moves -------------------------------------------------------------------

    description = "weights of a moving reference or teacher"
    per_process = False

    def reset(self) -> None:
        """Keeps its weights: a second call of `train` goes on with them as it does with the trained ones."""

    def state_dict(self) -> dict[str, Tensor]:
        return self.parameters()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters().items():
            parameter.data.copy_(state[name])

    def depends_on(self) -> dict[str, Any]:
        return {}


def _move(reference: Iterable[Tensor], trained: Iterable[Tensor], alpha: float) -> None:
    """All tensors in one call: one by one, the calls take longer than the arithmetic of small models and LoRAs."""
    reference = list(reference)
    # A moving reference may be in float32 beside a trained model in half precision, and one call takes one dtype.
    trained = [tensor.to(own.dtype) for own, tensor in zip(reference, trained, strict=True)]
    get_ema_multi_avg_fn(1 - alpha)(reference, trained, None)


class AdapterOff(Reference):
    """The base model under a new adapter: no second model."""

    module: PeftModel

    def _switched(self) -> AbstractContextManager[None]:
        return use_adapter(self.module, None)


class Itself(Reference):
    """The model before training, called as it is; only for precomputing errors."""


class FrozenAdapter(Reference):
    """A frozen copy of an adapter that was trained before; the base model is shared.

    Args:
        model: With the trained adapter active.
        name: Of the copy, another one for each that a run has.
    """

    module: PeftModel

    def __init__(self, model: PeftModel, name: str = REFERENCE_ADAPTER) -> None:
        super().__init__(model)
        self.trained, self.name = model.active_adapter, name
        model.add_adapter(name, copy.deepcopy(model.peft_config[self.trained]))
        self.move_towards(model, 1.0)
        model.set_adapter(self.trained)

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        # One walk: `get_parameter` for each would take several times as long as moving the weights.
        parameters = dict(self.module.named_parameters())
        for name, parameter in parameters.items():
            # The last one, and only what has a copy: the model may have a part that is called like the adapter.
            layer, found, rest = f"{name}.".rpartition(f".{self.trained}.")
            frozen = f"{layer}.{self.name}.{rest}".rstrip(".")
            if found and frozen in parameters:
                yield frozen, parameters[frozen], parameter

    def _switched(self) -> AbstractContextManager[None]:
        return use_adapter(self.module, self.name)

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
            self.module = cast(nn.Module, prepare_fsdp(module, accelerator))
        else:
            self.module = accelerator.prepare_model(module, evaluation_mode=True)

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())

    def move_towards(self, model: nn.Module, alpha: float) -> None:
        _move(self.module.parameters(), model.parameters(), alpha)


ReferenceKind = Literal["auto", "adapter_off", "frozen_adapter", "copy", "precomputed"]


def resolve_reference(kind: ReferenceKind, *, lora: bool, carried: bool) -> ReferenceKind:
    """The reference that "auto" stands for: the one that costs least. Others are returned as they are.

    Args:
        lora: Whether a LoRA is trained.
        carried: Whether the model came with it, trained before: its start is then not the base model.

    Raises:
        ValueError: A reference by adapters for full training.
    """
    if kind == "auto":
        return "copy" if not lora else "frozen_adapter" if carried else "adapter_off"
    if kind in ("adapter_off", "frozen_adapter") and not lora:
        raise ValueError(f"reference={kind!r} needs a LoRA: pass peft_config, or use reference='copy'.")
    return kind


def make_reference(kind: ReferenceKind, model: nn.Module, accelerator: Accelerator) -> Reference:
    """A resolved kind's reference; "precomputed" errors come from the model before it is trained."""
    if kind == "adapter_off":
        return AdapterOff(cast(PeftModel, model))
    if kind == "frozen_adapter":
        return FrozenAdapter(cast(PeftModel, model))
    if kind == "copy":
        return FrozenModel(copy_of(model), accelerator)
    return Itself(model)

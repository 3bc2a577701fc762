"""A negative LoRA inside the pipeline's own denoiser: put in, switched on for one half of the guidance, taken out."""

from collections.abc import Iterator
from typing import Any

from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .sources import NegativeLoRA, denoiser_name


ADAPTER = "negative"


def tuner_layers(denoiser: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """The layers that carry adapters, by name."""
    return ((name, part) for name, part in denoiser.named_modules() if isinstance(part, BaseTunerLayer))


class _LayerState:
    """What a layer's adapters are set to."""

    def __init__(self, layer: BaseTunerLayer) -> None:
        self.layer = layer
        self.active, self.disabled = list(layer.active_adapters), layer.disable_adapters
        self.scaling = dict(getattr(layer, "scaling", {}))

    def apply(self) -> None:
        """Sets the layer; adapters that are switched do not become trainable by it."""
        if hasattr(self.layer, "scaling"):
            self.layer.scaling.update(self.scaling)
        if self.layer.disable_adapters != self.disabled:
            self.layer.enable_adapters(not self.disabled)
        if self.active and self.layer.active_adapters != self.active:
            self.layer.set_adapter(self.active, inference_mode=True)


class NegativeAdapter:
    """The negative LoRA in a denoiser, and two settings of all its adapters: the user's, and the negative side's.

    Args:
        pipeline: Its denoiser, or `denoiser` where that is another one, gets the adapter.
        negative: The LoRA.
        alpha: Factor on the scale of the user's own active adapters in the negative side.
        beta: Scale of the negative LoRA.

    Raises:
        ValueError: The LoRA does not fit the denoiser, or the user's adapters are fused.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        denoiser: nn.Module,
        negative: NegativeLoRA | None,
        alpha: float,
        beta: float,
    ) -> None:
        self.denoiser = denoiser
        layers = dict(tuner_layers(denoiser))
        if any(layer.merged for layer in layers.values()):
            raise ValueError(
                "The pipeline's LoRA is fused, which hides other adapters in its layers. Call pipeline.unfuse_lora() "
                "first, or pipeline.unload_lora_weights() to keep it in the weights for good."
            )
        self._layers_before = set(layers)
        self._requires_grad = {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()}
        self._attributes = {
            name: vars(denoiser)[name] for name in ("peft_config", "_hf_peft_config_loaded") if name in vars(denoiser)
        }
        if "peft_config" in self._attributes:
            self._attributes["peft_config"] = dict(self._attributes["peft_config"])
        users = {name: _LayerState(layer) for name, layer in layers.items()}
        if negative is not None:
            self._inject(pipeline, negative, users)
        self._users, self._negatives = [], []
        for name, layer in tuner_layers(denoiser):
            user, mixed = users.get(name), _LayerState(layer)
            if user is None:
                user = _LayerState(layer)
                user.active, user.disabled = [], True
            active = [] if user.disabled else [adapter for adapter in user.active if adapter != ADAPTER]
            mixed.scaling |= {adapter: alpha * user.scaling[adapter] for adapter in active if adapter in user.scaling}
            if ADAPTER in mixed.scaling:
                mixed.scaling[ADAPTER] = beta * mixed.scaling[ADAPTER]
                active = [*active, ADAPTER]
            mixed.active, mixed.disabled = active, not active
            self._users.append(user)
            self._negatives.append(mixed)

    def _inject(self, pipeline: DiffusionPipeline, negative: NegativeLoRA, users: dict[str, _LayerState]) -> None:
        prefix = denoiser_name(pipeline)
        wanted = {key.removeprefix(f"{prefix}.") for key in negative.state_dict}
        problem: Any = None
        try:
            if isinstance(self.denoiser, PeftAdapterMixin):
                self._inject_with_diffusers(pipeline, prefix, negative)
            else:
                self._inject_with_peft(prefix, negative)
            loaded = get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER)
            missing = sorted(wanted - set(loaded)) if any("lora_A" in key for key in wanted) else []
            if missing:
                problem = f"{len(missing)} of its {len(wanted)} tensors have no place, first {missing[0]}"
        except Exception as error:  # PEFT and torch raise many kinds for a LoRA of another model.
            problem = error
        if problem is not None:
            self._negatives, self._users = [], list(users.values())
            self.remove()
            raise ValueError(
                f"The LoRA {negative.name} does not fit the pipeline's {type(self.denoiser).__name__}: {problem}. "
                "Train the negative LoRA on the same base."
            )

    def _inject_with_diffusers(self, pipeline: DiffusionPipeline, prefix: str, negative: NegativeLoRA) -> None:
        # diffusers takes hooks off and puts them on again, which layers that are offloaded one by one need. A denoiser
        # that moves as a whole does not, and would lose where it was to move.
        whole = isinstance(getattr(self.denoiser, "_hf_hook", None), CpuOffload)
        self.denoiser.load_lora_adapter(
            negative.state_dict,
            prefix=prefix,
            adapter_name=ADAPTER,
            _pipeline=None if whole else pipeline,
            **negative.options,
        )

    def _inject_with_peft(self, prefix: str, negative: NegativeLoRA) -> None:
        """Into a denoiser that diffusers loads no adapters into."""
        metadata = {key.removeprefix(f"{prefix}."): value for key, value in negative.options["metadata"].items()}
        place = self.denoiser.device
        state_dict = {key.removeprefix(f"{prefix}."): value.to(place) for key, value in negative.state_dict.items()}
        inject_adapter_in_model(LoraConfig(**metadata), self.denoiser, adapter_name=ADAPTER)
        set_peft_model_state_dict(self.denoiser, state_dict, adapter_name=ADAPTER)
        for name, parameter in self.denoiser.named_parameters():
            if f".{ADAPTER}." in name:
                # As diffusers does: in the denoiser's precision, and not to be trained.
                parameter.data = parameter.data.to(self.denoiser.dtype)
                parameter.requires_grad_(False)

    def use_negative(self) -> None:
        """Switches to the negative side's adapters."""
        for state in self._negatives:
            state.apply()

    def use_users(self) -> None:
        """Switches to the adapters as the user set them."""
        for state in self._users:
            state.apply()

    def remove(self) -> None:
        """Takes the negative LoRA out and leaves the denoiser as it was."""
        self.use_users()
        for name, layer in list(tuner_layers(self.denoiser)):
            if name not in self._layers_before:
                parent, _, child = name.rpartition(".")
                setattr(self.denoiser.get_submodule(parent), child, layer.get_base_layer())
            elif ADAPTER in getattr(layer, "scaling", {}):
                layer.delete_adapter(ADAPTER)
        left = [layer for _, layer in tuner_layers(self.denoiser)]
        for state in self._users:
            if any(state.layer is layer for layer in left):
                state.apply()
        for name in ("peft_config", "_hf_peft_config_loaded"):
            vars(self.denoiser).pop(name, None)
        vars(self.denoiser).update(self._attributes)
        for name, parameter in self.denoiser.named_parameters():
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])

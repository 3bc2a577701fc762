"""A negative LoRA inside a denoiser: put in, switched on for one half of the guidance, taken out."""

from collections.abc import Iterator
from typing import Any

from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .sources import NegativeLoRA, denoiser_name


_NAME = "negative"


def tuner_layers(denoiser: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """The layers that carry adapters, by name."""
    return ((name, part) for name, part in denoiser.named_modules() if isinstance(part, BaseTunerLayer))


class _LayerState:
    """What a layer's adapters are set to, without the one called `hidden`."""

    def __init__(self, layer: BaseTunerLayer, hidden: str | None) -> None:
        self.layer = layer
        self.active = [name for name in layer.active_adapters if name != hidden]
        self.disabled = layer.disable_adapters
        self.scaling = {name: value for name, value in getattr(layer, "scaling", {}).items() if name != hidden}

    def apply(self) -> None:
        """Sets the layer; adapters that are switched do not become trainable by it."""
        if hasattr(self.layer, "scaling"):
            self.layer.scaling.update(self.scaling)
        if self.layer.disable_adapters != self.disabled:
            self.layer.enable_adapters(not self.disabled)
        # A layer of the negative LoRA alone has none active then, and is not disabled: what the user loads into it
        # works.
        if self.layer.active_adapters != self.active:
            self.layer.set_adapter(self.active, inference_mode=True)


class NegativeAdapter:
    """The negative LoRA in a denoiser, and the switch between the user's adapters and the negative side's.

    The user's setting is read anew at each switch, so that adapters can be loaded, scaled and disabled meanwhile.

    Args:
        pipeline: Whose denoiser it is about.
        denoiser: Gets the adapter: the pipeline's own, or a copy of it.
        negative: The LoRA; None where the denoiser's weights are the negative side's already.
        alpha: Factor on the scale of the user's active adapters in the negative side.
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
        self.denoiser, self.alpha, self.beta = denoiser, alpha, beta
        layers = dict(tuner_layers(denoiser))
        if any(layer.merged for layer in layers.values()):
            raise ValueError(
                "The pipeline's LoRA is fused, which hides other adapters in its layers. Call pipeline.unfuse_lora() "
                "first, or pipeline.unload_lora_weights() to keep it in the weights for good."
            )
        self._requires_grad = {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()}
        self._own_before = {name: vars(denoiser).get(name) for name in ("peft_config", "_hf_peft_config_loaded")}
        self._before = [_LayerState(layer, None) for layer in layers.values()]
        self._users: list[_LayerState] = []
        self.name: str | None = None
        if negative is not None:
            self.name = _unused_name(layers.values())
            self._inject(pipeline, negative)
            self.scaling = {
                id(layer): layer.scaling[self.name]
                for _, layer in tuner_layers(denoiser)
                if self.name in getattr(layer, "scaling", {})
            }
            self._restore_before()
            self._read_users()
            self.use_users()

    def _inject(self, pipeline: DiffusionPipeline, negative: NegativeLoRA) -> None:
        prefix = denoiser_name(pipeline)
        wanted = {key.removeprefix(f"{prefix}.") for key in negative.state_dict}
        problem: Any = None
        try:
            if isinstance(self.denoiser, PeftAdapterMixin):
                self._inject_with_diffusers(pipeline, prefix, negative)
            else:
                self._inject_with_peft(prefix, negative)
            loaded = get_peft_model_state_dict(self.denoiser, adapter_name=self.name)
            missing = sorted(wanted - set(loaded)) if any("lora_A" in key for key in wanted) else []
            if missing:
                problem = f"{len(missing)} of its {len(wanted)} tensors have no place, first {missing[0]}"
        except Exception as error:  # PEFT and torch raise many kinds for a LoRA of another model.
            problem = error
        if problem is not None:
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
            adapter_name=self.name,
            _pipeline=None if whole else pipeline,
            **negative.options,
        )

    def _inject_with_peft(self, prefix: str, negative: NegativeLoRA) -> None:
        """Into a denoiser that diffusers loads no adapters into."""
        metadata = {key.removeprefix(f"{prefix}."): value for key, value in negative.options["metadata"].items()}
        place = self.denoiser.device
        state_dict = {key.removeprefix(f"{prefix}."): value.to(place) for key, value in negative.state_dict.items()}
        inject_adapter_in_model(LoraConfig(**metadata), self.denoiser, adapter_name=self.name)
        set_peft_model_state_dict(self.denoiser, state_dict, adapter_name=self.name)
        for name, parameter in self.denoiser.named_parameters():
            if f".{self.name}." in name:
                # As diffusers does: in the denoiser's precision, and not to be trained.
                parameter.data = parameter.data.to(self.denoiser.dtype)
                parameter.requires_grad_(False)

    def _restore_before(self) -> None:
        """Undoes what injecting changed in layers that were there."""
        for state in self._before:
            state.apply()

    def _read_users(self) -> None:
        self._users = [_LayerState(layer, self.name) for _, layer in tuner_layers(self.denoiser)]

    def use_negative(self) -> None:
        """Switches to the negative side's adapters.

        Raises:
            RuntimeError: The negative LoRA was unloaded meanwhile.
        """
        self._read_users()
        found = self.name is None
        for user in self._users:
            mixed = _LayerState(user.layer, self.name)
            mixed.active = [] if user.disabled else list(user.active)
            mixed.scaling |= {name: self.alpha * user.scaling[name] for name in mixed.active if name in user.scaling}
            if self.name in getattr(user.layer, "scaling", {}):
                found = True
                mixed.scaling[self.name] = self.beta * self.scaling[id(user.layer)]
                mixed.active.append(self.name)
            mixed.disabled = not mixed.active
            mixed.apply()
        if not found:
            raise RuntimeError(
                "The negative LoRA was unloaded while its guidance was on, probably by unload_lora_weights(). "
                "Remove the guidance first (leave the with block, or call remove()), and add it again afterwards."
            )

    def use_users(self) -> None:
        """Switches to the adapters as the user set them."""
        for state in self._users:
            state.apply()

    def remove(self) -> None:
        """Takes the negative LoRA out and leaves the denoiser as it was, or as the user has set it meanwhile."""
        if self.name is None:
            return
        before = {id(state.layer) for state in self._before}
        for name, layer in list(tuner_layers(self.denoiser)):
            user, carried = _LayerState(layer, self.name), self.name in getattr(layer, "scaling", {})
            if carried:
                layer.delete_adapter(self.name)
            if not getattr(layer, "scaling", True) and id(layer) not in before:
                parent, _, child = name.rpartition(".")
                setattr(self.denoiser.get_submodule(parent), child, layer.get_base_layer())
            elif carried:
                user.apply()
        if not self._users:
            # Injecting failed, and may have changed what was set.
            self._restore_before()
        configs = vars(self.denoiser).get("peft_config")
        if isinstance(configs, dict):
            configs.pop(self.name, None)
            if not configs and self._own_before["peft_config"] is None:
                del self.denoiser.peft_config
        if not any(True for _ in tuner_layers(self.denoiser)):
            vars(self.denoiser).pop("_hf_peft_config_loaded", None)
            if self._own_before["_hf_peft_config_loaded"] is not None:
                self.denoiser._hf_peft_config_loaded = self._own_before["_hf_peft_config_loaded"]
        for name, parameter in self.denoiser.named_parameters():
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])


def _unused_name(layers: Any) -> str:
    taken = {name for layer in layers for name in getattr(layer, "scaling", {})}
    number = 0
    while (name := f"{_NAME}_{number}" if number else _NAME) in taken:
        number += 1
    return name

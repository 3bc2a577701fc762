"""A negative LoRA inside a denoiser: loaded, active on the negative side of the guidance only, removed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .sources import Negative


def _tuner_layers(denoiser: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name: part for name, part in denoiser.named_modules() if isinstance(part, BaseTunerLayer)}


def _unfused_layers(denoiser: nn.Module) -> dict[str, BaseTunerLayer]:
    layers = _tuner_layers(denoiser)
    if any(layer.merged for layer in layers.values()):
        raise ValueError(
            "The pipeline's LoRA is fused, which hides other adapters in its layers. Call pipeline.unfuse_lora(). To "
            "keep it in the weights for good, remove the guidance, fuse, call pipeline.unload_lora_weights() and add "
            "the guidance again."
        )
    return layers


def _scaling(layer: BaseTunerLayer | None) -> dict[str, float]:
    """The scale of each adapter in a layer; layers of other kinds than LoRA may have none."""
    return getattr(layer, "scaling", {})


def _activate(layer: BaseTunerLayer, active: list[str], disabled: bool) -> None:
    if layer.disable_adapters != disabled:
        layer.enable_adapters(not disabled)
    if list(layer.active_adapters) != active:
        # Adapters that are switched on do not become trainable.
        layer.set_adapter(active, inference_mode=True)


@contextmanager
def _restored(layers: Iterable[BaseTunerLayer]) -> Iterator[None]:
    """Restores which adapters are active, and at which scale."""
    before = [(layer, list(layer.active_adapters), layer.disable_adapters, {**_scaling(layer)}) for layer in layers]
    try:
        yield
    finally:
        for layer, active, disabled, scaling in before:
            _scaling(layer).update(scaling)
            _activate(layer, active, disabled)


@contextmanager
def without_adapters(denoiser: nn.Module) -> Iterator[None]:
    """Switches a denoiser's adapters off, and afterwards on again as they were.

    Raises:
        ValueError: They are fused.
    """
    layers = _unfused_layers(denoiser)
    # Switching adapters on again makes them trainable.
    trainable = [(each, each.requires_grad) for each in denoiser.parameters()] if layers else []
    try:
        with _restored(layers.values()):
            for layer in layers.values():
                _activate(layer, list(layer.active_adapters), disabled=True)
            yield
    finally:
        for parameter, before in trainable:
            parameter.requires_grad_(before)


class NegativeAdapter:
    """The adapters of the negative side: the user's own and, if there is one, the negative LoRA.

    Args:
        pipeline: The guided pipeline.
        denoiser: The module that computes the negative side: the pipeline's own denoiser, or a copy of it.
        negative: The LoRA, which is loaded; or full weights, whose offset the denoiser's weights contain already.

    Raises:
        ValueError: The LoRA does not fit the denoiser, or the user's adapters are fused.
    """

    def __init__(self, pipeline: DiffusionPipeline, denoiser: nn.Module, negative: Negative) -> None:
        self.denoiser, self.name, self._prefix = denoiser, "", negative.attribute
        self._users: nn.Module = getattr(pipeline, self._prefix)
        layers = _unfused_layers(denoiser)
        self._before = set(layers)
        if negative.denoiser is not None:
            return
        taken = {name for layer in layers.values() for name in _scaling(layer)}
        self.name = next(name for number in count() if (name := f"negative_{number}") not in taken)
        self._trainable = {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()}
        # Names of older formats change while they are loaded.
        new = [key for key in negative.state_dict if ".lora_A." in key or ".lora_B." in key]
        wanted = {key.removeprefix(f"{self._prefix}.") for key in new}
        try:
            with _restored(layers.values()):
                self._load(pipeline, negative)
            missing = sorted(wanted - get_peft_model_state_dict(denoiser, adapter_name=self.name).keys())
            if missing:
                raise ValueError(f"{len(missing)} of its {len(wanted)} tensors have no place, first {missing[0]}")
        except Exception as error:  # PEFT and torch raise many kinds for a LoRA of another model.
            self.remove()
            raise ValueError(
                f"The LoRA {negative.name} does not fit the pipeline's {type(denoiser).__name__}: {error}. "
                "Train the negative LoRA on the same base."
            ) from error
        for name, layer in _tuner_layers(denoiser).items():
            if name not in layers:
                _activate(layer, [], disabled=False)

    def _load(self, pipeline: DiffusionPipeline, negative: Negative) -> None:
        options: dict[str, Any] = {"adapter_name": self.name, "low_cpu_mem_usage": True}
        if isinstance(self.denoiser, PeftAdapterMixin):
            # Given the pipeline, diffusers takes offloading hooks off and puts them on again. A denoiser whose layers
            # are offloaded one by one needs that; one that moves as a whole does not, and would lose its device.
            whole = isinstance(getattr(self.denoiser, "_hf_hook", None), CpuOffload)
            options |= {"prefix": self._prefix, "_pipeline": None if whole else pipeline, **negative.options}
            self.denoiser.load_lora_adapter(negative.state_dict, **options)
            return
        start = f"{self._prefix}."
        tensors = {key.removeprefix(start): value for key, value in negative.state_dict.items()}
        config = {key.removeprefix(start): value for key, value in negative.options["metadata"].items()}
        inject_adapter_in_model(LoraConfig(**config), self.denoiser, state_dict=tensors, **options)
        set_peft_model_state_dict(self.denoiser, tensors, **options)

    @contextmanager
    def negative_side(self, alpha: float, beta: float) -> Iterator[None]:
        """Sets the denoiser to the negative side, and back afterwards.

        The user's settings are read each time, so that adapters can be scaled, disabled and loaded meanwhile.

        Args:
            alpha: Factor on the scale of the user's active adapters.
            beta: Factor on the scale of the negative LoRA's configuration.

        Raises:
            ValueError: The user's adapters are fused.
            RuntimeError: The negative LoRA was unloaded, or a copied denoiser lacks an adapter that was loaded later.
        """
        users, layers = _unfused_layers(self._users), _tuner_layers(self.denoiser)
        if self.name and not any(self.name in _scaling(layer) for layer in layers.values()):
            raise RuntimeError(
                "The negative LoRA was unloaded while its guidance was on, probably by unload_lora_weights(). "
                "Remove the guidance first (leave the with block, or call remove()), and add it again afterwards."
            )
        active: dict[str, list[str]] = {}
        for name, user in users.items():
            active[name] = (
                [] if user.disable_adapters else [each for each in user.active_adapters if each != self.name]
            )
            if lacking := set(active[name]) & _scaling(user).keys() - _scaling(layers.get(name)).keys():
                raise RuntimeError(
                    f"The adapter {min(lacking)!r} was loaded after the guidance was added, and the negative side's "
                    "second denoiser lacks it. Call remove() and add the guidance again."
                )
        with _restored(layers.values()):
            for name, layer in layers.items():
                adapters, scaling = list(active.get(name, [])), _scaling(layer)
                scaling.update({each: alpha * _scaling(users[name])[each] for each in adapters if each in scaling})
                if self.name in scaling:
                    layer.set_scale(self.name, beta)  # type: ignore[attr-defined]
                    adapters.append(self.name)
                _activate(layer, adapters, disabled=not adapters)
            yield

    def remove(self) -> None:
        """Removes the negative LoRA and leaves the denoiser as it was, or as the user has set it meanwhile."""
        if not self.name:
            return
        own = vars(self.denoiser)
        for name, layer in _tuner_layers(self.denoiser).items():
            layer.delete_adapter(self.name)
            if name not in self._before and not _scaling(layer):
                self.denoiser.set_submodule(name, layer.get_base_layer())
        own.get("peft_config", {}).pop(self.name, None)
        if not own.get("peft_config"):
            # As in a denoiser that never had an adapter: its class says that none is loaded.
            own.pop("peft_config", None)
            own.pop("_hf_peft_config_loaded", None)
        for name, parameter in self.denoiser.named_parameters():
            parameter.requires_grad_(self._trainable.get(name, parameter.requires_grad))

"""Makes a pipeline's denoiser, or an adapter in it, trainable; refuses first what could not be trained well."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..families import Family
from ..hub import PEFT_PREFIX, check_exportable
from .base_config import DiffusionPreferenceConfig
from .references import REFERENCE_ADAPTER


logger = get_logger(__name__)


@contextmanager
def taken_out_of_peft_model(
    pipeline: DiffusionPipeline, family: Family
) -> Iterator[tuple[nn.Module, PeftModel | None]]:
    """Puts the denoiser itself into the pipeline where a `PeftModel` was wrapped around it; on an error puts it back.

    Yields:
        The denoiser, and the wrapper that it came in, for `make_trainable`.
    """
    denoiser = family.denoiser(pipeline)
    if not isinstance(denoiser, PeftModel):
        yield denoiser, None
        return
    base = denoiser.get_base_model()
    setattr(pipeline, family.denoiser_name, base)
    try:
        yield base, denoiser
    except BaseException:
        setattr(pipeline, family.denoiser_name, denoiser)
        raise


def carries_adapter(module: nn.Module) -> bool:
    """Whether there are PEFT layers in a module."""
    return any(isinstance(part, BaseTunerLayer) for part in module.modules())


def with_targets(peft_config: LoraConfig, family: Family) -> LoraConfig:
    """A copy, with the family's target modules where it names none."""
    peft_config = copy.deepcopy(peft_config)
    if peft_config.target_modules is None:
        peft_config.target_modules = list(family.lora_target_modules)
    return peft_config


def check_trainable(
    base: nn.Module, family: Family, peft_config: LoraConfig | None, wrapper: PeftModel | None
) -> None:
    """Refuses what `make_trainable` could not do well, before anything is changed.

    Raises:
        ValueError: A distilled denoiser, a second adapter, several, float16 weights for full training, or a LoRA that
            could not be loaded.
    """
    if base.config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"This {type(base).__name__} is distilled: it takes the guidance scale as an input "
            "(time_cond_proj_dim), which training would leave out. Tune the model that it was distilled from."
        )
    if peft_config is not None:
        check_exportable(peft_config)
    if carries_adapter(base):
        if peft_config is not None:
            raise ValueError(
                f"peft_config asks for a new adapter, but the pipeline's {family.denoiser_name} already "
                "carries an adapter, from an earlier trainer or load_lora_weights. Leave peft_config out to go on "
                "training that one, load the pipeline afresh, or merge the adapter first (pipeline.fuse_lora() "
                "and pipeline.unload_lora_weights())."
            )
        names = _injected(base)
        if wrapper is None and len(names) != 1:
            raise ValueError(
                f"The pipeline's {family.denoiser_name} carries {len(names)} adapters that can be found "
                f"({', '.join(names) or 'none'}); exactly one can be trained. Unload the others."
            )
    elif peft_config is None and base.dtype == torch.float16:
        raise ValueError(
            f"The {family.denoiser_name}'s weights are float16, in which small updates vanish and the loss "
            "overflows. For full fine-tuning load them in float32 (dtype=torch.float32) and set bf16=True "
            "or fp16=True for mixed precision, or train a LoRA with peft_config=LoraConfig(...)."
        )


def make_trainable(
    base: nn.Module,
    pipeline: DiffusionPipeline,
    family: Family,
    peft_config: LoraConfig | None,
    wrapper: PeftModel | None,
) -> nn.Module:
    """Freezes everything, then makes the denoiser or an adapter in it trainable.

    Args:
        base: The pipeline's denoiser.
        peft_config: Of a new adapter.
        wrapper: What the denoiser came in, see `taken_out_of_peft_model`.

    Returns:
        The denoiser, or the PEFT model around it.
    """
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
    if carries_adapter(base):
        return _carried_adapter(base, wrapper)
    if peft_config is not None:
        return get_peft_model(base, with_targets(peft_config, family))
    if base.dtype == torch.bfloat16:
        logger.warning(
            f"Full fine-tuning of a bfloat16 {family.denoiser_name}: updates below 1/256 of a weight are "
            "rounded away. Load it in float32 and set bf16=True unless memory forbids."
        )
    return base.requires_grad_(True)


def _injected(base: nn.Module) -> list[str]:
    """Adapters without a PEFT model around them. An earlier trainer's frozen reference is none to go on with."""
    return [name for name in getattr(base, "peft_config", {}) if name != REFERENCE_ADAPTER]


def _carried_adapter(base: nn.Module, model: PeftModel | None) -> PeftModel:
    """The adapter that the denoiser carries, as a PEFT model that goes on training it."""
    if model is None:
        # load_lora_weights injects the layers without the PEFT model around them, which saving and resuming need.
        (name,) = _injected(base)
        config = copy.deepcopy(base.peft_config[name])
        state_dict = get_peft_model_state_dict(base, adapter_name=name)
        _remove_adapters(base)
        model = get_peft_model(base, config)
        set_peft_model_state_dict(model, {PEFT_PREFIX + name: tensor for name, tensor in state_dict.items()})
    # Everything is frozen by now; this makes the active adapter's own parameters trainable.
    model.set_adapter(model.active_adapter)
    return model


def _remove_adapters(denoiser: nn.Module) -> None:
    if isinstance(denoiser, PeftAdapterMixin):
        denoiser.unload_lora()
        return
    # Of pipelines without load_lora_weights: PEFT put them in.
    recurse_remove_peft_layers(denoiser)
    del denoiser.peft_config


def has_gradient_checkpointing(base: nn.Module) -> bool:
    """Whether a diffusers model has it at all, which it says under no public name."""
    return getattr(base, "_supports_gradient_checkpointing", True)


def check_gradient_checkpointing(args: DiffusionPreferenceConfig, family: Family, base: nn.Module) -> None:
    """Switches the default off where the family or its denoiser cannot do it, and refuses what was asked for.

    Raises:
        ValueError: Checkpointing was asked for.
    """
    has_it = has_gradient_checkpointing(base)
    if not (args.activation_checkpointing or args.gradient_checkpointing) or (
        family.gradient_checkpointing and has_it
    ):
        return
    denoiser = f"The {family.denoiser_name} of {family.pipeline_class}"
    if not args.checkpointing_is_default:
        problem = "computes something else with activation checkpointing, so it would train something else"
        raise ValueError(
            f"{denoiser} {problem if has_it else 'has no such thing'}. Set activation_checkpointing=False."
        )
    logger.warning(f"{denoiser} cannot be trained with activation checkpointing, so it is off.")
    args.activation_checkpointing = args.gradient_checkpointing = False


def apply_gradient_checkpointing(base: nn.Module, args: DiffusionPreferenceConfig) -> None:
    """diffusers names the method differently, so it is called here, and the loop is told to do nothing."""
    if args.activation_checkpointing or args.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    elif base.is_gradient_checkpointing:
        # From an earlier trainer on the same pipeline, or switched on by its owner: the config decides.
        base.disable_gradient_checkpointing()
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        setattr(args, name, False)

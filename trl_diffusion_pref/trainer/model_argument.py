"""The pipeline that a trainer's `model` stands for, and what it is called on the Hub."""

import os
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn


def load_pipeline(
    model: str | os.PathLike | DiffusionPipeline, model_init_kwargs: dict[str, Any] | None
) -> DiffusionPipeline:
    """Loads a pipeline that is given by name, in float32 unless told otherwise.

    Raises:
        ValueError: Options of loading for a pipeline that is loaded already.
    """
    if not isinstance(model, (str, os.PathLike)):
        if model_init_kwargs:
            raise ValueError("model_init_kwargs is for a model given by name, but a loaded one was passed.")
        return model
    return DiffusionPipeline.from_pretrained(model, **{"dtype": torch.float32, **(model_init_kwargs or {})})


def check_not_offloaded(pipeline: DiffusionPipeline) -> None:
    """Refuses a pipeline whose parts are moved to and fro whenever they are called.

    Raises:
        ValueError: Names the parts.
    """
    parts = [
        name
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and any(map(_offloads, component.modules()))
    ]
    if parts:
        raise ValueError(
            f"The pipeline offloads {', '.join(parts)} (enable_model_cpu_offload, enable_sequential_cpu_offload or "
            "group offloading), which would move weights in the middle of training. Load it anew without, or, but for "
            "group offloading, call pipeline.remove_all_hooks(). The encoders leave the accelerator before training "
            "anyway."
        )


def _offloads(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    by_group = hasattr(module, "_diffusers_hook") and module._diffusers_hook.get_hook("group_offloading") is not None
    return by_group or any(
        isinstance(hook, CpuOffload) or (isinstance(hook, AlignDevicesHook) and hook.offload) for hook in hooks
    )


def hub_id(model: str | os.PathLike | DiffusionPipeline) -> str | None:
    """The base's Hub id; None where it came from a local folder, or from a path that can be no id."""
    name = str(model) if isinstance(model, (str, os.PathLike)) else getattr(model, "name_or_path", None)
    if not name or os.path.isdir(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name

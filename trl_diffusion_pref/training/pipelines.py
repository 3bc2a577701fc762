"""What `model` and `ref_model` may be: their family, name on the Hub, and loaded pipeline."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..data import Encoders
from ..evaluation.loading import family_by_name
from ..families import Family, family_for
from ..fingerprint import different_parameters
from ..host_libraries import dtype_option, quiet_loading
from .config import DiffusionPreferenceConfig
from .quantised import loading_options


def family_of(model: str | os.PathLike | DiffusionPipeline, model_init_kwargs: dict[str, Any]) -> Family:
    """The family of what `load_pipeline` loads, from the pipeline's index alone: no weights are read.

    Raises:
        TypeError: No supported pipeline.
        ImportError: One that needs a package which is not installed.
        OSError: No pipeline of this name.
    """
    if not isinstance(model, (str, os.PathLike)):
        return family_for(model)
    return family_by_name(model, model_init_kwargs)


def load_pipeline(
    model: str | os.PathLike | DiffusionPipeline, model_init_kwargs: dict[str, Any]
) -> DiffusionPipeline:
    """Loads a pipeline that is given by name, in float32 unless the options say otherwise.

    Raises:
        ValueError: Options of loading for a pipeline that is loaded already.
    """
    if not isinstance(model, (str, os.PathLike)):
        if model_init_kwargs:
            raise ValueError("model_init_kwargs is for a model given by name, but a loaded one was passed.")
        return model
    options = dict(model_init_kwargs)
    dtype = options.pop("dtype", None) or options.pop("torch_dtype", None) or torch.float32
    with quiet_loading():
        return DiffusionPipeline.from_pretrained(model, **dtype_option(dtype), **options)


def encoders_of(
    model: str | os.PathLike | DiffusionPipeline,
    pipeline: DiffusionPipeline,
    family: Family,
    model_init_kwargs: dict[str, Any],
) -> Encoders:
    """The encoders of a pipeline that `load_pipeline` gave: of one loaded here, they may leave memory."""
    if not isinstance(model, (str, os.PathLike)):
        return Encoders(pipeline, family)

    def load(names: Sequence[str]) -> dict[str, nn.Module]:
        others = {name: part for name, part in pipeline.components.items() if name not in names}
        loaded = load_pipeline(model, {**model_init_kwargs, **others})
        return {name: getattr(loaded, name) for name in names}

    names = (*family.encoder_names, *family.idle_denoisers)
    return Encoders(pipeline, family, load, kept=[name for name in names if name in model_init_kwargs])


def check_not_offloaded(pipeline: DiffusionPipeline) -> None:
    """Raises for a pipeline whose parts are moved to and fro whenever they are called.

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
            "group offloading), which would move weights in the middle of training. Load it again without offloading, "
            "or, except for group offloading, call pipeline.remove_all_hooks(). The encoders leave the accelerator "
            "before training anyway."
        )


def _offloads(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    registry = getattr(module, "_diffusers_hook", None)
    by_group = registry is not None and registry.get_hook("group_offloading") is not None
    return by_group or any(
        isinstance(hook, CpuOffload) or (isinstance(hook, AlignDevicesHook) and hook.offload) for hook in hooks
    )


def hub_id(model: str | os.PathLike | DiffusionPipeline) -> str | None:
    """The base's Hub id, also of a copy in the Hub's cache; None where it came from another folder, or from memory."""
    # A loaded pipeline keeps what it was loaded by, which may be a Path.
    name = str(model if isinstance(model, (str, os.PathLike)) else getattr(model, "name_or_path", None) or "")
    if name and (cached := re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]", name)):
        return "/".join(cached.groups())
    if not name or os.path.isdir(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def origin(model: str | os.PathLike | DiffusionPipeline) -> tuple[str | None, str | None]:
    """The base's Hub id, and the name of the folder that it came from, without the path, which is its owner's."""
    name = str(model if isinstance(model, (str, os.PathLike)) else getattr(model, "name_or_path", None) or "")
    return hub_id(model), Path(name).resolve().name if name and os.path.isdir(name) else None


def short_name(model: str | os.PathLike | DiffusionPipeline) -> str:
    """Of a folder, a Hub id or a loaded pipeline."""
    return Path(model).name if isinstance(model, (str, os.PathLike)) else type(model).__name__


def load_reference_model(
    ref_model: str | os.PathLike | DiffusionPipeline | nn.Module,
    base: nn.Module,
    family: Family,
    args: DiffusionPreferenceConfig,
) -> nn.Module:
    """The denoiser of a reference that the user brings.

    Args:
        base: The denoiser that is trained, or gets the adapter.

    Raises:
        ValueError: It has another architecture, or is the trained model itself.
    """
    if isinstance(ref_model, (str, os.PathLike)):
        ref_model = load_pipeline(ref_model, loading_options(ref_model, args, family))
    if isinstance(ref_model, DiffusionPipeline):
        check_not_offloaded(ref_model)
        ref_model = family.denoiser(ref_model)
    if next(ref_model.parameters(), None) is next(base.parameters()):
        raise ValueError(
            "ref_model is the very model that is trained, so it would change with it. Leave it out: the trainer makes "
            "its own reference."
        )
    different = different_parameters(base, ref_model)
    if different:
        raise ValueError(
            f"ref_model ({type(ref_model).__name__}) has another architecture than the trained "
            f"{type(base).__name__}: {len(different)} parameters differ, first {different[0]}. Pass a model of the "
            "same architecture."
        )
    return ref_model

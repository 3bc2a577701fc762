"""A pipeline that was passed, or one that is loaded by its name for sampling."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from ..families import Family, family_named
from ..host_libraries import dtype_option, dtypes_of_torch, quiet_loading


def family_by_name(pipeline: str | os.PathLike[str], model_init_kwargs: Mapping[str, Any]) -> Family:
    """The family of a folder or Hub id, from the pipeline's index alone: no weights are read.

    Raises:
        TypeError: No supported pipeline.
        ImportError: One that needs a package which is not installed.
        OSError: No pipeline of this name.
    """
    names = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")
    index = DiffusionPipeline.load_config(
        pipeline, **{name: value for name, value in model_init_kwargs.items() if name in names}
    )
    return family_named(index["_class_name"])


def loaded_pipeline(
    pipeline: str | os.PathLike[str] | DiffusionPipeline,
    model_init_kwargs: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
) -> DiffusionPipeline:
    """A pipeline as it is, or loaded from a folder or the Hub and moved to a device.

    Args:
        pipeline: Hub id, folder or loaded pipeline.
        model_init_kwargs: Arguments of `from_pretrained`; weights are float32 unless it says otherwise.
        device: Default: this process's accelerator, or the CPU.

    Raises:
        ValueError: Options for a pipeline that is loaded already.
        TypeError, ImportError, OSError: See `family_by_name`.
    """
    if isinstance(pipeline, DiffusionPipeline):
        if model_init_kwargs or device is not None:
            raise ValueError(
                "model_init_kwargs and device are for a pipeline given by name, but a loaded one was passed."
            )
        return pipeline
    options = dtypes_of_torch(model_init_kwargs or {})
    dtype = options.pop("dtype", None) or options.pop("torch_dtype", None) or torch.float32
    family_by_name(pipeline, options)
    with quiet_loading():
        loaded = DiffusionPipeline.from_pretrained(pipeline, **dtype_option(dtype), **options)
    return loaded.to(device or PartialState().device)

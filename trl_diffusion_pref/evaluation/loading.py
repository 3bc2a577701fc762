"""A pipeline that was passed, or one that is loaded by its name for sampling."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from ..host_libraries import dtype_option, dtypes_of_torch, quiet_loading


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
    """
    if isinstance(pipeline, DiffusionPipeline):
        if model_init_kwargs or device is not None:
            raise ValueError(
                "model_init_kwargs and device are for a pipeline given by name, but a loaded one was passed."
            )
        return pipeline
    options = dtypes_of_torch(model_init_kwargs or {})
    dtype = options.pop("dtype", None) or options.pop("torch_dtype", None) or torch.float32
    with quiet_loading():
        loaded = DiffusionPipeline.from_pretrained(pipeline, **dtype_option(dtype), **options)
    return loaded.to(device or PartialState().device)

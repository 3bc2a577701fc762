"""The pipeline that a trainer's `model` stands for, and what it is called on the Hub."""

import os
from typing import Any

import torch
from diffusers import DiffusionPipeline


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


def hub_id(model: str | os.PathLike | DiffusionPipeline) -> str | None:
    """The base's Hub id; None where it came from a local folder."""
    name = str(model) if isinstance(model, (str, os.PathLike)) else getattr(model, "name_or_path", None)
    return name if name and not os.path.isdir(name) else None

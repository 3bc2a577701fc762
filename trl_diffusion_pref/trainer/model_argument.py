"""The pipeline that a trainer's `model` stands for, and what it is called on the Hub."""

import os
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


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
    """The base's Hub id; None where it came from a local folder, also one that is gone by now."""
    name = str(model) if isinstance(model, (str, os.PathLike)) else getattr(model, "name_or_path", None)
    if not name or os.path.isdir(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name

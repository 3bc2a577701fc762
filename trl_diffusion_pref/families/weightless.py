"""Pipelines without weights, for what depends on sizes alone."""

import inspect
import os
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .base import Family
from .records import PartConfig


# Options of some pipelines that would warn or ask for a package.
_QUIET = {"requires_safety_checker": False, "add_watermarker": False}


def pipeline_from_configs(
    source: str | os.PathLike, *, dtype: torch.dtype = torch.float32, **where: Any
) -> DiffusionPipeline:
    """The pipeline of a folder or Hub id, from its configs alone.

    Args:
        dtype: Of the denoiser and the VAE.
        where: `revision`, `cache_dir`, `token` or `local_files_only`, as `from_pretrained` takes them.

    Returns:
        The pipeline's class with diffusers' models on the meta device, the scheduler, and stand-ins for the rest: a
        model of transformers has only its `config`, a tokenizer only its `model_max_length`.

    Raises:
        TypeError: diffusers has no pipeline of this class.
    """
    index = DiffusionPipeline.load_config(source, **where)
    parts = {
        name: _part(source, name, value, dtype, where) if isinstance(value, (list, tuple)) else value
        for name, value in index.items()
        if not name.startswith("_")
    }
    return _assemble(index["_class_name"], parts)


def pipeline_around(family: Family, denoiser: nn.Module) -> DiffusionPipeline:
    """A pipeline that has a denoiser, as it is, and otherwise the sizes of the published one (`published_parts`).

    Raises:
        TypeError: diffusers has no pipeline of the family's class.
    """
    return _assemble(family.pipeline_class, {**family.published_parts(), family.denoiser_name: denoiser})


def _assemble(pipeline_class: str, parts: dict[str, Any]) -> DiffusionPipeline:
    kind = getattr(diffusers, pipeline_class, None)
    if kind is None:
        raise TypeError(
            f"diffusers has no {pipeline_class}, so it cannot be made from configs. Pass the loaded pipeline."
        )
    parameters = inspect.signature(kind.__init__).parameters.values()
    required = {part.name: None for part in parameters if part.default is part.empty and part.name != "self"}
    known = {part.name for part in parameters}
    options = {**required, **parts, **_QUIET}
    return kind(**{name: value for name, value in options.items() if name in known})


def _part(source: str | os.PathLike, name: str, entry: Any, dtype: torch.dtype, where: dict[str, Any]) -> Any:
    """What stands in for one part of the pipeline; `entry` is its [library, class] in model_index.json."""
    library, class_name = entry
    if class_name is None:
        return None
    if name.startswith("tokenizer"):
        length = get_tokenizer_config(source, subfolder=name, **where).get("model_max_length")
        return PartConfig(model_max_length=length)
    # Libraries other than transformers are diffusers or the folder of one of its pipelines.
    kind: Any = getattr(transformers if library == "transformers" else diffusers, class_name, None)
    if kind is None:
        return None
    if issubclass(kind, PreTrainedModel):
        return PartConfig(config=kind.config_class.from_pretrained(source, subfolder=name, **where))
    if issubclass(kind, SchedulerMixin):
        return kind.from_pretrained(source, subfolder=name, **where)
    if issubclass(kind, ModelMixin):
        with torch.device("meta"):
            model = kind.from_config(kind.load_config(source, subfolder=name, **where))
        # Buffers that are computed from arrays are elsewhere. diffusers' to() warns where nothing is kept in float32.
        return nn.Module.to(model, "meta", dtype)
    return None

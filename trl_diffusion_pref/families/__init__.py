"""Model families: which pipelines can be trained, looked up by class name."""

from diffusers import DiffusionPipeline
from torch import nn

from .base import Family
from .stable_diffusion import StableDiffusionFamily


__all__ = ["Family", "family_for", "supported_pipelines"]

_FAMILIES: dict[str, Family] = {family.pipeline_class: family for family in (StableDiffusionFamily(),)}


def supported_pipelines() -> tuple[str, ...]:
    """Class names of the pipelines that can be trained, sorted."""
    return tuple(sorted(_FAMILIES))


def family_for(pipeline: DiffusionPipeline) -> Family:
    """The family of a loaded pipeline.

    Raises:
        TypeError: Not a pipeline, or one of an unsupported class; the message lists the supported ones.
    """
    supported = ", ".join(supported_pipelines())
    if isinstance(pipeline, nn.Module):
        raise TypeError(
            f"model is a {type(pipeline).__name__} alone, which says nothing about the VAE, text encoder and "
            "scheduler that training needs. Pass the whole pipeline (loaded, a folder or a Hub id); supported: "
            f"{supported}."
        )
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(
            f"model is a {type(pipeline).__name__}, not a diffusers pipeline. Pass a Hub id, a folder or a loaded "
            f"pipeline of one of these classes: {supported}."
        )
    family = _FAMILIES.get(type(pipeline).__name__)
    if family is None:
        raise TypeError(
            f"{type(pipeline).__name__} is not supported. Supported pipelines: {supported}. If the weights fit one of "
            "these classes, load them through it."
        )
    return family

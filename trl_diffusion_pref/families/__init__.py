"""Model families: which pipelines can be trained, looked up by class name.

Families outside the package come in by `register_family`, or through an entry point:

    [project.entry-points."trl_diffusion_pref.families"]
    my_family = "my_package.my_module:MyFamily"
"""

from functools import cache
from importlib.metadata import entry_points

from diffusers import DiffusionPipeline
from torch import nn

from .audioldm2 import AudioLDM2Family
from .base import AudioFamily, Family, VideoFamily
from .cogvideox import CogVideoXFamily
from .flux import FluxFamily
from .pixart_sigma import PixArtSigmaFamily
from .qwen_image import QwenImageFamily
from .sana import SanaFamily
from .stable_audio import StableAudioFamily
from .stable_diffusion import StableDiffusionFamily
from .stable_diffusion_3 import StableDiffusion3Family
from .stable_diffusion_xl import StableDiffusionXLFamily
from .wan import WanFamily


__all__ = [
    "AudioFamily",
    "Family",
    "VideoFamily",
    "family_for",
    "family_named",
    "register_family",
    "supported_pipelines",
]

_ENTRY_POINT_GROUP = "trl_diffusion_pref.families"

_FAMILIES: dict[str, Family] = {
    family.pipeline_class: family
    for family in (
        StableDiffusionFamily(),
        StableDiffusionXLFamily(),
        StableDiffusion3Family(),
        FluxFamily(),
        PixArtSigmaFamily(),
        SanaFamily(),
        QwenImageFamily(),
        WanFamily(),
        CogVideoXFamily(),
        StableAudioFamily(),
        AudioLDM2Family(),
    )
}

_HOW_TO_REGISTER = (
    "For another pipeline, subclass trl_diffusion_pref.families.Family and pass an instance to "
    f"trl_diffusion_pref.families.register_family, or name the class in the entry point group {_ENTRY_POINT_GROUP!r}."
)


def register_family(family: Family) -> None:
    """Makes a family known, so that trainers take its pipelines.

    Registering the same class again replaces the first instance.

    Raises:
        TypeError: Not an instance of `Family`, or one that does not set its attributes.
        ValueError: Another family serves this pipeline class already.
    """
    if not isinstance(family, Family):
        what = f"the class {family.__name__}" if isinstance(family, type) else f"a {type(family).__name__}"
        raise TypeError(
            f"register_family got {what}, not an instance of a subclass of trl_diffusion_pref.families.Family."
        )
    kind = type(family)
    missing = [name for name in Family.__annotations__ if not hasattr(family, name)]
    if missing:
        raise TypeError(f"The family {kind.__name__} does not set {', '.join(missing)}; see Family's attributes.")
    known = _FAMILIES.get(family.pipeline_class)
    # By name, since a module that is loaded again makes another class of the same name.
    if known is not None and _full_name(type(known)) != _full_name(kind):
        raise ValueError(
            f"{_full_name(kind)} and {_full_name(type(known))} both serve {family.pipeline_class}. Remove one of "
            "them, or give the pipeline a class of its own."
        )
    _FAMILIES[family.pipeline_class] = family


def supported_pipelines() -> tuple[str, ...]:
    """Class names of the pipelines that can be trained, sorted."""
    _register_entry_points()
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
    return family_named(type(pipeline).__name__)


def family_named(pipeline_class: str) -> Family:
    """The family of a class of pipelines.

    Raises:
        TypeError: An unsupported class; the message lists the supported ones.
    """
    supported = ", ".join(supported_pipelines())
    family = _FAMILIES.get(pipeline_class)
    if family is None:
        raise TypeError(
            f"{pipeline_class} is not supported. Supported pipelines: {supported}. If the weights fit one of "
            f"these classes, load them through it. {_HOW_TO_REGISTER}"
        )
    return family


@cache
def _register_entry_points() -> None:
    # At the first lookup, so that importing this package imports no other; what raises is tried again.
    for entry_point in entry_points(group=_ENTRY_POINT_GROUP):
        where = f"The entry point {entry_point.name} = {entry_point.value} of the group {_ENTRY_POINT_GROUP}"
        if entry_point.dist is not None:
            where += f" (package {entry_point.dist.name})"
        try:
            family = entry_point.load()
        except Exception as error:
            raise ImportError(f"{where} cannot be loaded: {error}. Repair or uninstall it.") from error
        try:
            register_family(family() if isinstance(family, type) and issubclass(family, Family) else family)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{where} gives no family: {error} Repair or uninstall it.") from error


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

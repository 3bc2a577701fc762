"""Model families: which pipelines can be trained, looked up by class name.

Families outside the package come in by `register_family`, or through an entry point:

    [project.entry-points."trl_diffusion_pref.families"]
    my_family = "my_package.my_module:MyFamily"
"""

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

import diffusers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import DummyObject, requires_backends
from torch import nn

from ..host_libraries import quiet_imports
from .base import Family, InputShapes, Recommended
from .modalities import AudioFamily, VideoFamily
from .nearest import nearest_family, nearest_first


__all__ = [
    "AudioFamily",
    "Family",
    "InputShapes",
    "Recommended",
    "VideoFamily",
    "all_families",
    "family_for",
    "family_named",
    "family_of_denoiser",
    "register_family",
    "supported_pipelines",
]

_ENTRY_POINT_GROUP = "trl_diffusion_pref.families"

# Pipeline, the first diffusers version that has it, file and class of its family.
_BUILT_IN = (
    ("StableDiffusionPipeline", "0.37", "stable_diffusion", "StableDiffusionFamily"),
    ("StableDiffusionInstructPix2PixPipeline", "0.37", "instruct_pix2pix", "InstructPix2PixFamily"),
    ("StableDiffusionInpaintPipeline", "0.37", "stable_diffusion_inpaint", "StableDiffusionInpaintFamily"),
    ("StableDiffusionXLPipeline", "0.37", "stable_diffusion_xl", "StableDiffusionXLFamily"),
    ("StableDiffusionXLInpaintPipeline", "0.37", "stable_diffusion_xl_inpaint", "StableDiffusionXLInpaintFamily"),
    ("KolorsPipeline", "0.37", "kolors", "KolorsFamily"),
    ("StableDiffusion3Pipeline", "0.37", "stable_diffusion_3", "StableDiffusion3Family"),
    ("FluxPipeline", "0.37", "flux", "FluxFamily"),
    ("FluxFillPipeline", "0.37", "flux_fill", "FluxFillFamily"),
    ("FluxKontextPipeline", "0.37", "flux_kontext", "FluxKontextFamily"),
    ("Flux2KleinPipeline", "0.37", "flux2", "Flux2KleinFamily"),
    ("Flux2Pipeline", "0.37", "flux2", "Flux2Family"),
    ("PixArtSigmaPipeline", "0.37", "pixart_sigma", "PixArtSigmaFamily"),
    ("SanaPipeline", "0.37", "sana", "SanaFamily"),
    ("QwenImagePipeline", "0.37", "qwen_image", "QwenImageFamily"),
    ("QwenImageEditPipeline", "0.37", "qwen_image_edit", "QwenImageEditFamily"),
    ("QwenImageEditPlusPipeline", "0.37", "qwen_image_edit", "QwenImageEditPlusFamily"),
    ("ChromaPipeline", "0.37", "chroma", "ChromaFamily"),
    ("AuraFlowPipeline", "0.37", "auraflow", "AuraFlowFamily"),
    ("Lumina2Pipeline", "0.37", "lumina2", "Lumina2Family"),
    ("ZImagePipeline", "0.37", "z_image", "ZImageFamily"),
    ("CogView4Pipeline", "0.37", "cogview4", "CogView4Family"),
    ("HiDreamImagePipeline", "0.37", "hidream_image", "HiDreamImageFamily"),
    ("WanPipeline", "0.37", "wan", "WanFamily"),
    ("LTXPipeline", "0.37", "ltx", "LTXFamily"),
    ("HunyuanVideoPipeline", "0.37", "hunyuan_video", "HunyuanVideoFamily"),
    ("HunyuanVideo15Pipeline", "0.37", "hunyuan_video15", "HunyuanVideo15Family"),
    ("WanImageToVideoPipeline", "0.37", "wan_image_to_video", "WanImageToVideoFamily"),
    ("CogVideoXImageToVideoPipeline", "0.37", "cogvideox_image_to_video", "CogVideoXImageToVideoFamily"),
    ("CogVideoXPipeline", "0.37", "cogvideox", "CogVideoXFamily"),
    ("AceStepPipeline", "0.39", "ace_step", "AceStepFamily"),
    ("StableAudioPipeline", "0.37", "stable_audio", "StableAudioFamily"),
    ("AudioLDM2Pipeline", "0.37", "audioldm2", "AudioLDM2Family"),
)


def _load_built_in(rows: Iterable[tuple[str, str, str, str]]) -> tuple[dict[str, Family], dict[str, str]]:
    """The families whose pipelines the installed diffusers has, and by pipeline the version that the others need."""
    families, missing = {}, {}
    for pipeline_class, version, module, name in rows:
        if hasattr(diffusers, pipeline_class):
            families[pipeline_class] = getattr(import_module(f"{__name__}.{module}"), name)()
        else:
            missing[pipeline_class] = version
    return families, missing


with quiet_imports():
    _FAMILIES, _MISSING = _load_built_in(_BUILT_IN)

_HOW_TO_REGISTER = (
    "and pass an instance to trl_diffusion_pref.families.register_family, or name the class in the entry point group "
    f"{_ENTRY_POINT_GROUP!r}; docs/extending.md has an example."
)


def register_family(family: Family) -> None:
    """Registers a family, so that trainers take its pipelines.

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


def all_families() -> tuple[Family, ...]:
    """Every family, in the order in which they were registered."""
    _register_entry_points()
    return tuple(_FAMILIES.values())


def supported_pipelines() -> tuple[str, ...]:
    """Class names of the pipelines that can be trained, sorted."""
    return tuple(sorted(family.pipeline_class for family in all_families()))


def editing_pipelines(family: Family) -> str:
    """The pipelines that take condition images, in words, the nearest to a family that takes none first."""
    editing = [each for each in all_families() if each.condition_images]
    ordered = nearest_first(family.pipeline_class, {family.denoiser_class}, editing)
    names = ", ".join(each.pipeline_class for each in ordered)
    if ordered and family.denoiser_class and ordered[0].denoiser_class == family.denoiser_class:
        first, *others = names.split(", ", maxsplit=1)
        names = f"{first}, whose {family.denoiser_name} is a {family.denoiser_class} too"
        names += "".join(f", or {other}" for other in others)
    return names


def family_for(pipeline: DiffusionPipeline) -> Family:
    """The family of a loaded pipeline.

    Raises:
        TypeError: Not a pipeline, or one of an unsupported class; the message says what is nearest, and lists the
            supported ones.
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
    return family_named(type(pipeline).__name__, type(pipeline))


def family_named(pipeline_class: str, kind: type | None = None) -> Family:
    """The family of a class of pipelines.

    Args:
        pipeline_class: The class's name.
        kind: The class, by which an error finds the nearest supported one. Default: diffusers' class of this name.

    Raises:
        TypeError: An unsupported class; the message says what is nearest, and lists the supported ones. Or one that
            the installed diffusers does not have; the message names the version that has it.
        ImportError: One that needs a package which is not installed.
    """
    supported = ", ".join(supported_pipelines())
    family = _FAMILIES.get(pipeline_class)
    kind = kind or getattr(diffusers, pipeline_class, None)
    if family is not None and isinstance(kind, DummyObject):
        # Stands in for the class, and fails in other words where a pipeline is loaded.
        requires_backends(kind, kind._backends)
    if family is None and pipeline_class in _MISSING:
        raise TypeError(
            f"{pipeline_class} needs diffusers >= {_MISSING[pipeline_class]}, but {diffusers.__version__} is "
            "installed. Upgrade it: pip install --upgrade diffusers."
        )
    if family is None:
        near = nearest_family(pipeline_class, kind, all_families())
        if near is None:
            advice = f"To train it all the same, subclass trl_diffusion_pref.families.Family {_HOW_TO_REGISTER}"
        else:
            name, own = near[0].pipeline_class, type(near[0])
            advice = (
                f"The nearest of them is {name}: {near[1]}. If the weights fit it, load them through it: "
                f"{name}.from_pretrained(...). If {pipeline_class} calls its {near[0].denoiser_name} in the same way, "
                f"subclass {_full_name(own)} with pipeline_class = {pipeline_class!r}, else "
                f"trl_diffusion_pref.families.Family, {_HOW_TO_REGISTER}"
            )
        raise TypeError(f"{pipeline_class} is not supported. Supported pipelines: {supported}. {advice}")
    return family


def family_of_denoiser(denoiser: nn.Module) -> Family:
    """The family of a denoiser that comes without its pipeline, possibly wrapped (PEFT).

    Raises:
        TypeError: No family has a denoiser of this class; the message lists the classes.
    """
    inside = next((module for module in denoiser.modules() if isinstance(module, ModelMixin)), None)
    for family in all_families():
        if inside is not None and family.takes_denoiser(inside):
            return family
    known = sorted({family.denoiser_class for family in all_families()} - {""})
    raise TypeError(
        f"No family has a denoiser of the class {type(inside or denoiser).__name__}. Pass its pipeline, or a denoiser "
        f"of one of these classes: {', '.join(known)}."
    )


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

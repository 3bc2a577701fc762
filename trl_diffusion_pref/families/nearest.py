"""Which supported pipelines are nearest to one that cannot do what is asked, and why, for messages."""

import difflib
import inspect
import re
from collections.abc import Collection, Iterable

from .base import Family


# Names that have less in common are not alike; 0.6 is what difflib takes for a close match.
_ALIKE = 0.6


def nearest_family(pipeline_class: str, kind: type | None, families: Iterable[Family]) -> tuple[Family, str] | None:
    """The supported pipeline that is nearest to one that is not supported, and why it is.

    It is a base class of it, or one around the same class of denoiser, or one of a similar name.

    Args:
        pipeline_class: Name of the class that is not supported.
        kind: The class, where it is known.
        families: To choose from.

    Returns:
        The family and the reason in words; None if no pipeline is near.
    """
    near, parts = list(families), set[str]()
    if kind is not None:
        by_name = {family.pipeline_class: family for family in near}
        for base in kind.__mro__[1:]:
            if base.__name__ in by_name:
                return by_name[base.__name__], f"{pipeline_class} is derived from it"
        annotations = (each.annotation for each in inspect.signature(kind).parameters.values())
        parts = {word for each in annotations for word in re.findall(r"\w+", inspect.formatannotation(each))}
        # What takes no images is not near to what needs them.
        taken = inspect.signature(kind.__call__).parameters.keys()
        near = [each for each in near if each.condition_is_optional or taken >= {*each.condition_images}]
    ordered = nearest_first(pipeline_class, parts, near)
    if not ordered:
        return None
    first = ordered[0]
    if first.denoiser_class in parts:
        return first, f"the {first.denoiser_name} of both is a {first.denoiser_class}"
    return (first, "its name is similar") if _likeness(pipeline_class, first) >= _ALIKE else None


def nearest_first(pipeline_class: str, denoisers: Collection[str], families: Iterable[Family]) -> list[Family]:
    """Families by how near their pipelines are: of a similar name, or around one of some classes of denoisers.

    The name counts besides the denoiser, since many different pipelines have a UNet2DConditionModel.
    """
    return sorted(
        families,
        key=lambda family: 0.5 * (family.denoiser_class in denoisers) + _likeness(pipeline_class, family),
        reverse=True,
    )


def _likeness(pipeline_class: str, family: Family) -> float:
    """From 0 to 1, of what precedes "Pipeline"."""
    ours, theirs = (name.removesuffix("Pipeline") for name in (pipeline_class, family.pipeline_class))
    return difflib.SequenceMatcher(None, ours, theirs).ratio()

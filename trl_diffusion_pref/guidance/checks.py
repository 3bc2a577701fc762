"""What keeps a pipeline from being guided by a negative model."""

import inspect
import logging
from collections.abc import Mapping

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..families.base import GuidanceLayout
from ..fingerprint import has_weights_of
from .sources import Negative, families, guided_family


# Not accelerate's logger, which needs an accelerator to exist.
logger = logging.getLogger(__name__)
# Of a guided denoiser's attribute that holds its guidance.
MARK = "_negative_guidance"


def known_layout(pipeline: DiffusionPipeline) -> GuidanceLayout:
    """How a pipeline calls its denoiser for guidance.

    Raises:
        ValueError: It is not known.
    """
    family = guided_family(pipeline)
    if family is not None and family.guidance_layout is not None:
        return family.guidance_layout
    known = [each for each in families() if each.guidance_layout is not None]
    names = sorted(name for each in known for name in (each.pipeline_class, *each.guided_pipelines))
    raise ValueError(
        f"It is not known how a {type(pipeline).__name__} calls its denoiser for guidance; known are "
        f"{', '.join(names)}. Look into its __call__ and pass batches_both_sides=True where one call gets [negative; "
        'positive] stacked, or False where each side has a call of its own within cache_context("cond") and '
        'cache_context("uncond"), or the negative one with its variable negative_prompt_embeds.'
    )


def check_guidable(pipeline: DiffusionPipeline, name: str) -> None:
    """Raises for a denoiser, the pipeline's attribute `name`, that cannot be guided by a negative model.

    Raises:
        ValueError: It is wrapped, guided already, distilled to sample without guidance, or caches its steps.
    """
    denoiser, kind = getattr(pipeline, name), type(pipeline).__name__
    if not isinstance(denoiser, ModelMixin):
        raise ValueError(
            f"The pipeline's {name} is wrapped in a {type(denoiser).__name__}. Put the model itself there: "
            "PeftModel.get_base_model() keeps the adapter in it; compile after the guidance was added, or not at all."
        )
    if hasattr(denoiser, MARK):
        raise ValueError("This pipeline has a negative model already. Call remove() on it first.")
    parameters, family = inspect.signature(type(pipeline).__call__).parameters, guided_family(pipeline)
    # Some families have guidance against a learned embedding instead of a negative prompt.
    guides = "negative_prompt" in parameters or (family is not None and family.guidance_layout is not None)
    distilled = denoiser.config.get("time_cond_proj_dim") is not None or pipeline.config.get("is_distilled", False)
    if distilled or not guides:
        raise ValueError(
            f"This {kind} has no classifier-free guidance (its denoiser is distilled to sample without), so there is "
            "no negative side. Use the model that it was distilled from."
        )
    if getattr(denoiser, "is_cache_enabled", False):
        raise ValueError(
            "The denoiser caches what it computed at earlier steps, which the two sides would share. Call "
            f"pipeline.{name}.disable_cache() first."
        )
    if family is None and getattr(pipeline, f"{name}_2", None) is not None:
        raise ValueError(f"This {kind} has two {name}s, and it is not known which of them a negative model is for.")
    if "true_cfg_scale" in parameters:
        logger.warning(
            f"In a {kind} guidance_scale is an input of a distilled denoiser. The negative model acts only where you "
            "pass true_cfg_scale above 1 and a negative_prompt."
        )


def warn_of_another_base(denoisers: Mapping[str, nn.Module], name: str, negative: Negative) -> None:
    """Warns where a negative model was trained from other weights than the base's.

    Args:
        denoisers: The base's, by the pipeline's attributes.
        name: Of the base.
    """
    record = negative.record or {}
    if not record.get("base_fingerprint_rounded"):
        return
    names = record.get("denoisers", [negative.attribute])
    # Several were trained as one module, in which each has its name as prefix.
    trained = denoisers[names[0]] if len(names) == 1 else nn.ModuleDict({name: denoisers[name] for name in names})
    if not has_weights_of(trained, record):
        logger.warning(
            f"The negative model {negative.name} was trained from {record['base_model'] or 'a local pipeline'} "
            f"(fingerprint {record['base_fingerprint']}), and the pipeline is {name}, whose weights differ. Pass "
            "base= where the pipeline was tuned from that model; else expect poor images."
        )

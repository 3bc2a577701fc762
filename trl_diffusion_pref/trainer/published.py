"""Hyper-parameters that differ from model to model, with where they come from."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """Values of options for one algorithm and pipeline.

    Args:
        values: By the option's name.
        source: Where they were published, or that they were not.
    """

    values: dict[str, Any]
    source: str


_RELEASED_SELF_NPO = "released Self-NPO code (arXiv 2505.11777)"
# By algorithm, then by pipeline class; None stands for every other pipeline.
PUBLISHED: dict[str, dict[str | None, Published]] = {
    "Self-NPO": {
        "StableDiffusionPipeline": Published(
            {"learning_rate": 1e-6, "weight_decay": 1e-3, "guidance_scale": 0.0}, _RELEASED_SELF_NPO
        ),
        "StableDiffusionXLPipeline": Published(
            {"learning_rate": 1e-7, "weight_decay": 0.0, "guidance_scale": -4.0}, _RELEASED_SELF_NPO
        ),
        None: Published(
            {"learning_rate": 1e-6, "weight_decay": 1e-3, "guidance_scale": 0.0},
            "no published values; those of Stable Diffusion 1.5",
        ),
    },
}


def published(algorithm: str, pipeline_class: str) -> Published:
    """What is known for one algorithm and pipeline; empty where the algorithm's options do not depend on the model."""
    table = PUBLISHED.get(algorithm, {})
    return table.get(pipeline_class) or table.get(None) or Published({}, "the same for all models")

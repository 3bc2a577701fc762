"""Default hyper-parameters that differ from model to model, with where they come from.

Published values stand in the families (`Family.recommended`); here is what is taken where nothing was published.
docs/hyperparameters.md is what `hyperparameters_page` returns; `make docs` writes it.
"""

from collections.abc import Mapping
from typing import Any

from ..families import Family, Recommended, all_families
from ..families.base import Modality


# Rows of the page for families that are registered from outside.
OTHER, OTHER_FLOW, OTHER_AUDIO = "other pipelines", "other flow models", "other audio models"

# For algorithms that say nothing of their own.
_GENERAL = {"learning_rate": 1e-5, "weight_decay": 0.01}


def _not_published(values: Mapping[str, float], model: str, why: str = "") -> Recommended:
    return Recommended(values, f"no published values; those of {model}{why}")


# Values for families without published ones: by the trainers' names of the algorithms, then by kind of model.
FALLBACKS: dict[str, dict[str, Recommended]] = {
    "MaPO": {OTHER: _not_published({"learning_rate": 1e-5}, "SDXL")},
    "Diffusion-DPO": {
        OTHER: _not_published({"beta": 5000.0, "learning_rate": 2e-5}, "Stable Diffusion 1.5"),
        OTHER_FLOW: _not_published({"beta": 100.0, "learning_rate": 1e-5}, "Stable Diffusion 3.5"),
        OTHER_AUDIO: _not_published(
            {"beta": 2000.0, "learning_rate": 9.6e-7},
            "Tango 2 (arXiv 2404.09956)",
            ", the nearest audio model, at 32 pairs a step",
        ),
    },
    "RankDPO": {
        OTHER: _not_published({"beta": 5000.0, "learning_rate": 2e-5}, "Diffusion-DPO for Stable Diffusion 1.5"),
        OTHER_FLOW: _not_published({"beta": 100.0, "learning_rate": 1e-5}, "Diffusion-DPO for Stable Diffusion 3.5"),
        OTHER_AUDIO: _not_published(
            {"beta": 2000.0, "learning_rate": 9.6e-7}, "Tango 2 (arXiv 2404.09956), a Diffusion-DPO of audio"
        ),
    },
    "Self-NPO": {
        OTHER: _not_published(
            {"learning_rate": 1e-6, "weight_decay": 1e-3, "guidance_scale": 0.0}, "Stable Diffusion 1.5"
        )
    },
    "Diffusion-KTO": {
        OTHER: _not_published({"beta": 5000.0, "learning_rate": 1e-7}, "Stable Diffusion 1.5"),
        OTHER_FLOW: _not_published(
            {"beta": 50.0, "learning_rate": 1e-5},
            "Diffusion-DPO on Stable Diffusion 3.5",
            ", whose beta of 100 has a factor 1/2",
        ),
        OTHER_AUDIO: _not_published(
            {"beta": 1000.0, "learning_rate": 9.6e-7},
            "Diffusion-DPO on audio models",
            ", whose beta of 2000 has a factor 1/2",
        ),
    },
    "Diffusion-SFT": {
        OTHER: Recommended(
            {"learning_rate": 1e-5},
            "ours: MaPO's; the paper of Diffusion-DPO (arXiv 2311.12908) prints 1e-9 for its comparison",
        )
    },
    "Flow-RWR": {OTHER: _not_published({"learning_rate": 5e-6}, "the paper's video model")},
    "DiffusionNFT": {OTHER: Recommended({"learning_rate": 1e-5}, "ours: MaPO's; LoRAs take several times as much")},
}


def fallback(algorithm: str, *, flow: bool, modality: Modality) -> Recommended:
    """The values of the nearest model that has published ones; empty for algorithms without any."""
    table = FALLBACKS.get(algorithm)
    if table is None:
        return Recommended({}, "the same for all models")
    kinds = [OTHER_AUDIO] * (modality == "audio") + [OTHER_FLOW] * flow + [OTHER]
    return next(table[kind] for kind in kinds if kind in table)


def published(algorithm: str, family: Family, *, flow: bool = False) -> Recommended:
    """What is known for one algorithm and family.

    Args:
        algorithm: As the trainers name it, such as "Diffusion-DPO".
        flow: Whether the model is a rectified flow, for families that do not say so.
    """
    own = family.recommended.get(algorithm)
    return own or fallback(algorithm, flow=flow or family.flow, modality=family.modality)


def fill_in(options: Any, algorithm: str, family: Family, *, flow: bool) -> None:
    """Gives the options that depend on the model, and that the user left out, the model's values.

    Args:
        options: A config; options that were left out are None.
        algorithm, family, flow: See `published`.
    """
    for name, value in recommended(algorithm, family, flow=flow).items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def recommended(algorithm: str, family: Family, *, flow: bool) -> dict[str, float]:
    """By option, what it has for a model where the user leaves it out; see `published`."""
    return {**_GENERAL, **published(algorithm, family, flow=flow).values}


_INTRODUCTION = """\
# Default hyper-parameters by model

Options that depend on the model are None in the configs. A trainer fills them in once it has the pipeline, unless you
set them, and the model card shows what was used. All other defaults are the same for every model: see the configs'
docstrings. Where nothing was published for a model, the table says whose values it takes; try those on a short run
first. `learning_rate` is used as it stands, whatever the batch; `beta` is in the convention of
[diffusion_dpo.md](diffusion_dpo.md#beta-in-other-conventions).

`make docs` writes this page from `recommended` of each family in `trl_diffusion_pref/families/` and from
`trl_diffusion_pref/training/recommended.py`, which the trainers read; a test holds them equal.
"""


def hyperparameters_page() -> str:
    """docs/hyperparameters.md: Markdown with one table per algorithm and one row per pipeline."""
    sections = [_INTRODUCTION]
    for algorithm in FALLBACKS:
        others = {
            OTHER: fallback(algorithm, flow=False, modality="image"),
            OTHER_FLOW: fallback(algorithm, flow=True, modality="image"),
            OTHER_AUDIO: fallback(algorithm, flow=False, modality="audio"),
        }
        options = list(others[OTHER].values)
        lines = [f"## {algorithm}\n", _row(["pipeline", *(f"`{name}`" for name in options), "source"])]
        lines.append("|" + "---|" * (len(options) + 2))
        rows = {f"`{family.pipeline_class}`": published(algorithm, family) for family in all_families()} | others
        for name, entry in rows.items():
            lines.append(_row([name, *(_number(entry.values[option]) for option in options), entry.source]))
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float) -> str:
    """As people write it: 1e-5, not 1e-05."""
    return f"{value:g}".replace("e-0", "e-")

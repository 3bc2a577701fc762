"""Default hyper-parameters that differ from model to model, with where they come from.

docs/hyperparameters.md is what `hyperparameters_page` returns; `make docs` writes it.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """Values of options for one algorithm and pipeline.

    Args:
        values: By the option's name.
        source: Where they were published, or that they were not and whose they are.
    """

    values: dict[str, Any]
    source: str


# Rows for pipelines that are registered from outside.
OTHER, OTHER_FLOW = "other pipelines", "other flow models"


def _not_published(like: Published, model: str) -> Published:
    return Published(like.values, f"no published values; those of {model}")


# One pipeline class serves both.
_ONLY_SD15 = "; for Stable Diffusion 1.5, and nothing was published for 2.x"

_MAPO_SDXL = Published(
    {"learning_rate": 1e-5},
    "released code's README (arXiv 2406.06424), constant, full and LoRA; the paper's second version has 1e-7, cosine, "
    "at 2,048 pairs a step",
)
_MAPO_AS_SDXL = _not_published(_MAPO_SDXL, "SDXL")

_DPO_RELEASED = Published(
    {"beta": 5000.0, "learning_rate": 2e-5},
    "released code (arXiv 2311.12908): 1e-8 times 2,048 pairs a step, 2.048e-5",
)
_DPO_SD15 = Published(_DPO_RELEASED.values, f"{_DPO_RELEASED.source}{_ONLY_SD15}")
_DPO_AS_SD15 = _not_published(_DPO_RELEASED, "Stable Diffusion 1.5")
# flow_grpo's own rate belongs to a LoRA in its setting; a default should be one that others found to hold.
_DPO_SD35 = Published(
    {"beta": 100.0, "learning_rate": 1e-5},
    "beta: flow_grpo's code for SD 3.5 medium; learning rate: Flow-Factory, which reports that 1e-4 to 3e-4 collapse "
    "(flow_grpo has 3e-4, for a LoRA of rank 32)",
)
_DPO_AS_SD35 = _not_published(_DPO_SD35, "Stable Diffusion 3.5")
_DPO_VIDEO_FLOW = Published(
    {"beta": 500.0, "learning_rate": 5e-6},
    "Flow-DPO's paper (arXiv 2501.13918, Table 10), for a video model: LoRA of rank 64, 64 pairs a step",
)
_DPO_AS_TANGO_2 = Published(
    {"beta": 2000.0, "learning_rate": 9.6e-7},
    "no published values; those of Tango 2 (arXiv 2404.09956), the nearest audio model, at 32 pairs a step",
)

_SELF_NPO_SD15 = Published(
    {"learning_rate": 1e-6, "weight_decay": 1e-3, "guidance_scale": 0.0},
    f"released Self-NPO code (arXiv 2505.11777), at 20 images a step and GPU{_ONLY_SD15}",
)
_SELF_NPO_SDXL = Published(
    {"learning_rate": 1e-7, "weight_decay": 0.0, "guidance_scale": -4.0},
    "released Self-NPO code (arXiv 2505.11777), at 10 images a step and GPU",
)
_SELF_NPO_AS_SD15 = _not_published(_SELF_NPO_SD15, "Stable Diffusion 1.5")

# By the trainers' names of the algorithms, then by pipeline class.
PUBLISHED: dict[str, dict[str, Published]] = {
    "MaPO": {
        "StableDiffusionPipeline": _MAPO_AS_SDXL,
        "StableDiffusionXLPipeline": _MAPO_SDXL,
        "PixArtSigmaPipeline": _MAPO_AS_SDXL,
        "StableDiffusion3Pipeline": _MAPO_AS_SDXL,
        "FluxPipeline": _MAPO_AS_SDXL,
        "SanaPipeline": _MAPO_AS_SDXL,
        "QwenImagePipeline": _MAPO_AS_SDXL,
        "WanPipeline": _MAPO_AS_SDXL,
        "CogVideoXPipeline": _MAPO_AS_SDXL,
        "AudioLDM2Pipeline": _MAPO_AS_SDXL,
        "StableAudioPipeline": _MAPO_AS_SDXL,
        OTHER: _MAPO_AS_SDXL,
        OTHER_FLOW: _MAPO_AS_SDXL,
    },
    "Diffusion-DPO": {
        "StableDiffusionPipeline": _DPO_SD15,
        "StableDiffusionXLPipeline": _DPO_RELEASED,
        "PixArtSigmaPipeline": _DPO_AS_SD15,
        "StableDiffusion3Pipeline": _DPO_SD35,
        "FluxPipeline": _DPO_AS_SD35,
        "SanaPipeline": _DPO_AS_SD35,
        "QwenImagePipeline": _DPO_AS_SD35,
        "WanPipeline": _DPO_VIDEO_FLOW,
        # Predicts v under a variance-preserving process, so Flow-DPO's values for video are not for it.
        "CogVideoXPipeline": _DPO_AS_SD15,
        "AudioLDM2Pipeline": _DPO_AS_TANGO_2,
        "StableAudioPipeline": _DPO_AS_TANGO_2,
        OTHER: _DPO_AS_SD15,
        OTHER_FLOW: _DPO_AS_SD35,
    },
    "Self-NPO": {
        "StableDiffusionPipeline": _SELF_NPO_SD15,
        "StableDiffusionXLPipeline": _SELF_NPO_SDXL,
        "PixArtSigmaPipeline": _SELF_NPO_AS_SD15,
        "StableDiffusion3Pipeline": _SELF_NPO_AS_SD15,
        "FluxPipeline": _SELF_NPO_AS_SD15,
        "SanaPipeline": _SELF_NPO_AS_SD15,
        "QwenImagePipeline": _SELF_NPO_AS_SD15,
        "WanPipeline": _SELF_NPO_AS_SD15,
        "CogVideoXPipeline": _SELF_NPO_AS_SD15,
        "AudioLDM2Pipeline": _SELF_NPO_AS_SD15,
        "StableAudioPipeline": _SELF_NPO_AS_SD15,
        OTHER: _SELF_NPO_AS_SD15,
        OTHER_FLOW: _SELF_NPO_AS_SD15,
    },
}


def published(algorithm: str, pipeline_class: str, *, flow: bool = False) -> Published:
    """What is known for one algorithm and pipeline.

    Args:
        algorithm: As the trainers name it, such as "Diffusion-DPO".
        pipeline_class: Name of the diffusers class.
        flow: Whether the model is a flow, for pipelines that are not in the table.

    Returns:
        The pipeline's row, else that of other pipelines; empty for algorithms without a table.
    """
    table = PUBLISHED.get(algorithm)
    if table is None:
        return Published({}, "the same for all models")
    return table.get(pipeline_class) or table[OTHER_FLOW if flow else OTHER]


_INTRODUCTION = """\
# Default hyper-parameters by model

Options that depend on the model are None in the configs. A trainer fills them in once it has the pipeline, unless you
set them, and the model card shows what was used. All other defaults are the same for every model: see the configs'
docstrings. Where nothing was published for a model, the table says whose values it takes; try those on a short run
first. `learning_rate` is used as it stands, whatever the batch; `beta` is in the convention of
[diffusion_dpo.md](diffusion_dpo.md#beta-in-other-conventions).

`make docs` writes this page from the table in `trl_diffusion_pref/trainer/published.py`, which the trainers read; a
test holds the two equal.
"""


def fill_in(options: Any, algorithm: str, pipeline_class: str, *, flow: bool) -> None:
    """Gives the options that depend on the model, and that the user left out, the model's values.

    Args:
        options: A config; those that were left out are None.
        algorithm, pipeline_class, flow: See `published`.
    """
    for name, value in published(algorithm, pipeline_class, flow=flow).values.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def hyperparameters_page() -> str:
    """docs/hyperparameters.md: Markdown with one table per algorithm and one row per pipeline."""
    sections = [_INTRODUCTION]
    for algorithm, table in PUBLISHED.items():
        options = list(table[OTHER].values)
        lines = [f"## {algorithm}\n", _row(["pipeline", *(f"`{name}`" for name in options), "source"])]
        lines.append("|" + "---|" * (len(options) + 2))
        for pipeline, entry in table.items():
            name = pipeline if pipeline in (OTHER, OTHER_FLOW) else f"`{pipeline}`"
            lines.append(_row([name, *(_number(entry.values[option]) for option in options), entry.source]))
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float) -> str:
    """As people write it: 1e-5, not 1e-05."""
    return f"{value:g}".replace("e-0", "e-")

"""Writes the tables of models.md from what the families say: `make docs`, or `python docs/_models_page.py`.

The text around the tables is written by hand; what stands between the two comments of a table is replaced.
"""

import inspect
import json
import re
from pathlib import Path

from trl_diffusion_pref.data.decode.cell import GENERATED
from trl_diffusion_pref.families import AudioFamily, Family, all_families
from trl_diffusion_pref.shapes import pipeline_folder


PAGE = Path(__file__).parent / "models.md"

GUIDANCE = {
    "batched": "one call: negative, positive",
    "positive_first": "one call: positive, negative",
    "positive_of_three": "one call: positive, negative, negative without image",
    "separate": "two calls",
    None: "none",
}
LORA_FORMATS = {"diffusers": "`load_lora_weights`", "peft": "PEFT"}


def pipelines_table() -> str:
    """One row per pipeline: model, samples, conditions, noise process, guidance, and what was trained here."""
    embedded = embedded_pipelines()
    rows = [
        (
            f"`{family.pipeline_class}`",
            model_name(family),
            GENERATED[family.modality],
            ", ".join(conditions(family)),
            "rectified flow" if family.flow else "diffusion",
            GUIDANCE[family.guidance_layout],
            "embedded pipeline" if family.pipeline_class in embedded else "random weights",
        )
        for family in all_families()
    ]
    return table(("pipeline", "model", "generates", "conditions", "process", "guidance", "trained here"), rows)


def lora_table() -> str:
    """One row per pipeline: default targets, what loads the LoRA, and whether there is a file for kohya's scripts."""
    rows = [
        (
            f"`{family.pipeline_class}`",
            ", ".join(f"`{target}`" for target in family.lora_target_modules),
            LORA_FORMATS[family.lora_format],
            "yes" if family.kohya else "no",
        )
        for family in all_families()
    ]
    return table(("pipeline", "default LoRA targets", "LoRA loads with", "kohya and ComfyUI"), rows)


TABLES = {"pipelines": pipelines_table, "lora": lora_table}


def model_name(family: Family) -> str:
    """What stands before the colon in the first line of the docstring of the family's file.

    Raises:
        ValueError: The line has no colon, or a name of more than 40 characters.
    """
    name, colon, _ = (inspect.getdoc(inspect.getmodule(type(family))) or "").partition("\n")[0].partition(":")
    if not colon or len(name) > 40:
        raise ValueError(
            f"The first line of the docstring of {inspect.getsourcefile(type(family))} must be the model's name, a "
            f'colon and what the model is made of, such as "Flux.1: two text encoders, ...", but begins with {name!r}.'
        )
    return name


def conditions(family: Family) -> list[str]:
    """What the denoiser is conditioned on: the prompt, columns of images, and how a sample was prepared."""
    images = [f"`{column}`" for column in family.condition_images]
    least, most = int(not family.condition_is_optional), family.max_condition_images
    if images and (least, most) != (1, 1):
        images[-1] += f" ({least} to {most})"
    prepared = []
    if type(family).image_conditioning is not Family.image_conditioning:
        prepared.append("sizes and crop")
    if isinstance(family, AudioFamily) and type(family).audio_conditioning is not AudioFamily.audio_conditioning:
        prepared.append("length")
    return ["prompt", *images, *prepared]


def embedded_pipelines() -> set[str]:
    """Classes of the pipelines that the package contains."""
    folder = pipeline_folder().parent
    return {json.loads(path.read_text())["_class_name"] for path in folder.glob("*/model_index.json")}


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def models_page(text: str) -> str:
    """The page with up-to-date tables.

    Args:
        text: The page; a table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.

    Raises:
        ValueError: A table has no place in the page.
    """
    for name, make in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)"
        text, count = re.subn(
            pattern, lambda found, make=make: f"{found[1]}\n{make()}\n\n{found[2]}", text, flags=re.S
        )
        if count != 1:
            raise ValueError(f"{PAGE.name} must have one place for the table {name!r}: <!-- table: {name} -->")
    return text


if __name__ == "__main__":
    PAGE.write_text(models_page(PAGE.read_text()))

"""docs/coming_from.md: what it names as an option of this package is one, and takes the value beside it."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionKTOConfig, MaPOConfig, SelfNPOConfig
from trl_diffusion_pref.cli.run_options import DataOptions, LoraOptions, ModelOptions


PAGE = (Path(__file__).parents[1] / "docs" / "coming_from.md").read_text()
CONFIGS = {
    "What is different everywhere": (DiffusionDPOConfig, MaPOConfig, SelfNPOConfig),
    "From diffusers' Diffusion-DPO scripts": (DiffusionDPOConfig,),
    "From the authors' Diffusion-DPO script": (DiffusionDPOConfig,),
    "From MaPO's script": (MaPOConfig,),
    "From Self-NPO's scripts": (SelfNPOConfig,),
    "From Diffusion-NPO's scripts": (DiffusionDPOConfig, MaPOConfig),
    "From Diffusion-KTO's script": (DiffusionKTOConfig,),
}
OF_THE_COMMAND_LINE = {field.name for options in (DataOptions, LoraOptions, ModelOptions) for field in fields(options)}


def named_options() -> list[tuple[str, str]]:
    """(heading, option or `option=value`) of every second cell."""
    found = []
    for section in PAGE.split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        for row in re.findall(r"^\|(.*)\|$", text, flags=re.MULTILINE)[2:]:
            cells = row.split("|")
            assert len(cells) == 3, f"{heading}: the row {row} has {len(cells)} cells"
            found += [(heading, option) for option in re.findall(r"`([^`]+)`", cells[1])]
    return found


def test_every_section_has_options():
    assert {heading for heading, _ in named_options()} == set(CONFIGS)


@pytest.mark.parametrize(("heading", "option"), named_options())
def test_an_option_named_beside_a_flag_exists(heading, option, tmp_path):
    name, _, value = option.partition("=")
    if name in OF_THE_COMMAND_LINE:
        kind = next(kind for kind in (DataOptions, LoraOptions, ModelOptions) if name in kind.__dataclass_fields__)
        if value and kind is LoraOptions:
            LoraOptions(use_peft=True, **{name: ast.literal_eval(value)})
        return
    for config in CONFIGS[heading]:
        assert name in config.__dataclass_fields__, f"{config.__name__} has no option {name}"
        if value:
            config(output_dir=str(tmp_path), **{name: ast.literal_eval(value)})

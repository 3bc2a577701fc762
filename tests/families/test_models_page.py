"""docs/models.md, and the example of another pipeline in docs/extending.md, against the families."""

from pathlib import Path

import pytest
from diffusers import StableDiffusionPAGPipeline
from helpers import tiny
from helpers.pipelines import build_tiny_pipeline

from trl_diffusion_pref import MaPOConfig, MaPOTrainer, families
from trl_diffusion_pref.data.decode.cell import GENERATED
from trl_diffusion_pref.families import family_named, supported_pipelines
from trl_diffusion_pref.shapes import preference_pairs


DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "models.md").read_text()
ROWS = {
    cells[0].strip("`"): cells[1:]
    for line in PAGE.splitlines()
    if line.startswith("| `")
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}


def test_the_table_has_every_supported_pipeline():
    assert sorted(ROWS) == sorted(supported_pipelines())


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_says_what_its_family_does(name):
    family, (generates, _, targets, loads) = family_named(name), ROWS[name]
    assert generates == GENERATED[family.modality]
    assert [target.strip("`") for target in targets.split(", ")] == list(family.lora_target_modules)
    assert loads == {"diffusers": "`load_lora_weights`", "peft": "PEFT"}[family.lora_format]


def test_the_pipelines_without_load_lora_weights_are_those_of_peft():
    for name in tiny.CASES:
        kind = type(tiny.build(name))
        assert hasattr(kind, "load_lora_weights") == (family_named(kind.__name__).lora_format == "diffusers")


def test_the_example_of_another_pipeline_trains(monkeypatch, tmp_path):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    (example,) = [
        block for block in (DOCS / "extending.md").read_text().split("```python\n")[1:] if "register_family(" in block
    ]
    exec(example.split("```")[0], {})
    pipeline = StableDiffusionPAGPipeline(**build_tiny_pipeline().components)
    config = MaPOConfig(
        output_dir=str(tmp_path), resolution=16, max_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    trainer = MaPOTrainer(pipeline, config, preference_pairs(8, seed=7))
    trainer.train()
    trainer.save_model()
    StableDiffusionPAGPipeline.from_pretrained(tmp_path)

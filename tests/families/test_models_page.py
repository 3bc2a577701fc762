"""docs/models.md against pipelines and families, and the example of another pipeline in docs/extending.md."""

import inspect
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from diffusers import StableDiffusionPAGPipeline
from helpers import tiny
from helpers.pipelines import build_tiny_pipeline

from trl_diffusion_pref import MaPOConfig, MaPOTrainer, families
from trl_diffusion_pref.families import supported_pipelines
from trl_diffusion_pref.families.flux import FluxFamily
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs


DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "models.md").read_text()


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """docs/_models_page.py, which writes the tables."""
    spec = spec_from_file_location("docs_models_page", DOCS / "_models_page.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(text: str, table: str) -> dict[str, dict[str, str]]:
    """By pipeline, the cells of its row by the name of their column."""
    lines = text.split(f"<!-- table: {table} -->")[1].split("<!-- end of table -->")[0].strip().splitlines()
    header, _, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0].strip("`"): dict(zip(header, row, strict=True)) for row in cells}


PIPELINES, LORA = rows(PAGE, "pipelines"), rows(PAGE, "lora")


def test_the_tables_are_up_to_date(generator):
    assert PAGE == generator.models_page(PAGE), "docs/models.md is not up to date: run `make docs`"


def test_the_tables_have_every_supported_pipeline():
    assert sorted(PIPELINES) == sorted(LORA) == sorted(supported_pipelines())


@pytest.mark.parametrize("name", tiny.CASES)
def test_a_row_says_what_the_pipeline_does(name):
    """Against the pipeline of diffusers and what its contract test is given, not the family."""
    case, pipeline = tiny.CASES[name], tiny.build(name)
    row, lora = (table[type(pipeline).__name__] for table in (PIPELINES, LORA))
    assert row["generates"] == ("audio" if case.waveform else "videos" if case.frames else "images")
    assert row["process"] == ("diffusion" if case.prediction_type else "rectified flow")
    optional = case.edits or "image" in inspect.signature(type(pipeline).__call__).parameters
    assert ("image" in row["conditions"]) == optional
    assert lora["LoRA loads with"] == ("`load_lora_weights`" if hasattr(pipeline, "load_lora_weights") else "PEFT")
    layers = dict((getattr(pipeline, "unet", None) or pipeline.transformer).named_modules())
    for target in lora["default LoRA targets"].split(", "):
        assert any(f".{layer}".endswith(f".{target.strip('`')}") for layer in layers), target


def test_the_embedded_pipelines_are_those_that_the_page_says_were_trained():
    trained = {name for name, row in PIPELINES.items() if row["trained here"] == "embedded pipeline"}
    assert trained == {type(load_pipeline(base)).__name__ for base in ("mixed", "flow")}


def test_a_new_family_is_in_the_tables_without_editing_the_page(generator, monkeypatch):
    class NewFamily(FluxFamily):
        pipeline_class, lora_target_modules, flow, modality = "NewPipeline", ("to_new",), False, "video"

    NewFamily.__module__ = FluxFamily.__module__
    monkeypatch.setattr(families, "_FAMILIES", {**families._FAMILIES, "NewPipeline": NewFamily()})
    page = generator.models_page(PAGE)
    row = rows(page, "pipelines")["NewPipeline"]
    assert (row["model"], row["generates"], row["process"]) == ("Flux.1", "videos", "diffusion")
    assert rows(page, "lora")["NewPipeline"]["default LoRA targets"] == "`to_new`"


def test_a_family_whose_file_does_not_name_its_model_is_refused(generator):
    class Unnamed(FluxFamily):
        """In this file, whose docstring names no model."""

    with pytest.raises(ValueError, match="test_models_page.py must be the model's name, a colon"):
        generator.model_name(Unnamed())


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

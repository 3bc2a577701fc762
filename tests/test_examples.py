"""What the README promises: the examples, run as a user runs them, on the trained shapes pipeline."""

import importlib.util
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from trl_diffusion_pref.shapes import pipeline_folder, prompts, sample, summarize
from trl_diffusion_pref.trainer.divergence import DivergenceError


EXAMPLES = Path(__file__).parents[1] / "examples"
ASKED = (4 * prompts())[:64]


def run(name: str, *arguments: str) -> dict:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(arguments))


@pytest.mark.parametrize("lora", [False, True])
def test_mapo_teaches_the_preferred_style_and_keeps_colour_and_shape(lora, tmp_path, capsys):
    pictures = run("mapo_shapes", "--output_dir", str(tmp_path / "out"), *(["--lora"] if lora else []))
    before, after = (summarize(pictures[name], ASKED) for name in ("before", "after"))
    assert before.count == after.count == 64
    assert before.preferred <= 0.5
    assert after.preferred >= 0.95
    assert after.colour >= 0.95 and after.shape >= 0.95
    printed = capsys.readouterr().out
    assert "before" in printed and "after" in printed and str(tmp_path / "out" / "before_after.png") in printed
    assert Image.open(tmp_path / "out" / "before_after.png").size[0] > 1000
    if lora:
        assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    else:
        StableDiffusionPipeline.from_pretrained(tmp_path / "out")


def test_dpo_teaches_the_preferred_style_and_its_held_out_accuracy_rises(tmp_path, capsys):
    results = run("diffusion_dpo_shapes", "--output_dir", str(tmp_path / "out"))
    after = summarize(results["after"], ASKED)
    assert after.preferred >= 0.9
    assert after.colour >= 0.95 and after.shape >= 0.95
    accuracy = results["accuracy"]
    assert accuracy["before"]["eval_preference_accuracy"] == 0.5
    assert accuracy["after"]["eval_preference_accuracy"] >= 0.9
    # under the base's own likelihood, too, the preferred images become the likelier ones
    assert accuracy["before"]["eval_likelihood_accuracy"] <= 0.25
    assert accuracy["after"]["eval_likelihood_accuracy"] >= 0.9
    assert "held-out preference accuracy" in capsys.readouterr().out


def test_ten_times_the_learning_rate_is_stopped_while_the_model_still_draws(tmp_path):
    with pytest.raises(DivergenceError, match="learning_rate"):
        run("diffusion_dpo_shapes", "--output_dir", str(tmp_path / "out"), "--learning_rate", "5e-4")
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder(), unet=unet)
    summary = summarize(sample(pipeline, ASKED), ASKED)
    assert summary.shape >= 0.9 and summary.colour >= 0.8


def test_the_example_is_short():
    assert len((EXAMPLES / "mapo_shapes.py").read_text().splitlines()) <= 60

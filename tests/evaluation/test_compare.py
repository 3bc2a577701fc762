"""`compare` from models to files: what it samples with, what it leaves out, and what it refuses."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers.pipelines import build_tiny_pipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageStat

from trl_diffusion_pref.evaluation import compare, preference_accuracy, sample, sampling, seeds_for
from trl_diffusion_pref.guidance.tuned import with_tuned_weights
from trl_diffusion_pref.rewards import RewardError
from trl_diffusion_pref.shapes import preference_pairs


PROMPTS = ["a red circle", "a blue square", "a green triangle"]
CALL = {"num_inference_steps": 2, "guidance_scale": 2.0}


def brightness(prompts, samples, **columns):
    return [ImageStat.Stat(image.convert("L")).mean[0] for image in samples]


def red(prompts, samples, **columns):
    return [ImageStat.Stat(image).mean[0] for image in samples]


def moved(pipeline, seed: int = 1):
    """A pipeline whose unet was tuned, by random steps."""
    other = copy.deepcopy(pipeline)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture(scope="module")
def base():
    return build_tiny_pipeline()


@pytest.fixture(scope="module")
def lora_folder(base, tmp_path_factory):
    """A LoRA whose alpha is not its rank, saved as a trainer saves it."""
    folder, pipeline = tmp_path_factory.mktemp("lora"), copy.deepcopy(base)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
    )
    loaded = copy.deepcopy(base)
    loaded.load_lora_weights(folder)
    return folder, loaded


@pytest.fixture(scope="module")
def report(base, lora_folder, tmp_path_factory):
    """Base, a fully tuned model and a LoRA, with two rewards and held-out pairs."""
    folder = tmp_path_factory.mktemp("report")
    tuned = {"itself": copy.deepcopy(base), "full": moved(base), "lora": lora_folder[0]}
    pairs = preference_pairs(6)
    found = compare(base, tuned, PROMPTS, [brightness, red], folder, samples_per_prompt=2, pairs=pairs, **CALL)
    return folder, found, tuned, pairs


def test_scores_are_those_of_each_model_s_own_pipeline(base, lora_folder, report):
    _, found, tuned, _ = report
    for name, pipeline in {"base": base, "full": tuned["full"], "lora": lora_folder[1]}.items():
        for number in range(2):
            seeds = seeds_for(PROMPTS, number=number)
            assert [row[number] for row in found.seeds] == seeds
            images = sample(pipeline, PROMPTS, seeds, show_progress=False, **CALL)
            assert found.scores[name]["red"][:, number].tolist() == red(PROMPTS, list(images))
    assert len({found.scores[name]["red"].tobytes() for name in found.models}) == 3


def test_a_copy_of_the_base_wins_exactly_half(report):
    found = report[1]
    for reward in ("brightness", "red"):
        assert found.win_rate("itself", reward).value == 0.5
        assert found.difference("itself", reward).value == 0.0


def test_held_out_accuracy_is_that_of_each_pipeline_by_itself(base, report):
    _, found, tuned, pairs = report
    assert found.accuracies["itself"].accuracy == 0.5
    assert found.accuracies["full"] == preference_accuracy(tuned["full"], pairs, reference=base)
    assert "base" not in found.accuracies


def test_the_report_s_files_agree_with_what_is_returned(report):
    folder, found, _, _ = report
    stored = json.loads((folder / "comparison.json").read_text())
    assert stored == json.loads(json.dumps(found.as_dict()))
    assert (folder / "comparison.md").read_text() == found.to_markdown()
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4 * 6 and "https://" not in page
    assert len(list((folder / "samples").iterdir())) == 3 * 6


def test_a_second_run_samples_nothing_again(base, report, monkeypatch):
    folder, found, tuned, _ = report
    monkeypatch.setattr(sampling, "_call", None)
    again = compare(base, tuned, PROMPTS, [brightness, red], folder, samples_per_prompt=2, **CALL)
    assert all((again.scores[name]["red"] == found.scores[name]["red"]).all() for name in found.models)
    assert again.seconds == {}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_base_is_as_it_was_afterwards(kind, base, lora_folder):
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    with with_tuned_weights(base, lora_folder[0] if kind == "lora" else moved(base)):
        inside = {name: value.clone() for name, value in base.unet.state_dict().items()}
    after = base.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert any(name not in before or not torch.equal(value, before[name]) for name, value in inside.items())


def test_blank_samples_are_counted_and_left_out(base, tmp_path, monkeypatch, caplog):
    def call(pipeline, family, prompts, generators, options):
        return [Image.new("RGB", (16, 16), "black" if "red" in prompt else "white") for prompt in prompts]

    monkeypatch.setattr(sampling, "_call", call)
    found = compare(base, moved(base), PROMPTS, red, tmp_path, samples_per_prompt=2, **CALL)
    assert found.blank == {"base": 2, "tuned": 2}
    assert np.isnan(found.scores["base"]["red"][0]).all() and (found.scores["base"]["red"][1:] == 255).all()
    assert found.win_rate("tuned", "red").prompts == 2
    assert "2 of base, 2 of tuned" in caplog.text


def test_a_report_of_another_comparison_is_not_replaced(base, report):
    folder, _, tuned, _ = report
    with pytest.raises(ValueError, match="report of another comparison: prompts, options differ"):
        compare(base, tuned, PROMPTS[:2], red, folder, samples_per_prompt=2, num_inference_steps=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a", "b", "a"]}, "'a' comes twice"),
        ({"tuned": {}}, "of no model"),
        ({"tuned": {"base": "x"}}, "none as 'base'"),
        ({"samples_per_prompt": 0}, "samples_per_prompt=0"),
        ({"device": "cpu"}, "a loaded one was passed"),
        ({"guidence_scale": 3.0}, "Did you mean guidance_scale"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_sampling(change, message, base, tmp_path):
    arguments = {"tuned": base.unet, "prompts": PROMPTS, "rewards": red, "output": tmp_path, **change}
    with pytest.raises(ValueError, match=message):
        compare(base, **arguments)
    assert not list(tmp_path.rglob("*.png"))


def test_a_reward_that_fails_is_named_with_its_sample(base, tmp_path):
    def broken(prompts, samples, **columns):
        return [float("nan") if "square" in prompt else 1.0 for prompt in prompts]

    with pytest.raises(RewardError, match="reward 'broken', sample 1: returned nan"):
        compare(base, moved(base), PROMPTS, broken, tmp_path, samples_per_prompt=1, **CALL)
    assert not (tmp_path / "comparison.json").exists()

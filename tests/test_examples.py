"""What the README promises: the examples, run as a user runs them, on the trained shapes pipeline."""

import json

import pytest
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
from helpers.examples import EXAMPLES
from helpers.examples import run_example as run
from peft import LoraConfig
from PIL import Image

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer
from trl_diffusion_pref.guidance import negative_guidance
from trl_diffusion_pref.shapes import (
    load_pipeline,
    pipeline_folder,
    preference_pairs,
    prompts,
    sample,
    sample_base,
    summarize,
)
from trl_diffusion_pref.training.divergence import DivergenceError


ASKED = (4 * prompts())[:64]


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_mapo_teaches_the_preferred_style_and_keeps_colour_and_shape(lora, tmp_path, capsys):
    # Once is enough for the comparison, which takes as long as training.
    arguments = ["--lora"] if lora else ["--no-comparison"]
    pictures = run("mapo_shapes", "--output_dir", str(tmp_path / "out"), *arguments)
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
        report = json.loads((tmp_path / "out" / "comparison" / "comparison.json").read_text())
        assert report["models"]["tuned"]["rewards"]["shapes_reward"]["win rate"]["low"] > 0.8
        assert "<title>" in (tmp_path / "out" / "comparison" / "index.html").read_text()
    else:
        StableDiffusionPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.slow
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


@pytest.mark.slow
def test_ten_times_the_learning_rate_is_stopped_while_the_model_still_draws(tmp_path):
    with pytest.raises(DivergenceError, match="learning_rate"):
        run("diffusion_dpo_shapes", "--output_dir", str(tmp_path / "out"), "--learning_rate", "5e-4")
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder(), unet=unet)
    summary = summarize(sample(pipeline, ASKED), ASKED)
    assert summary.shape >= 0.9 and summary.colour >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mapo", "dpo"])
def test_a_flow_learns_the_preferred_style_and_keeps_colour_and_shape(method, tmp_path, capsys):
    pictures = run("flow_shapes", "--method", method, "--output_dir", str(tmp_path / "out"))
    before, after = (summarize(pictures[name], ASKED) for name in ("before", "after"))
    assert before.preferred <= 0.5
    assert after.preferred >= 0.9
    assert after.colour >= 0.9 and after.shape >= 0.9
    assert "before" in capsys.readouterr().out
    StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_single_votes_teach_the_preferred_style_and_keep_colour_and_shape(tmp_path, capsys):
    pictures = run("diffusion_kto_shapes", "--output_dir", str(tmp_path / "out"))
    before, after = (summarize(pictures[name], ASKED) for name in ("before", "after"))
    assert before.preferred <= 0.5
    assert after.preferred >= 0.9
    assert after.colour >= 0.95 and after.shape >= 0.95
    assert "before" in capsys.readouterr().out
    StableDiffusionPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusion_sft_shapes", "flow_rwr_shapes"])
def test_good_samples_teach_the_preferred_style_without_rejected_ones(name, tmp_path, capsys):
    pictures = run(name, "--output_dir", str(tmp_path / "out"))
    before, after = (summarize(pictures[name], ASKED) for name in ("before", "after"))
    assert before.preferred <= 0.5
    assert after.preferred >= 0.85
    assert after.colour >= 0.95 and after.shape >= 0.95
    assert "before" in capsys.readouterr().out
    StableDiffusionPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_self_npo_makes_a_negative_model_that_ignores_the_prompt_and_can_guide(lora, tmp_path, capsys):
    arguments = ["--lora", "--learning_rate", "1e-3"] if lora else []
    pictures = run("self_npo_shapes", "--output_dir", str(tmp_path / "out"), "--max_steps", "60", *arguments)
    plain, negative, guided = (summarize(pictures[name], ASKED) for name in ("plain", "negative", "guided"))
    assert plain.clean >= 0.75
    # w = -1 teaches the unconditional prediction: alone the negative model ignores the prompt
    assert negative.colour <= 0.6
    assert guided.colour >= 0.95 and guided.shape >= 0.95 and guided.clean >= plain.clean - 0.1
    assert "guided" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "before_after.png").size[0] > 1500


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mapo", "dpo"])
def test_guidance_with_a_model_of_the_rejected_raises_the_preferred_style(method, tmp_path):
    """Diffusion-NPO."""
    common = {
        "output_dir": str(tmp_path),
        "negative": True,
        "max_steps": 30,
        "prompt_dropout": 0.2,
        "per_device_train_batch_size": 32,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    lora, pairs = LoraConfig(r=8, lora_alpha=8), preference_pairs(256)
    if method == "mapo":
        trainer = MaPOTrainer(
            str(pipeline_folder()), MaPOConfig(**common, learning_rate=3e-3), pairs, peft_config=lora
        )
    else:
        config = DiffusionDPOConfig(**common, learning_rate=1e-3, beta=500.0, divergence_guard="off")
        trainer = DiffusionDPOTrainer(str(pipeline_folder()), config, pairs, peft_config=lora)
    trainer.train()
    trainer.save_model()
    plain = summarize(sample_base("mixed", ASKED), ASKED)
    pipeline = load_pipeline()
    with negative_guidance(pipeline, tmp_path):
        guided = summarize(sample(pipeline, ASKED), ASKED)
    assert plain.preferred <= 0.3
    assert guided.preferred >= plain.preferred + 0.1
    assert guided.shape >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("base", ["mixed", "flow"])
def test_sampling_towards_a_latent_reward_gives_the_preferred_style(base, tmp_path, capsys):
    found = run("reward_guidance_shapes", "--base", base, "--output_dir", str(tmp_path / "out"))
    plain, guided = (summarize(found["images"][name], ASKED) for name in ("plain", "scale 2"))
    assert guided.preferred >= plain.preferred + 0.3
    assert guided.colour >= 0.9 and guided.shape >= 0.9
    assert min(share for level, share in found["accuracy"].items() if level <= 0.5) >= 0.9
    assert "held-out accuracy" in capsys.readouterr().out
    assert (tmp_path / "out" / "latent_reward.safetensors").is_file()


@pytest.mark.slow
def test_pairs_of_its_own_samples_teach_a_model_the_preferred_style(tmp_path):
    pictures = run("self_made_pairs_shapes", "--output_dir", str(tmp_path / "out"))
    after = summarize(pictures["after"], ASKED)
    assert after.preferred >= 0.95
    assert after.colour >= 0.95 and after.shape >= 0.95


@pytest.mark.slow
def test_prompts_and_a_judge_alone_teach_the_preferred_style(tmp_path):
    pictures = run("diffusion_nft_shapes", "--output_dir", str(tmp_path / "out"))
    before, after = (summarize(pictures[name], ASKED) for name in ("before", "after"))
    assert before.preferred <= 0.5
    assert after.preferred >= 0.95
    assert after.colour >= 0.95 and after.shape >= 0.95


@pytest.mark.slow
def test_rankings_of_its_own_samples_teach_a_model_the_preferred_style(tmp_path):
    after = summarize(run("rank_dpo_shapes", "--output_dir", str(tmp_path / "out"))["after"], ASKED)
    assert after.preferred >= 0.9
    assert after.colour >= 0.95 and after.shape >= 0.95


@pytest.mark.slow
def test_two_rounds_of_self_made_pairs_do_no_worse_than_one(tmp_path):
    base, one, two = run("rounds_shapes", "--output_dir", str(tmp_path / "out"))
    assert base.preferred <= 0.3
    assert one.preferred >= 0.95 and two.preferred >= one.preferred
    assert two.colour >= 0.95 and two.shape >= 0.95


def test_the_example_is_short():
    assert len((EXAMPLES / "mapo_shapes.py").read_text().splitlines()) <= 60

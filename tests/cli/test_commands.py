"""The commands around a training run, each on real files: what they write is what the functions of Python write."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk
from helpers.pipelines import build_tiny_pipeline

from trl_diffusion_pref import MaPOConfig, encode_dataset, load_pairs
from trl_diffusion_pref.cli import UsageError, main
from trl_diffusion_pref.shapes import preference_pairs


SAMPLING = ["--pipeline_kwargs", '{"num_inference_steps": 2, "guidance_scale": 1.0}']


def redness(prompts, samples):
    """A reward of the user's own, which `--rewards` imports."""
    return [float(np.asarray(image.convert("RGB"), dtype=np.float64)[..., 0].mean()) for image in samples]


REDNESS = ["--rewards", f"{__name__}:redness"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(tmp_path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\n")
    return str(file)


def test_inspect_prints_what_it_writes_as_json(tmp_path, capsys):
    preference_pairs(6).save_to_disk(str(tmp_path / "pairs"))
    assert main(["inspect", str(tmp_path / "pairs"), "--json", str(tmp_path / "found.json"), "--model", "shapes"]) == 0
    assert "6" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == 6


def test_an_encoded_folder_trains_the_same_weights_as_its_rows(model, tmp_path):
    preference_pairs(6).save_to_disk(str(tmp_path / "pairs"))
    data = ["--model_name_or_path", model, "--dataset_name", str(tmp_path / "pairs"), "--use_cpu"]
    assert main(["encode", *data, "--output", str(tmp_path / "encoded")]) == 0
    data[3] = str(tmp_path / "encoded")
    run = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--disable_tqdm", "--save_strategy", "no"]
    assert main(["mapo", *data, *run, "--output_dir", str(tmp_path / "a")]) == 0
    data[3] = str(tmp_path / "pairs")
    assert main(["mapo", *data, *run, "--output_dir", str(tmp_path / "b")]) == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()


def test_pairs_are_made_scored_and_compared_from_files_alone(model, prompts, tmp_path, capsys):
    sampled = ["--model_name_or_path", model, "--prompts", prompts, *REDNESS, *SAMPLING]
    assert main(["make-pairs", *sampled, "--output", str(tmp_path / "made"), "--samples_per_prompt", "3"]) == 0
    made = load_from_disk(str(tmp_path / "made" / "pairs"))
    assert sorted(made["prompt"]) == ["a blue square", "a red circle"]
    assert (np.array(made["chosen_score"]) > np.array(made["rejected_score"])).all()
    assert main(["make-rankings", *sampled, "--output", str(tmp_path / "made"), "--samples_per_prompt", "3"]) == 0

    folder = str(tmp_path / "made" / "pairs")
    assert main(["score", folder, *REDNESS, "--output", str(tmp_path / "scored"), "--temperature", "10"]) == 0
    scored = load_from_disk(str(tmp_path / "scored" / "pairs"))
    assert scored["chosen_score"] == pytest.approx(redness([], scored["chosen"]), abs=1e-9)
    difference = np.subtract(scored["chosen_score"], scored["rejected_score"])
    assert scored["soft_label"] == pytest.approx(1 / (1 + np.exp(-difference / 10)), abs=1e-6)

    with pytest.raises(UsageError, match="exists already"):
        main(["--debug", "score", folder, *REDNESS, "--output", str(tmp_path / "made")])

    capsys.readouterr()
    compared = ["--tuned", f"same={model}", "--output", str(tmp_path / "report"), "--samples_per_prompt", "1"]
    assert main(["compare", *sampled, *compared, "--dataset_name", folder, "--dataset_split", "train"]) == 0
    assert str(tmp_path / "report" / "index.html") in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert list(report["models"]) == ["base", "same"] and (tmp_path / "report" / "index.html").is_file()


def test_evaluate_gives_the_accuracy_over_the_base(model, tmp_path, capsys):
    preference_pairs(4).save_to_disk(str(tmp_path / "pairs"))
    words = ["--model_name_or_path", model, "--dataset_name", str(tmp_path / "pairs"), "--dataset_split", "train"]
    file = tmp_path / "accuracy.json"
    assert main(["evaluate", *words, "--tuned", model, "--draws", "2", "--output", str(file)]) == 0
    found = json.loads(file.read_text())
    # A model gains nothing over itself: every pair is a tie.
    assert found["accuracy"] == 0.5 and found["count"] == 4 and json.loads(capsys.readouterr().out) == found
    assert found["likelihood_accuracy"] == found["reference_likelihood_accuracy"]


def test_estimate_memory_prints_the_table_of_the_function(model, capsys):
    from trl_diffusion_pref import DiffusionDPOConfig, estimate_memory

    words = ["--model_name_or_path", model, "--trainer", "diffusion-dpo", "--per_device_train_batch_size", "2"]
    assert main(["estimate-memory", *words, "--use_cpu", "--beta", "100"]) == 0
    config = DiffusionDPOConfig(per_device_train_batch_size=2, use_cpu=True, beta=100)
    assert capsys.readouterr().out.strip() == str(estimate_memory(model, config)).strip()
    assert main(["estimate-memory", *words, "--use_cpu", "--card", "8"]) == 2
    assert "card='8' is no size of a card" in capsys.readouterr().err


@pytest.mark.slow
def test_estimate_memory_for_a_card_prints_the_table_of_the_function(model, capsys):
    from trl_diffusion_pref import MaPOConfig, fit_memory

    words = ["--model_name_or_path", model, "--trainer", "mapo", "--per_device_train_batch_size", "2"]
    assert main(["estimate-memory", *words, "--use_cpu", "--card", "8GB"]) == 0
    found = fit_memory("8GB", model, MaPOConfig(per_device_train_batch_size=2, use_cpu=True))
    assert capsys.readouterr().out.strip() == str(found).strip()


def test_a_trained_lora_is_exported_and_merged(tmp_path):
    from safetensors.torch import load_file

    run = ["--model_name_or_path", "shapes", "--dataset_name", "shapes:4", "--use_peft", "--lora_r", "2", "--use_cpu"]
    run += ["--max_steps", "1", "--disable_tqdm", "--save_strategy", "no", "--output_dir", str(tmp_path / "lora")]
    assert main(["mapo", *run]) == 0
    file = tmp_path / "comfy.safetensors"
    assert main(["export", str(tmp_path / "lora"), str(file)]) == 0
    assert any(name.endswith(".alpha") for name in load_file(file))
    whole = tmp_path / "whole"
    assert main(["export", str(tmp_path / "lora"), str(whole), "--merge", "--base", "shapes"]) == 0
    assert (whole / "model_index.json").is_file()
    assert not [path for path in whole.rglob("*.safetensors") if "lora" in path.name]


def test_encode_fills_the_cache_that_training_reads(model, tmp_path):
    """What the command encodes is what `encode_dataset` does: the same fingerprint."""
    preference_pairs(4).save_to_disk(str(tmp_path / "pairs"))
    words = ["--model_name_or_path", model, "--dataset_name", str(tmp_path / "pairs"), "--use_cpu"]
    assert main(["encode", *words, "--output", str(tmp_path / "encoded"), "--resolution", "32"]) == 0
    config = MaPOConfig(output_dir=str(tmp_path), use_cpu=True, resolution=32)
    encoded = encode_dataset(model, load_pairs(str(tmp_path / "pairs")), config)
    document = json.loads((Path(tmp_path) / "encoded" / "encoded_dataset.json").read_text())
    assert document["fingerprint"] == encoded.fingerprint

"""Training from the command line: the Python example's weights, and `run.yaml`, which gives them again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.examples import run_example
from safetensors.torch import load_file

from trl_diffusion_pref import shapes
from trl_diffusion_pref.cli import UsageError, demo, main
from trl_diffusion_pref.shapes import draw, random_scene


ROOT = Path(__file__).parents[2]
QUICK = ["--max_steps", "2", "--use_cpu", "--disable_tqdm", "--report_to", "none"]


def weights(folder: Path) -> bytes:
    return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_yaml_example_gives_the_weights_of_the_python_example(tmp_path, monkeypatch):
    """Bit for bit; and so does the demo. Sampling, which takes longest, is another test's."""
    images = [draw(random_scene(np.random.default_rng(number), "filled")) for number in range(64)]
    for module in (shapes, demo):
        monkeypatch.setattr(module, "sample", lambda pipeline, prompts: images)
        monkeypatch.setattr(module, "sample_base", lambda base, prompts: images)
    by_python, by_yaml, by_demo = (tmp_path / name for name in ("python", "yaml", "demo"))
    run_example("mapo_shapes", "--output_dir", str(by_python), "--max_steps", "2", "--no-comparison")
    words = ["--config", str(ROOT / "examples" / "mapo_shapes.yaml"), "--output_dir", str(by_yaml), "--max_steps", "2"]
    assert main(["mapo", *words]) == 0
    assert weights(by_yaml) == weights(by_python)
    assert main(["demo", "--output_dir", str(by_demo), "--max_steps", "2", "--comparison", "false"]) == 0
    assert weights(by_demo) == weights(by_python)
    assert (by_demo / "before_after.png").read_bytes() == (by_python / "before_after.png").read_bytes()


def test_the_demo_has_the_options_of_the_example():
    files = [ROOT / "examples" / "mapo_shapes.yaml", ROOT / "trl_diffusion_pref" / "cli" / "demo.yaml"]
    assert len({file.read_text() for file in files}) == 1


@pytest.mark.parametrize("command", ["diffusion-dpo", "self-npo"])
def test_run_yaml_gives_the_same_weights_again(command, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    words = ["--model_name_or_path", "shapes", "--dataset_name", "shapes:8", "--output_dir", str(first), *QUICK]
    words += ["--per_device_train_batch_size", "4", "--use_peft", "--lora_r", "2", "--seed", "5"]
    words += ["--model_init_kwargs", '{"token": "hf_secret", "variant": null}', "--hub_token", "hf_secret"]
    words += ["--solver_steps", "4", "--truncated_steps", "2"] * (command == "self-npo")
    assert main([command, *words]) == 0
    text = (first / "run.yaml").read_text()
    assert "hf_secret" not in text and command in text.splitlines()[0]
    document = yaml.safe_load(text)
    # What was given, what depends on the model, and what the algorithm decides.
    assert document["lora_r"] == 2 and document["learning_rate"] > 0 and document["seed"] == 5
    assert main([command, "--config", str(first / "run.yaml"), "--output_dir", str(again)]) == 0
    # Not the files' bytes: safetensors writes metadata in an order that changes.
    adapters = [load_file(folder / "pytorch_lora_weights.safetensors") for folder in (first, again)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    assert any(tensor.abs().max() > 0 for name, tensor in adapters[0].items() if ".up" in name or "lora_B" in name)
    changed = {line for line in (again / "run.yaml").read_text().splitlines() if line not in text.splitlines()}
    assert all(line.startswith("output_dir") or "run.yaml" in line for line in changed)


def test_a_dry_run_says_everything_and_trains_nothing(tmp_path, capsys):
    words = ["--model_name_or_path", "shapes", "--dataset_name", "shapes:8", "--output_dir", str(tmp_path / "run")]
    words += ["--eval_strategy", "steps", "--eval_steps", "1", *QUICK, "--dry_run"]
    assert main(["diffusion-dpo", *words]) == 0
    printed = capsys.readouterr().out
    # The model's value with its source, a flag, and a default.
    for line in (r"beta = \S+ +StableDiffusionPipeline: .+", r"max_steps = 2 +--max_steps", r"seed = 42 +default"):
        assert re.search(line, printed), line
    assert "training: 8 rows, 0 left out" in printed and "evaluation: 512 rows" not in printed
    assert "evaluation: 8 rows" in printed
    assert "total, the most held at once" in printed
    assert not list(tmp_path.glob("run/*.safetensors")) and not (tmp_path / "run" / "run.yaml").exists()
    assert not (tmp_path / "run" / "model_index.json").exists()


def test_two_data_sets_are_mixed_by_their_weights(tmp_path):
    from trl_diffusion_pref import MaPOConfig
    from trl_diffusion_pref.cli.data_sets import training_data
    from trl_diffusion_pref.cli.run_options import DataOptions
    from trl_diffusion_pref.shapes import preference_pairs

    preference_pairs(300, seed=3).add_column("soft_label", [0.75] * 300).save_to_disk(str(tmp_path / "soft"))
    config = MaPOConfig(output_dir=str(tmp_path), use_cpu=True)
    names = ["shapes:300", str(tmp_path / "soft")]
    everything, _ = training_data(DataOptions(dataset_name=names), config)
    assert len(everything) == 600 and everything["soft_label"] == [1.0] * 300 + [0.75] * 300
    mixed, _ = training_data(DataOptions(dataset_name=names, dataset_weights=[3, 1]), config)
    share = sum(label == 0.75 for label in mixed["soft_label"]) / len(mixed)
    assert len(mixed) >= 300 and share == pytest.approx(0.25, abs=0.06)
    streamed = DataOptions(dataset_name=[names[1], names[1]], dataset_weights=[1, 1], dataset_streaming=True)
    rows, _ = training_data(streamed, config)
    assert next(iter(rows))["soft_label"] == 0.75


def test_a_mixture_keeps_what_its_parts_say(tmp_path):
    """A column of soft labels, options of pairs, and one map of columns for training and evaluation."""
    from trl_diffusion_pref import DiffusionDPOConfig
    from trl_diffusion_pref.cli.data_sets import training_data
    from trl_diffusion_pref.cli.run_options import DataOptions

    for name in "abc":
        renamed = shapes.preference_pairs(4, seed=ord(name)).rename_columns({"chosen": "good", "rejected": "bad"})
        renamed.add_column("agreement", [0.5 + ord(name) / 400] * 4).save_to_disk(str(tmp_path / name))
    options = DataOptions(
        dataset_name=[str(tmp_path / "a"), str(tmp_path / "b")], eval_dataset_name=[str(tmp_path / "c")]
    )
    config = DiffusionDPOConfig(
        output_dir=str(tmp_path),
        loss_type="irepo",
        soft_label_column="agreement",
        column_map={"chosen": "good", "rejected": "bad"},
        eval_strategy="epoch",
        use_cpu=True,
    )
    train, evaluation = training_data(options, config)
    assert train["agreement"] == [0.5 + ord("a") / 400] * 4 + [0.5 + ord("b") / 400] * 4
    assert {"prompt", "chosen", "rejected", "agreement"} <= set(evaluation.column_names) and len(evaluation) == 4
    shapes.preference_pairs(4).rename_columns({"chosen": "good", "rejected": "bad"}).save_to_disk(str(tmp_path / "d"))
    options.dataset_name[1], config.column_map = str(tmp_path / "d"), {"chosen": "good", "rejected": "bad"}
    with pytest.raises(UsageError, match="d has no column 'agreement'"):
        training_data(options, config)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["accelerate_config", "torchrun"])
def test_two_processes_are_started_and_train_one_model(start, tmp_path):
    """By the config of accelerate that comes with the package, and under the user's own torchrun."""
    words = ["mapo", "--model_name_or_path", "shapes", "--dataset_name", "shapes:8", *QUICK, "--save_strategy", "no"]
    words += ["--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "run"), "--logging_steps", "1"]
    if start == "torchrun":
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "trl_diffusion_pref.cli"]
    else:
        command = ["-m", "trl_diffusion_pref.cli"]
        words += ["--accelerate_config", "multi_gpu", "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command, *words], capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The result is in") == 1
    # The card counts the pairs of both.
    assert "| `pairs per step` | 4 |" in (tmp_path / "run" / "README.md").read_text()
    assert weights(tmp_path / "run")

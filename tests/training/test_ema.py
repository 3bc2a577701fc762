"""The moving average of the weights: what it is, and that it is evaluated, saved and resumed beside them."""

import tempfile

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_diffusion_pref import MaPOConfig, MaPOTrainer, estimate_memory
from trl_diffusion_pref.export import merge_lora
from trl_diffusion_pref.memory.step import Counts, FakeStep


full_and_lora = pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, lora_alpha=8)], ids=["full", "lora"])


def averages(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in trainer.checkpointer.ema.state_dict().items() if name != "steps"}


class Recorder(TrainerCallback):
    """The trained weights after each step, in float64."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.steps.append({name: value.detach().double().clone() for name, value in trained.items()})


@full_and_lora
def test_the_average_is_that_of_its_formula(peft_config, config, pairs):
    recorder = Recorder()
    options = config(use_ema=True, ema_max_decay=0.5, ema_inv_gamma=2.0, ema_power=0.9, max_steps=4)
    trainer = MaPOTrainer(build_tiny_pipeline(), options, pairs, callbacks=[recorder], peft_config=peft_config)
    trainer.train()
    first, *later = recorder.steps
    expected = first
    for step, weights in enumerate(later, start=2):
        decay = min(0.5, 1 - (1 + (step - 1) / 2.0) ** -0.9)
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in weights.items()}
    found = averages(trainer)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
        assert value.dtype == torch.float32
    assert any((value.double() - recorder.steps[-1][name]).abs().max() > 1e-5 for name, value in found.items())


@full_and_lora
def test_saved_averages_load_and_are_what_was_evaluated(peft_config, config, pairs, tmp_path):
    run = {"use_ema": True, "ema_power": 2.0, "learning_rate": 3e-3, "report_to": []}
    trainer = MaPOTrainer(build_tiny_pipeline(), config(**run), pairs, pairs.select(range(5)), peft_config=peft_config)
    trainer.train()
    before, found = weights_of(trainer.model), trainer.evaluate()
    assert_equal_weights(before, weights_of(trainer.model))
    trainer.save_model()
    folder, card = tmp_path / "output", (tmp_path / "output" / "README.md").read_text()
    pipeline = build_tiny_pipeline()
    if peft_config is None:
        pipeline.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet_ema")
        assert 'pipeline.unet = UNet2DConditionModel.from_pretrained(..., subfolder="unet_ema")' in card
        assert_equal_weights(StableDiffusionPipeline.from_pretrained(folder).unet.state_dict(), before)
    else:
        # Of files with the usual name diffusers would take the first that a repository lists.
        assert [file.name for file in folder.rglob("*pytorch_lora_weights.safetensors")] == [
            "pytorch_lora_weights.safetensors"
        ]
        arguments = {"subfolder": "ema", "weight_name": "ema_lora_weights.safetensors"}
        assert 'subfolder="ema", weight_name="ema_lora_weights.safetensors"' in card
        merged = merge_lora(folder / "ema", tmp_path / "merged", build_tiny_pipeline())
        pipeline.load_lora_weights(folder, **arguments)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        for name, value in UNet2DConditionModel.from_pretrained(merged / "unet").state_dict().items():
            torch.testing.assert_close(value, pipeline.unet.state_dict()[name], rtol=0, atol=1e-6)
    own = {**run, "use_ema": False, "output_dir": str(tmp_path / "own")}
    del own["ema_power"]
    values = MaPOTrainer(pipeline, config(**own), pairs, pairs.select(range(5))).evaluate()
    for name in ("loss", "mse/chosen", "likelihood_accuracy"):
        assert found[f"eval_ema_{name}"] == pytest.approx(values[f"eval_{name}"], rel=1e-5)
    assert found["eval_ema_loss"] != found["eval_loss"]
    assert found["eval_ema_preference_accuracy_low"] <= found["eval_ema_preference_accuracy"]


def test_averaging_changes_neither_training_nor_the_metrics_of_the_weights(config, pairs):
    runs = []
    for options in ({}, {"use_ema": True}):
        options |= {"eval_strategy": "steps", "eval_steps": 1}
        trainer = MaPOTrainer(build_tiny_pipeline(), config(**options), pairs, {"held": pairs.select(range(5))})
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "eval_held_loss" in entry]
        names = [name for name in logged[0] if name.startswith("eval_") and "ema" not in name and "per_" not in name]
        runs.append(([[entry[name] for name in names if "runtime" not in name] for entry in logged], trainer))
    assert runs[0][0] == runs[1][0]
    assert_equal_weights(weights_of(runs[0][1].model), weights_of(runs[1][1].model))
    assert {f"eval_held_ema_{name}" for name in ("loss", "preference_accuracy", "mse/chosen")} <= logged[0].keys()
    assert "eval_held_ema_time" not in logged[0]


def test_with_the_best_weights_comes_their_average(config, pairs, tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "ema_loss"}
    options = config(use_ema=True, learning_rate=0.1, divergence_guard="off", **steps, **best)
    trainer = MaPOTrainer(build_tiny_pipeline(), options, pairs, pairs.select(range(4)))
    trainer.train()
    losses = [entry["eval_ema_loss"] for entry in trainer.state.log_history if "eval_ema_loss" in entry]
    place = tmp_path / "output" / f"checkpoint-{1 + losses.index(min(losses))}"
    stored = load_file(place / "ema.safetensors")
    assert stored.pop("steps") == 1 + losses.index(min(losses)) < 3
    assert_equal_weights(averages(trainer), stored)
    # What a push in the middle of a run takes along.
    trainer.checkpointer.copy_to_output(place, lora=False)
    pushed = UNet2DConditionModel.from_pretrained(tmp_path / "output" / "unet_ema").state_dict()
    assert_equal_weights(pushed, stored)


def test_options_of_the_average_are_checked(config, pairs, monkeypatch):
    with pytest.raises(ValueError, match="ema_power=1.0 does nothing with use_ema=False"):
        config(ema_power=1.0)
    with pytest.raises(ValueError, match=r"ema_max_decay=1.0 is outside \[0, 1\)"):
        config(use_ema=True, ema_max_decay=1.0)
    with pytest.raises(ValueError, match="metric_for_best_model='ema_loss' is not returned"):
        config(metric_for_best_model="ema_loss").check_data(pairs, pairs)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="use_ema=True: with FSDP and DeepSpeed no process has all weights"):
        config(use_ema=True)


def test_the_estimate_counts_four_bytes_for_each_averaged_weight(tiny_pipeline, monkeypatch):
    # What is held beside the step, whose own bytes do not depend on it.
    monkeypatch.setattr(FakeStep, "run", lambda step, checkpointing, batch_size: Counts(0, 0, 0))
    options = {"output_dir": tempfile.gettempdir(), "use_cpu": True, "activation_checkpointing": False}
    for lora in (None, LoraConfig(r=2)):
        plain, averaged = (
            estimate_memory(tiny_pipeline, MaPOConfig(**options, use_ema=use), lora) for use in (False, True)
        )
        assert averaged.average == averaged.total - plain.total == 4 * plain.trained_parameters
        assert "average" in str(averaged) and "average" not in str(plain)

"""Resuming from a checkpoint that does not fit, and what the guard leaves behind."""

from pathlib import Path

import pytest
import torch
from helpers.pipelines import build_tiny_pipeline
from peft import LoraConfig, get_peft_model
from transformers.trainer_utils import get_last_checkpoint

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, DivergenceError, MaPOTrainer
from trl_diffusion_pref.fingerprint import weights_fingerprint
from trl_diffusion_pref.shapes import pipeline_folder, preference_pairs
from trl_diffusion_pref.training.model_setup import starting_fingerprint


def run(config, pairs, peft_config=None, **options) -> MaPOTrainer:
    cfg = config(save_strategy="steps", save_steps=2, max_steps=2, **options)
    return MaPOTrainer(build_tiny_pipeline(), cfg, pairs, peft_config=peft_config)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (LoraConfig(r=2), LoraConfig(r=4), "holds another LoRA: r was 2 and is 4"),
        (LoraConfig(r=2), LoraConfig(r=2, target_modules=["to_q"]), r"target_modules was .* and is \['to_q'\]"),
        (LoraConfig(r=2, lora_alpha=2), LoraConfig(r=2, lora_alpha=8), "lora_alpha was 2 and is 8"),
        (LoraConfig(r=2), None, "holds a LoRA and this run trains full weights.*with peft_config"),
        (None, LoraConfig(r=2), "holds full weights and this run trains a LoRA.*without peft_config"),
    ],
)
def test_another_adapter_or_kind_says_what_differs(first, then, message, pairs, config):
    run(config, pairs, first).train()
    with pytest.raises(ValueError, match=message):
        run(config, pairs, then).train(resume_from_checkpoint=True)


def test_an_optimizer_file_that_was_cut_off_is_named(pairs, config):
    trainer = run(config, pairs)
    trainer.train()
    file = Path(trainer.args.output_dir) / "checkpoint-2" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="optimizer.pt is cut off or damaged"):
        run(config, pairs).train(resume_from_checkpoint=True)


def test_a_finished_model_is_no_checkpoint_to_go_on_from(pairs, config):
    """It has weights, record and log, and a run that went on from it would begin with a new optimizer."""
    trainer = MaPOTrainer(build_tiny_pipeline(), config(max_steps=1), pairs)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    again = MaPOTrainer(build_tiny_pipeline(), config(max_steps=2), pairs)
    with pytest.raises(ValueError, match=r"scheduler\.pt.* is missing.*checkpoint folders"):
        again.train(resume_from_checkpoint=trainer.args.output_dir)


def test_transformers_idiom_with_an_unfinished_checkpoint_says_what_to_pass(pairs, config):
    trainer = run(config, pairs)
    trainer.train()
    (Path(trainer.args.output_dir) / "checkpoint-7").mkdir()
    with pytest.raises(
        ValueError, match="checkpoint-7.*unfinished.*train.resume_from_checkpoint=True. takes the newest"
    ):
        run(config, pairs).train(resume_from_checkpoint=get_last_checkpoint(trainer.args.output_dir))


def diverging(tmp_path, **options) -> DiffusionDPOConfig:
    defaults = {
        "output_dir": str(tmp_path / "output"),
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "beta": 200.0,
        "max_steps": 60,
        "divergence_window": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
        "logging_steps": 100,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "report_to": "none",
    }
    return DiffusionDPOConfig(**{**defaults, **options})


def test_the_last_good_checkpoint_outlives_the_diverged_one(pairs, tmp_path):
    trainer = DiffusionDPOTrainer(build_tiny_pipeline(), diverging(tmp_path), pairs)
    with pytest.raises(DivergenceError):
        trainer.train()
    step = trainer.state.global_step
    names = {folder.name for folder in (tmp_path / "output").glob("checkpoint-*")}
    assert names == {f"checkpoint-{step - 1}", f"checkpoint-{step}"}
    again = DiffusionDPOTrainer(build_tiny_pipeline(), diverging(tmp_path, max_steps=step - 1), pairs)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == step - 1


def test_a_moving_reference_does_not_hide_that_the_model_gets_worse(pairs, tmp_path):
    """The reference follows at every step, so that the error never rises above its own."""
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    cfg = diverging(tmp_path, save_strategy="no", **moving)
    trainer = DiffusionDPOTrainer(build_tiny_pipeline(), cfg, pairs)
    with pytest.raises(DivergenceError, match="above that of the run's first steps"):
        trainer.train()


def test_mapo_has_a_guard_of_its_own(config):
    """On a trained base: one with random weights is too bad at the start to become five times worse."""
    cfg = config(per_device_train_batch_size=16, learning_rate=1e-2, max_steps=40, divergence_window=2)
    trainer = MaPOTrainer(str(pipeline_folder()), cfg, preference_pairs(32))
    with pytest.raises(DivergenceError, match=r"above that of the run's first steps.*allowed: 400%"):
        trainer.train()
    assert trainer.state.global_step < 20


def test_stored_values_of_the_base_are_not_those_of_another_start(pairs, config):
    """A LoRA that does not start at zero is another function than its base."""
    folder = {"eval_draws": 2}
    full = MaPOTrainer(build_tiny_pipeline(), config(**folder), pairs, pairs)
    other = LoraConfig(r=4, init_lora_weights=False)
    lora = MaPOTrainer(build_tiny_pipeline(), config(**folder), pairs, pairs, peft_config=other)
    zero = MaPOTrainer(build_tiny_pipeline(), config(**folder), pairs, pairs, peft_config=LoraConfig(r=4))
    for trainer in (full, lora, zero):
        assert trainer.evaluate()["eval_preference_accuracy"] == 0.5
    tables = [trainer.held_out.base["eval "] for trainer in (full, lora, zero)]
    assert (tables[0] != tables[1]).any() and (tables[0] == tables[2]).all()


def test_adapters_of_another_strength_are_another_start():
    models = []
    for alpha in (4, 8):
        torch.manual_seed(0)
        models.append(
            get_peft_model(
                torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)}),
                LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q"], init_lora_weights=False),
            )
        )
    assert weights_fingerprint(models[0]) == weights_fingerprint(models[1])
    assert starting_fingerprint(models[0], {}) != starting_fingerprint(models[1], {})

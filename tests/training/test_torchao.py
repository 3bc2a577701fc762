"""All weights in bfloat16 with torchao's 8-bit Adam and stochastic rounding; `make test-torchao` installs it."""

import logging

import pytest
import torch
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from torch import Tensor

from trl_diffusion_pref import MaPOConfig, MaPOTrainer
from trl_diffusion_pref.memory.held import optimizer_bytes
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs


pytest.importorskip("torchao")
ROUNDED = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}


@pytest.fixture(autouse=True)
def without_a_compiler():
    """torchao compiles its step, which the tests need no C++ compiler for."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def trainer_with(pipeline, folder, **options) -> MaPOTrainer:
    defaults = {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-5}
    defaults |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "weight_decay": 0.0}
    defaults |= {"activation_checkpointing": False, "logging_steps": 1, "dataset_cache_dir": str(folder / "cache")}
    config = MaPOConfig(output_dir=str(folder / "output"), **{**defaults, **options})
    return MaPOTrainer(pipeline, config, preference_pairs(16, seed=3))


def stored_bytes(state: Tensor) -> int:
    parts = [getattr(state, name) for name in ("codes", "scale", "qmap") if hasattr(state, name)]
    return sum(part.nbytes for part in parts) if parts else state.nbytes


def test_state_is_what_the_estimate_counts_and_a_resumed_run_is_an_uninterrupted_one(tmp_path):
    pipeline = load_pipeline()
    pipeline.unet.to(torch.bfloat16)
    trainer = trainer_with(pipeline, tmp_path, **ROUNDED)
    trainer.train()
    trained = list(trainer.model.parameters())
    assert {parameter.dtype for parameter in trained} == {torch.bfloat16}
    states = [state[name] for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(map(stored_bytes, states)) == optimizer_bytes(trainer.args, trained)
    assert optimizer_bytes(trainer.args, trained) < 2.2 * sum(parameter.numel() for parameter in trained)
    whole = weights_of(trainer.model)

    again = load_pipeline()
    again.unet.to(torch.bfloat16)
    resumed = trainer_with(again, tmp_path, **ROUNDED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "output/checkpoint-2"))
    assert_equal_weights(weights_of(resumed.model), whole)


def test_small_updates_arrive_on_average(tmp_path):
    """Updates of 1e-5 are below half of a bfloat16 step for weights above 0.005: rounded to nearest they vanish."""
    moved = {}
    for name, dtype, options in (
        ("float32", torch.float32, {}),
        ("nearest", torch.bfloat16, {}),
        ("by chance", torch.bfloat16, ROUNDED),
    ):
        pipeline = load_pipeline()
        # Weights that bfloat16 holds, so that all begin alike.
        pipeline.unet.to(torch.bfloat16).to(dtype)
        start = {key: value.double().clone() for key, value in pipeline.unet.state_dict().items()}
        trainer = trainer_with(pipeline, tmp_path / name, save_strategy="no", **options)
        trainer.train()
        difference = [(value.double() - start[key]).flatten() for key, value in trainer.model.state_dict().items()]
        large = torch.cat([value.abs().flatten() for value in start.values()]) > 0.05
        moved[name] = torch.cat(difference)[large]
    expected = moved["float32"]
    # How much of the movement in float32 there is: the rest is noise of rounding, which is independent of it.
    share = {name: float((own @ expected) / (expected @ expected)) for name, own in moved.items()}
    assert share["nearest"] < 0.05
    assert 0.7 < share["by chance"] < 1.3


def test_only_rounding_to_nearest_is_warned_about(tmp_path, caplog):
    for options, warned in (({}, True), (ROUNDED, False)):
        pipeline = build_tiny_pipeline()
        pipeline.unet.to(torch.bfloat16)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            trainer_with(pipeline, tmp_path, **options)
        assert any("round by chance" in record.message for record in caplog.records) == warned

"""DiffusionNFT offline, and online from prompts and a reward."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from peft import LoraConfig
from PIL import ImageStat

from trl_diffusion_pref import encode_dataset, estimate_memory
from trl_diffusion_pref.algorithms.diffusion_nft.advantages import liked_by_score, with_liked
from trl_diffusion_pref.algorithms.diffusion_nft.config import DiffusionNFTConfig
from trl_diffusion_pref.algorithms.diffusion_nft.generation import OnlineRewardError
from trl_diffusion_pref.algorithms.diffusion_nft.old_policy import in_pipeline, old_policy_decay
from trl_diffusion_pref.algorithms.diffusion_nft.trainer import DiffusionNFTTrainer
from trl_diffusion_pref.data.batch import MEAN
from trl_diffusion_pref.shapes import preference_pairs, prompts


def brightness(prompts, samples, **columns):
    return [ImageStat.Stat(sample.convert("L")).mean[0] / 255 for sample in samples]


def config(folder, **options) -> DiffusionNFTConfig:
    defaults = {
        "output_dir": str(folder / "output"),
        "dataset_cache_dir": str(folder / "cache"),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "report_to": "none",
        "divergence_guard": "off",
    }
    return DiffusionNFTConfig(**{**defaults, **options})


# What these are where nobody sets them.
OFFLINE = {"prompts_per_rollout": 48, "num_generations": 24, "num_inference_steps": 10}
ONLINE = {"start": "noise", "prompts_per_rollout": 2, "num_generations": 4, "num_inference_steps": 2}


def online(folder, reward=brightness, lora=False, eval_rows=None, **options) -> DiffusionNFTTrainer:
    """Phases of two steps of four samples in two micro-batches."""
    data = Dataset.from_dict({"prompt": prompts()[:5], "number": list(range(5))})
    return DiffusionNFTTrainer(
        build_tiny_pipeline(),
        config(folder, **{"gradient_accumulation_steps": 2, **ONLINE, **options}),
        data,
        data.select(range(eval_rows)) if eval_rows else None,
        reward_funcs=reward,
        peft_config=LoraConfig(r=2, lora_alpha=4) if lora else None,
    )


def offline(folder, data, **options) -> DiffusionNFTTrainer:
    return DiffusionNFTTrainer(build_tiny_pipeline(), config(folder, **options), data)


def scored(column="score", values=(3.0, 1.0, 2.0, 2.0)) -> Dataset:
    rows = preference_pairs(4, seed=7).remove_columns("rejected").rename_column("chosen", "image")
    rows = rows.remove_columns("prompt").add_column("prompt", ["a red circle"] * 2 + ["a blue square"] * 2)
    return rows.add_column(column, list(values))


# ---- Scores and labels ----------------------------------------------------------------------------------------------


def test_scores_are_compared_within_their_prompt():
    scores, groups = np.array([1.0, 2.0, 3.0, 10.0, 30.0, 7.0]), np.array([0, 0, 0, 1, 1, 2])
    liked, equal = liked_by_score(scores, groups, "group", 5.0)
    deviation = math.sqrt(2 / 3) + 1e-4
    wanted = [0.5 - 0.1 / deviation, 0.5, 0.5 + 0.1 / deviation, 0.5 - 1 / 10.0001, 0.5 + 1 / 10.0001, 0.5]
    np.testing.assert_allclose(liked, wanted, rtol=1e-5)
    assert equal.tolist() == [False] * 5 + [True]
    liked, _ = liked_by_score(scores, groups, "batch", 5.0)
    np.testing.assert_allclose(liked[4] - 0.5, 0.1 * 10 / (scores.std() + 1e-4), rtol=1e-6)
    # Rounding of a mean is no difference.
    liked, equal = liked_by_score(np.full(3, 0.1), np.zeros(3, dtype=np.int64), "group", 5.0)
    assert liked.tolist() == [0.5] * 3 and equal.all()


@pytest.mark.parametrize("column", ["score", "reward"])
def test_a_column_of_scores_becomes_labels(column, tmp_path):
    trainer = offline(tmp_path, scored(column))
    labels = trainer.train_dataset.scalars["label"]
    np.testing.assert_allclose(labels, [0.6, 0.4, 0.5, 0.5], atol=1e-4)


def test_pairs_become_a_liked_and_a_disliked_row(tmp_path):
    pairs = preference_pairs(2, seed=7)
    trainer = offline(tmp_path, pairs)
    assert trainer.train_dataset.scalars["label"].tolist() == [1.0, 0.0, 1.0, 0.0]
    soft = offline(tmp_path, pairs.add_column("soft_label", [0.75, 1.0])).train_dataset
    np.testing.assert_allclose(soft.scalars["label"], [0.75, 0.25, 1.0, 0.0])


def test_scores_that_mean_nothing_raise():
    with pytest.raises(ValueError, match="row 2, column 'score': nan is no finite number"):
        with_liked(scored(values=(1.0, 2.0, math.nan, 3.0)), "train_dataset", "group", 5.0)
    with pytest.raises(ValueError, match="score and label"):
        with_liked(scored().add_column("label", [1, 0, 1, 0]), "train_dataset", "group", 5.0)
    with pytest.raises(ValueError, match="streamed, and the scores"):
        with_liked(scored().to_iterable_dataset(), "train_dataset", "group", 5.0)


def test_precomputed_references_raise(tmp_path):
    with pytest.raises(ValueError, match="mixes its predictions"):
        config(tmp_path, reference="precomputed")


# ---- Offline --------------------------------------------------------------------------------------------------------


def test_at_the_start_liked_and_disliked_losses_are_alike(tmp_path):
    """There model and old policy are one, so that both sides have one error, and the loss does not depend on p."""
    losses = []
    for labels in ([1.0] * 4, [0.0, 0.3, 0.0, 0.3]):
        rows = scored().remove_columns("score").add_column("label", labels)
        trainer = offline(tmp_path, rows, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# ---- Online ---------------------------------------------------------------------------------------------------------


def test_online_equals_offline_on_the_same_samples(tmp_path, monkeypatch):
    """The samples of the first phase as a data set with their scores: one step on each of its batches."""
    kept = {}
    trainer = online(tmp_path / "online", max_steps=2, gradient_accumulation_steps=2, optim="sgd", max_grad_norm=0.0)
    made = trainer.generator.samples

    def samples(prompts, seeds):
        kept["prompts"], kept["samples"] = prompts, made(prompts, seeds)
        return kept["samples"]

    monkeypatch.setattr(trainer.generator, "samples", samples)
    batches, compute = [], trainer.compute_losses

    def compute_losses(model, batch, mode):
        batches.append(batch)
        return compute(model, batch, mode)

    monkeypatch.setattr(trainer, "compute_losses", compute_losses)
    trainer.train()
    rows = Dataset.from_dict({"prompt": kept["prompts"], "image": kept["samples"]})
    rows = rows.add_column("score", brightness(None, kept["samples"]))
    options = {"optim": "sgd", "max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "latent_sampling": "mean"}
    stored = offline(tmp_path / "offline", rows, **options)
    order = [number for step in (0, 1) for number in trainer.rollouts._numbers(0, step)]
    assert sorted(order) == list(range(8))
    encoded = [stored.train_dataset[number] for number in order]
    for batch, first in zip(batches, range(0, 8, 2), strict=True):
        wanted = torch.stack([row[MEAN] for row in encoded[first : first + 2]]).transpose(0, 1)
        assert torch.equal(batch.posterior.mean, wanted)
        labels = torch.stack([row["scalar/label"] for row in encoded[first : first + 2]])
        torch.testing.assert_close(batch.scalars["label"], labels)
    # The same batches in the same order, with the same noise, give the same weights.
    loader = [stored.data_collator(encoded[first : first + 2]) for first in range(0, 8, 2)]
    monkeypatch.setattr(stored, "get_train_dataloader", lambda: loader)
    stored.args.max_steps = 2
    stored.train()
    assert_equal_weights(weights_of(trainer.model), weights_of(stored.model))


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_a_run_resumed_in_a_phase_or_at_its_border_is_the_same(lora, tmp_path):
    options = {"max_steps": 5, "num_iterations": 2, "prompts_per_rollout": 1, "gradient_accumulation_steps": 1}
    whole = online(tmp_path / "whole", lora=lora, save_strategy="steps", save_steps=1, **options)
    # Phases of four steps: 3 is within the first, 4 its end.
    whole.train()
    for step in (3, 4):
        again = online(tmp_path / str(step), lora=lora, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "output" / f"checkpoint-{step}"))
        assert_equal_weights(weights_of(whole.model), weights_of(again.model))
        for name, tensor in whole.old_policy.parameters().items():
            assert torch.equal(tensor, again.old_policy.parameters()[name])


def test_four_micro_batches_of_one_equal_one_batch_of_four(tmp_path):
    runs = []
    for batch, accumulation in ((4, 1), (1, 4)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        trainer = online(tmp_path / str(batch), optim="sgd", max_grad_norm=0.0, **options)
        trainer.train()
        runs.append(weights_of(trainer.model))
    for key, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][key], tensor, rtol=1e-4, atol=1e-5)


def test_evaluation_does_not_change_training_and_reports_rewards(tmp_path):
    weights = []
    for evaluation in ({}, {"eval_rows": 3, "eval_strategy": "steps", "eval_steps": 1}):
        trainer = online(tmp_path, max_steps=3, **evaluation)
        trainer.train()
        weights.append(weights_of(trainer.model))
    assert_equal_weights(*weights)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_reward"] == second["eval_reward"] == first["eval_scores/brightness"]
    assert 0 < first["eval_reward"] < 1


def test_samples_come_from_the_old_policy_and_leave_the_model_as_it_was(tmp_path):
    trainer = online(tmp_path)
    start, asked = trainer.generator.samples(prompts()[:1], [3])[0], (prompts()[:1], [3])
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05)
    moved = weights_of(trainer.model)
    with in_pipeline(trainer.old_policy, trainer.unwrapped):
        assert trainer.generator.samples(*asked)[0].tobytes() == start.tobytes()
    assert_equal_weights(weights_of(trainer.model), moved)
    assert trainer.generator.samples(*asked)[0].tobytes() != start.tobytes()


def test_the_old_policy_moves_at_the_end_of_a_phase_alone(tmp_path):
    trainer = online(tmp_path, max_steps=2)
    start = {name: tensor.clone() for name, tensor in trainer.old_policy.parameters().items()}
    seen = []
    trainer.old_policy.move_towards = lambda model, alpha: seen.append((trainer.state.global_step, alpha))
    trainer.train()
    assert seen == [(2, 1 - 0.002)]
    assert all(torch.equal(tensor, start[name]) for name, tensor in trainer.old_policy.parameters().items())
    assert [old_policy_decay(step, "half") for step in (0, 100, 500, 900)] == [0.0, 0.1, 0.5, 0.5]
    assert [old_policy_decay(step, "slow") for step in (0, 75, 95, 900)] == pytest.approx([0.0, 0.0, 0.15, 0.999])


def test_a_reward_that_fails_saves_a_checkpoint_and_names_the_prompt(tmp_path):
    calls = []

    def failing(prompts, samples, **columns):
        calls.append(prompts)
        if len(calls) > 1:
            raise OSError("the server is gone")
        return brightness(prompts, samples)

    trainer = online(tmp_path, failing, max_steps=4)
    message = r"(?s)reward 'failing': raised OSError: the server is gone.*checkpoint-2.*resume_from_checkpoint=True"
    with pytest.raises(OnlineRewardError, match=message):
        trainer.train()
    whole = online(tmp_path / "whole", max_steps=4)
    whole.train()
    again = online(tmp_path, max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert_equal_weights(weights_of(whole.model), weights_of(again.model))


def test_rewards_are_weighted_and_get_the_data_sets_other_columns(tmp_path):
    def number(prompts, samples, **columns):
        assert [prompts.index(prompt) >= 0 for prompt in prompts]
        return [float(one) for one in columns["number"]]

    trainer = online(tmp_path, [brightness, number], reward_weights=[0.0, 2.0], max_steps=1)
    trainer.train()
    rows = trainer.rollouts.rows
    assert all(row["scalar/reward"] == 2 * row["scalar/scores/number"] == 2 * row["row"] for row in rows.values())
    # Samples of a prompt score alike, so that none is liked.
    assert all(row["scalar/label"] == 0.5 and row["scalar/frac_reward_zero_std"] == 1 for row in rows.values())


def test_held_out_prompts_have_columns_too(tmp_path):
    def number(prompts, samples, **columns):
        return [float(one) for one in columns["number"]]

    trainer = online(tmp_path, number, eval_rows=3)
    assert trainer.evaluate()["eval_reward"] == 1.0
    others = Dataset.from_dict({"prompt": prompts()[6:8], "number": [10, 20]})
    assert trainer.evaluate(others)["eval_reward"] == 15.0
    assert trainer.evaluate({"a": others, "b": others.select([1])})["eval_b_reward"] == 20.0
    assert trainer.evaluate()["eval_reward"] == 1.0


def test_an_adapter_that_was_trained_before_is_the_reference_and_another_samples(tmp_path):
    pipeline = build_tiny_pipeline()
    carried = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.unet.add_adapter(carried, adapter_name="trained_before")
    data = Dataset.from_dict({"prompt": prompts()[:4]})
    options = config(tmp_path, **ONLINE, gradient_accumulation_steps=2, max_steps=2)
    trainer = DiffusionNFTTrainer(pipeline, options, data, reward_funcs=brightness)
    trainer.train()
    assert {"reference", "old_policy"} < set(trainer.model.peft_config)
    # The policy moved at the end of the phase, and the reference did not.
    reference, old = trainer.reference.live.parameters(), trainer.old_policy.parameters()
    moved = {name.replace(".old_policy.", ".reference."): tensor for name, tensor in old.items()}
    assert moved.keys() == reference.keys()
    assert any(not torch.equal(tensor, reference[name]) for name, tensor in moved.items())
    assert trainer.state.log_history[0]["kl"] == 0 < trainer.state.log_history[1]["kl"]


def test_prompts_can_be_encoded_before(tmp_path):
    data = Dataset.from_dict({"prompt": prompts()[:5]})
    options = config(tmp_path, **ONLINE, gradient_accumulation_steps=2, max_steps=1)
    encoded = encode_dataset(build_tiny_pipeline(), data, options)
    trainer = DiffusionNFTTrainer(build_tiny_pipeline(), options, encoded, reward_funcs=brightness)
    trainer.train()
    assert len(trainer.rollouts.rows) == 8


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, ONLINE], ids=["offline", "online"])
def test_memory_is_estimated_with_its_frozen_models(options, tmp_path):
    estimate = estimate_memory(build_tiny_pipeline(), config(tmp_path, **options))
    copies = 2 if options else 1
    assert estimate.reference == copies * estimate.weights


def test_all_prompts_are_sampled_once_before_any_again(tmp_path):
    trainer = online(tmp_path, max_steps=1)
    assert sorted(trainer.rollouts._index(group) for group in range(5)) == list(range(5))
    assert sorted(trainer.rollouts._index(group) for group in range(5, 10)) == list(range(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1}, "without end, so set the number of steps"),
        ({"num_generations": 3}, "6 samples, which is no multiple of the 4"),
        ({"sampling_scheduler": "Nothing"}, "no scheduler of this name"),
        ({"sampling_scheduler": "FlowMatchEulerDiscreteScheduler"}, "another kind of model"),
        ({"reward_weights": [1.0, 2.0]}, "for each of the 1 reward_funcs"),
        ({"reward": None}, "there are none"),
        ({"start": "data", **OFFLINE}, "trains on stored ones"),
    ],
)
def test_options_that_cannot_be_used_raise(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        online(tmp_path, **options)


def test_another_scheduler_can_sample(tmp_path):
    trainer = online(tmp_path, max_steps=1, sampling_scheduler="DPMSolverMultistepScheduler")
    own = trainer.encoders.pipeline.scheduler
    trainer.train()
    assert type(trainer.generator.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert trainer.encoders.pipeline.scheduler is own


@pytest.mark.slow
def test_two_processes_train_on_the_samples_of_one_and_stop_together(tmp_path):
    script, results = str(Path(__file__).parents[1] / "helpers" / "nft_run.py"), {}
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        output.mkdir()
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(several if processes > 1 else []), script, str(output), str(4 // processes)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        results[processes] = [json.loads((output / f"rank-{rank}.json").read_text()) for rank in range(processes)]
        assert (output / "failing" / "checkpoint-2" / "trainer_state.json").is_file()
    (one,), (first, second) = results[1], results[2]
    assert first["weights"] == second["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-4)
    assert sorted(first["own"] + second["own"]) == one["own"] == list(range(8))
    assert "OSError: gone" in first["failure"] and "OSError: gone" in second["failure"]

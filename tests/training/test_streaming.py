"""Training on streams: in one process and in two, resumed, evaluated, stopped."""

import json
import os
import subprocess
import sys
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.layout_files import pick_a_pic
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from transformers import TrainerCallback

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOTrainer, SelfNPOConfig, SelfNPOTrainer
from trl_diffusion_pref.data import load_pairs
from trl_diffusion_pref.export.weights import read_run_record


@pytest.fixture
def streamed(config, pairs):
    """Makes trainers on a stream of the sixteen pairs in four parts, with six steps of four."""

    def make(source: Dataset | None = None, parts: int = 4, callbacks=None, **options) -> MaPOTrainer:
        defaults = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        stream = (source or pairs).to_iterable_dataset(num_shards=parts)
        return MaPOTrainer(build_tiny_pipeline(), config(**{**defaults, **options}), stream, callbacks=callbacks)

    return make


# Four steps are an epoch.
@pytest.mark.parametrize(("workers", "buffer", "saved"), [(0, 0, 3), (2, 0, 5), (0, 256, 5), (2, 6, 3)])
def test_a_resumed_run_ends_with_the_weights_of_a_whole_one(workers, buffer, saved, streamed, tmp_path):
    options = {"dataloader_num_workers": workers, "shuffle_buffer": buffer, "save_steps": saved}
    whole = streamed(**options)
    whole.train()
    again = streamed(output_dir=str(tmp_path / "again"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "output" / f"checkpoint-{saved}"))
    assert_equal_weights(weights_of(again.model), weights_of(whole.model))
    epochs = [entry["epoch"] for entry in again.state.log_history if "loss" in entry]
    assert epochs[-1] == pytest.approx(1.0) and epochs == sorted(epochs) and len(epochs) == 6


def test_the_order_decides_the_weights_and_the_seed_the_order(streamed, tmp_path):
    def end(name: str, **options) -> dict[str, torch.Tensor]:
        trainer = streamed(output_dir=str(tmp_path / name), max_steps=2, save_strategy="no", **options)
        trainer.train()
        return weights_of(trainer.model)

    first = end("first")
    assert_equal_weights(first, end("second"))
    with pytest.raises(AssertionError):
        assert_equal_weights(first, end("third", data_seed=1))


def test_resuming_with_other_workers_names_both_numbers(streamed, tmp_path):
    streamed(dataloader_num_workers=2, max_steps=3).train()
    for options, message in (
        ({"dataloader_num_workers": 4}, r"\(dataloader_num_workers\) was 2 and is 4"),
        ({"dataloader_num_workers": 2, "shuffle_buffer": 7}, "shuffle_buffer was 256 and is 7"),
        ({"dataloader_num_workers": 2, "parts": 3}, "the stream's number of shards was 4 and is 3"),
    ):
        with pytest.raises(ValueError, match=f"The place in the stream in .* cannot be continued: .*{message}"):
            streamed(**options).train(resume_from_checkpoint=True)


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_workers(streamed):
    trainer = streamed(dataloader_num_workers=2, callbacks=[Stops()])
    with pytest.raises(KeyboardInterrupt) as error:
        trainer.train()
    assert error.traceback and not active_children()
    # And the same trainer begins again.
    trainer.remove_callback(Stops)
    assert trainer.train().global_step == 6 and not active_children()


def test_an_evaluation_gives_the_metrics_of_the_stored_data_set(config, pairs):
    """Five of eleven pairs are in the last batches; the accuracies compare with the starting weights."""
    held_out, metrics = pairs.select(range(11)), []
    for eval_dataset in (held_out, held_out.to_iterable_dataset(num_shards=3)):
        trainer = MaPOTrainer(
            build_tiny_pipeline(), config(max_steps=2, eval_strategy="steps", eval_steps=1), pairs, eval_dataset
        )
        trainer.train()
        metrics.append([entry for entry in trainer.state.log_history if "eval_loss" in entry])
    stored, streamed = (
        [{k: v for k, v in entry.items() if "per_second" not in k and "runtime" not in k} for entry in run]
        for run in metrics
    )
    assert len(stored) == 2 and "eval_preference_accuracy" in stored[0]
    assert streamed == [pytest.approx(entry, rel=1e-4, abs=1e-6) for entry in stored]


def test_rows_left_out_are_in_the_run_s_record(streamed, pairs, tmp_path):
    bad = pairs.map(lambda row, n: {"prompt": "" if n in (2, 9) else row["prompt"]}, with_indices=True)
    streamed(bad, on_bad_row="skip", max_bad_share=0.2, max_steps=3).train()
    assert read_run_record(tmp_path / "output" / "checkpoint-3")["data"]["left_out"] == {"empty prompt": 2}
    with pytest.raises(ValueError, match="2 of the first 16 rows cannot be used, 12%.*max_bad_share=0.1"):
        streamed(bad, on_bad_row="skip").train()


def test_every_algorithm_and_pick_a_pic_s_bytes_train(config, tmp_path):
    pairs = load_pairs(pick_a_pic(tmp_path), streaming=True)
    common = {
        name: value
        for name, value in config(max_steps=2).to_dict().items()
        if name in ("output_dir", "max_steps", "save_strategy", "per_device_train_batch_size", "disable_tqdm")
    }
    stored = load_pairs(pick_a_pic(tmp_path))
    assert MaPOTrainer(build_tiny_pipeline(), config(max_steps=2), pairs).train().global_step == 2
    dpo = DiffusionDPOConfig(**common, activation_checkpointing=False)
    assert DiffusionDPOTrainer(build_tiny_pipeline(), dpo, pairs).train().global_step == 2
    npo = SelfNPOConfig(**common, activation_checkpointing=False, solver_steps=4, truncated_steps=2)
    prompts = stored.select_columns("prompt").to_iterable_dataset()
    assert SelfNPOTrainer(build_tiny_pipeline(), npo, prompts).train().global_step == 2


# ---- Two processes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, pairs):
    """What each of two gloo processes saw."""
    folder = tmp_path_factory.mktemp("streamed")
    pairs.save_to_disk(folder / "pairs")
    script = str(Path(__file__).parents[1] / "helpers" / "distributed_stream_run.py")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    done = subprocess.run(
        [*command, str(folder), str(folder / "pairs")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_with_two_workers_each_see_every_pair_once(run):
    _, ranks = run
    latents = [[value for step in rank["whole"]["latents"] for value in step] for rank in ranks]
    epochs = [sorted(latents[0][start : start + 8] + latents[1][start : start + 8]) for start in (0, 8)]
    assert len(set(epochs[0])) == 16
    assert epochs[0] == pytest.approx(epochs[1], rel=1e-4)


@pytest.mark.slow
def test_two_processes_go_on_where_each_of_them_was(run):
    _, ranks = run
    for rank in ranks:
        assert rank["resumed"]["latents"] == rank["whole"]["latents"][3:]
        assert rank["resumed"]["weights"] == rank["whole"]["weights"]
    assert ranks[0]["whole"]["weights"] == ranks[1]["whole"]["weights"]
    assert ranks[0]["whole"]["accuracy"] == ranks[1]["whole"]["accuracy"]


@pytest.mark.slow
def test_processes_and_steps_have_noise_of_their_own(run):
    _, ranks = run
    keys = [tuple(key) for rank in ranks for step in rank["whole"]["noise"] for key in step]
    assert len(set(keys)) == len(keys) == 32


@pytest.mark.slow
def test_batches_of_unequal_size_are_logged_and_checked_together(run):
    _, ranks = run
    first, second = (rank["uneven"] for rank in ranks)
    assert [[len(step) for step in rank["latents"]] for rank in (first, second)] == [[2, 2], [1, 1]]
    assert first["weights"] == second["weights"] and first["logged"] == second["logged"]
    assert first["mean"] == second["mean"] == pytest.approx((1 + 2 + 1) / 3)
    assert "the loss is nan for the rows [10] of train_dataset" in first["error"] == second["error"]


@pytest.mark.slow
def test_another_number_of_processes_is_named(run, streamed):
    folder, _ = run
    trainer = streamed(dataloader_num_workers=2, shuffle_buffer=4)
    with pytest.raises(ValueError, match="cannot be continued: the number of processes was 2 and is 1"):
        trainer.train(resume_from_checkpoint=str(folder / "whole" / "output" / "checkpoint-3"))

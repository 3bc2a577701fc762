"""What every algorithm gets from the loop, shown on the package's and on two made-up ones, of under 60 lines each."""

import inspect
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline
from helpers import ranking, votes
from helpers.algorithms import ALL, rows, trainer_for
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from helpers.processes import run_helper
from safetensors.torch import load_file

import trl_diffusion_pref
from trl_diffusion_pref.algorithms import TRAINERS
from trl_diffusion_pref.algorithms.mapo.loss import mapo_loss


PACKAGE = Path(trl_diffusion_pref.__file__).parent
every_algorithm = pytest.mark.parametrize("name", ALL)
# Without the made-up ones, which `make test-all` has.
OWN = [pytest.param(name, marks=() if name in TRAINERS else pytest.mark.slow) for name in ALL]
every_own_algorithm = pytest.mark.parametrize("name", OWN)
# Of the others, `make test-all` trains LoRAs too.
LORAS = ("mapo", "diffusion-dpo", "self-npo")
FULL_AND_LORA = [
    *(pytest.param(name, False, id=f"full-{name}") for name in ALL),
    *(pytest.param(name, True, id=f"lora-{name}", marks=() if name in LORAS else pytest.mark.slow) for name in ALL),
]


@pytest.mark.parametrize(("name", "lora"), FULL_AND_LORA)
def test_it_trains_evaluates_resumes_and_saves(name, lora, tmp_path):
    whole = trainer_for(name, tmp_path / "whole", lora, save_strategy="steps", save_steps=2, use_ema=True)
    whole.train()
    assert all(math.isfinite(entry["loss"]) for entry in whole.state.log_history if "loss" in entry)
    first, second = whole.evaluate(), whole.evaluate()
    assert first["eval_loss"] == second["eval_loss"] and math.isfinite(first["eval_ema_loss"])
    resumed = trainer_for(name, tmp_path / "resumed", lora, use_ema=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "output" / "checkpoint-2"))
    assert_equal_weights(weights_of(whole.model), weights_of(resumed.model))
    assert_equal_weights(whole.checkpointer.ema.state_dict(), resumed.checkpointer.ema.state_dict())
    whole.save_model()
    folder = tmp_path / "whole" / "output"
    # No link to a paper without one.
    assert "arxiv.org/abs/)" not in (folder / "README.md").read_text()
    loaded = build_tiny_pipeline() if lora else StableDiffusionPipeline.from_pretrained(folder)
    if lora:
        loaded.load_lora_weights(folder)
    x, t, embeds = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 16, 32)
    with torch.no_grad():
        ours, theirs = (pipeline.unet.eval()(x, t, embeds).sample for pipeline in (whole.pipeline, loaded))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@every_own_algorithm
def test_four_micro_batches_of_one_equal_one_batch_of_four(name, tmp_path):
    runs = []
    for batch, accumulation in ((4, 1), (1, 4)):
        trainer = trainer_for(
            name,
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_steps=2,
            max_grad_norm=0.0,
            dataset_cache_dir=str(tmp_path / "cache"),
        )
        trainer.train()
        runs.append(weights_of(trainer.model))
    for key, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][key], tensor, rtol=1e-4, atol=1e-5)


@every_own_algorithm
@pytest.mark.parametrize("strategy", ["steps", pytest.param("epoch", marks=pytest.mark.slow)])
def test_a_run_resumed_at_its_end_takes_no_further_step(name, strategy, tmp_path):
    """Killed while the finished model was written, say: three steps of an epoch of four."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    whole = trainer_for(name, tmp_path, **options)
    whole.train()
    resumed = trainer_for(name, tmp_path, **options, logging_strategy=strategy)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert_equal_weights(weights_of(whole.model), weights_of(resumed.model))


@every_own_algorithm
def test_evaluation_does_not_change_training(name, tmp_path):
    weights = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = trainer_for(name, tmp_path, max_steps=3, **evaluation)
        trainer.train()
        weights.append(weights_of(trainer.model))
    assert_equal_weights(*weights)


@every_algorithm
def test_a_lora_starts_as_its_seed_says(name, tmp_path):
    starts = []
    for drawn_before, seed in ((0, 1), (5, 1), (0, 2)):
        torch.manual_seed(9)
        torch.rand(drawn_before)
        starts.append(weights_of(trainer_for(name, tmp_path, lora=True, seed=seed, output_dir=f"{tmp_path}/o").model))
    assert_equal_weights(starts[0], starts[1])
    assert any(not torch.equal(starts[0][key], starts[2][key]) for key in starts[0] if "lora_A" in key)


def run(name: str, folder: Path, what: str, processes: int = 1) -> subprocess.CompletedProcess:
    return run_helper("algorithm_run.py", name, str(folder), what, processes=processes)


@pytest.mark.slow
@every_algorithm
def test_a_killed_process_resumes_to_the_same_weights(name, tmp_path):
    assert run(name, tmp_path / "killed", "kill").returncode == -signal.SIGKILL
    for folder, what in (("killed", "resume"), ("whole", "train")):
        done = run(name, tmp_path / folder, what)
        assert done.returncode == 0, done.stderr[-3000:]
    file = "output/unet/diffusion_pytorch_model.safetensors"
    assert_equal_weights(load_file(tmp_path / "killed" / file), load_file(tmp_path / "whole" / file))


def weights_in(folder: Path, lora: bool) -> dict[str, torch.Tensor]:
    file = "pytorch_lora_weights.safetensors" if lora else "unet/diffusion_pytorch_model.safetensors"
    return load_file(folder / "output" / file)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(("name", "lora"), [*((name, False) for name in ALL), *((name, True) for name in LORAS)])
def test_processes_train_and_evaluate_as_one_with_their_batches_together(name, lora, processes, tmp_path):
    seen = {}
    for count in (1, processes):
        done = run(name, tmp_path / str(count), "share-lora" if lora else "share", count)
        assert done.returncode == 0, done.stderr[-3000:]
        files = [tmp_path / str(count) / f"rank-{rank}.json" for rank in range(count)]
        seen[count] = [json.loads(file.read_text()) for file in files]
    first, *others = seen[processes]
    for other in others:
        assert first["weights"] == other["weights"] != first["start"] == other["start"]
        assert first["before"] == other["before"] and first["losses"] == other["losses"]
    assert first["before"] == pytest.approx(seen[1][0]["before"], rel=1e-5)
    # A beta of thousands makes as much of what float32 rounds away; other noise would change a loss by a tenth.
    assert len(first["losses"]) == 4 and first["losses"] == pytest.approx(seen[1][0]["losses"], rel=5e-4)
    one, several = (weights_in(tmp_path / str(count), lora) for count in (1, processes))
    for key, tensor in one.items():
        torch.testing.assert_close(several[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@every_algorithm
def test_processes_with_shards_of_the_weights_train_as_one_with_all(name, lora, tmp_path):
    seen = {}
    for count in (1, 2):
        done = run(name, tmp_path / str(count), "share-fsdp-lora" if lora else "share-fsdp", count)
        assert done.returncode == 0, done.stderr[-3000:]
        seen[count] = json.loads((tmp_path / str(count) / "rank-0.json").read_text())["losses"]
    assert len(seen[2]) == 4 and seen[2] == pytest.approx(seen[1], rel=5e-4)
    one, two = (weights_in(tmp_path / str(count), lora) for count in (1, 2))
    assert set(one) == set(two)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-5)


def test_an_error_leaves_the_options_as_they_were(tmp_path, monkeypatch):
    trainer = trainer_for("mapo", tmp_path, save_total_limit=3, dataloader_drop_last=True)

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(trainer, "_save_checkpoint", fail)
    monkeypatch.setattr(trainer, "_get_dataloader", fail)
    for call in (trainer._save_now, lambda: trainer._batches_in_order(trainer.train_dataset, 1)):
        with pytest.raises(OSError, match="no space left"):
            call()
    assert (trainer.args.save_total_limit, trainer.args.dataloader_drop_last) == (3, True)


@pytest.mark.parametrize("module", [votes, ranking], ids=["votes", "ranking"])
def test_the_made_up_algorithms_are_short(module):
    assert len(inspect.getsource(module).splitlines()) < 60


def test_the_made_up_losses_are_what_they_say(tmp_path):
    trainer = trainer_for("votes", tmp_path, push=0.5, max_steps=1, per_device_train_batch_size=8, eval_draws=0)
    trainer.train()
    values = trainer.evaluate()
    assert values["eval_liked"] == pytest.approx(1 / 3)
    trainer = trainer_for("ranking", tmp_path, max_steps=1)
    trainer.train()
    # At the start all rewards are 0, so the loss is the variance of the scores.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(
        torch.tensor([1.0, 0.2, -0.5]).var(correction=0).item()
    )


def test_a_list_of_another_length_is_named_by_row(tmp_path):
    data = rows("ranking").map(lambda row, i: {"images": row["images"][: 3 - (i == 4)]}, with_indices=True)
    config = ranking.RankingConfig(output_dir=str(tmp_path), dataset_cache_dir=str(tmp_path), weight_decay=0.0)
    with pytest.raises(ValueError, match="row 4, column 'images': found a list of 2, wanted a list of 3"):
        ranking.RankingTrainer(build_tiny_pipeline(), config, data)


def test_a_mapo_step_crosses_one_class_border(tmp_path):
    """Counted where a method of one of our trainer classes calls, through whatever stands between, one of another."""
    trainer = trainer_for("mapo", tmp_path, max_steps=1)
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    classes = [kind for kind in type(trainer).__mro__ if kind.__module__.startswith("trl_diffusion_pref")]
    owner_of = {
        function.__code__: kind for kind in classes for function in vars(kind).values() if inspect.isfunction(function)
    }
    stack, borders, files = [], [], set()

    def profile(frame, event, argument):
        if event == "call":
            if frame.f_code is type(trainer).compute_losses.__code__:
                files.clear()
            files.add(frame.f_code.co_filename)
            if frame.f_code is mapo_loss.__code__:
                reached.append(frozenset(files))
            if frame.f_code in owner_of:
                if stack and stack[-1] is not owner_of[frame.f_code]:
                    borders.append(frame.f_code.co_name)
                stack.append(owner_of[frame.f_code])
        elif event == "return" and frame.f_code in owner_of:
            stack.pop()

    reached = []
    inputs = trainer._prepare_inputs(batch)
    trainer.model.train()
    sys.setprofile(profile)
    try:
        trainer.compute_loss(trainer.model, inputs)
    finally:
        sys.setprofile(None)
    # Above an algorithm the loop, and what it has of files and of the Hub, which take no part in a step.
    assert [kind.__name__ for kind in classes] == [
        "MaPOTrainer",
        "DiffusionTrainer",
        "SavingTrainer",
        "PushingTrainer",
    ]
    assert borders == ["compute_losses"]
    # From `compute_losses`, which gets the batch, to the loss.
    on_the_way = sorted(str(Path(file).relative_to(PACKAGE)) for file in reached[0] if file.startswith(str(PACKAGE)))
    assert len(on_the_way) <= 9, on_the_way


def test_three_files_of_the_package_write_a_checkpoint(tmp_path):
    """Counted by the innermost file of the package that opens a file, unless transformers' loop stands between."""
    trainer = trainer_for("diffusion-dpo", tmp_path, divergence_guard="stop", max_steps=1)
    trainer.train()
    writers = set()

    def profile(frame, event, argument):
        opens = event == "c_call" and argument.__name__ in ("open", "serialize_file", "PyTorchFileWriter")
        if not opens and not (event == "call" and frame.f_code is torch.save.__code__):
            return
        while frame is not None and frame.f_code.co_filename != transformers.trainer.__file__:
            if frame.f_code.co_filename.startswith(str(PACKAGE)):
                writers.add(str(Path(frame.f_code.co_filename).relative_to(PACKAGE)))
                return
            frame = frame.f_back

    sys.setprofile(profile)
    try:
        trainer._save_checkpoint(trainer.model, trial=None)
    finally:
        sys.setprofile(None)
    assert (tmp_path / "output" / "checkpoint-1" / "training_args.bin").is_file()
    assert writers == {"training/checkpoint.py", "export/weights.py", "export/model_card.py"}

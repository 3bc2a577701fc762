"""A run that a signal asks to stop: it is saved, the process ends with status 0, and the same command goes on."""

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from helpers.algorithms import trainer_for
from helpers.pipelines import assert_equal_weights
from helpers.processes import run_helper
from transformers import TrainerCallback

from trl_diffusion_pref.training.checkpoint import last_usable_checkpoint
from trl_diffusion_pref.training.preemption import SIGNALS, Preempted, StopSignal


def run(folder: Path, *ask: str, processes: int = 1) -> subprocess.CompletedProcess:
    return run_helper("preempted_run.py", str(folder), *ask, processes=processes)


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_same_command_goes_on_where_a_signal_ended_it(processes, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(whole, processes=processes).returncode == 0
    # The second process alone is asked, and both must stop; the second time by the other signal.
    for name, step in (("SIGTERM", 2), ("SIGUSR1", 4)):
        done = run(stopped, name, str(step), str(processes - 1), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"Step {step + 1} of 6 is saved in {stopped}/output/checkpoint-{step + 1}" in done.stderr
        assert "resume_from_checkpoint='auto' goes on" in done.stderr
        # It did not go on as if it had finished.
        assert not (stopped / "result.json").exists() and not (stopped / "output/model_index.json").exists()
        assert last_usable_checkpoint(stopped / "output")[0].name == f"checkpoint-{step + 1}"
    assert run(stopped, processes=processes).returncode == 0
    assert result(stopped)["weights"] == result(whole)["weights"]
    # Of the logged steps, every one is there once.
    assert len(result(stopped)["losses"]) == len(result(whole)["losses"]) == 3


class At(TrainerCallback):
    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.newest  # the oldest begin a later epoch that was left in its middle with the first one's order
def test_a_run_that_goes_on_ends_as_one_that_was_never_stopped(tmp_path):
    options = {"gradient_accumulation_steps": 2, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    whole = trainer_for("mapo", tmp_path / "whole", max_steps=4, **options)
    whole.train()
    stopped = trainer_for("mapo", tmp_path / "stopped", max_steps=4, **options)
    stopped.add_callback(At(2, signal.SIGTERM))
    with pytest.raises(Preempted):
        stopped.train()
    again = trainer_for("mapo", tmp_path / "stopped", max_steps=4, **options)
    again.train(resume_from_checkpoint="auto")
    assert_equal_weights(again.model.state_dict(), whole.model.state_dict())


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path):
    trainer = trainer_for("mapo", tmp_path, max_steps=2)
    trainer.add_callback(At(1, signal.SIGTERM))
    assert trainer.train().global_step == 2
    assert not list((tmp_path / "output").glob("checkpoint-*"))


def test_a_stopped_run_keeps_its_checkpoint_whatever_is_kept(tmp_path):
    """transformers removes the last checkpoint of a run that keeps one, if another was better."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = trainer_for("mapo", tmp_path, learning_rate=1e-1, **options)
    trainer.add_callback(At(2, signal.SIGTERM))
    with pytest.raises(Preempted, match="Step 3 of 4 is saved") as stopped:
        trainer.train()
    assert stopped.value.code == 0
    assert (tmp_path / "output/checkpoint-3/trainer_state.json").is_file()
    assert not trainer.model.training


def test_signals_are_handled_as_before_outside_of_training(tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS]
    assert before == [signal.SIG_DFL] * len(SIGNALS)
    trainer = trainer_for("mapo", tmp_path, max_steps=1)
    trainer.train()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_handler_of_the_user_s_stays_and_threads_train_without_one():
    seen, listener = [], StopSignal()
    signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        with listener.listening():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert seen == [1] and listener.received is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert listener.received == "SIGTERM"
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    found = []

    def listen() -> None:
        with StopSignal().listening():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def test_auto_starts_where_there_is_nothing_and_true_refuses(tmp_path, caplog):
    trainer = trainer_for("mapo", tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="no complete checkpoint in .* or with 'auto' to start where there is none"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 1
    assert "so the run begins" in caplog.text

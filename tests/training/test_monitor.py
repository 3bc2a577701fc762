from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerState

from trl_diffusion_pref.diffusion.noise import RectifiedFlow
from trl_diffusion_pref.training.config import GuardedConfig
from trl_diffusion_pref.training.divergence import DivergenceError
from trl_diffusion_pref.training.metrics import joined, means_of
from trl_diffusion_pref.training.monitor import StepMonitor, non_finite_losses, non_finite_weights


class Checkpointer:
    """Stands for the run's: remembers what was marked."""

    def __init__(self, folder):
        self.output_dir, self.parts, self.marked = folder, {}, []

    def folder(self, step):
        return self.output_dir / f"checkpoint-{step}"

    def mark_as_diverged(self, folder, reason, *, should_save):
        self.marked.append((folder, reason))


def monitor(folder, guard="off") -> StepMonitor:
    window = {} if guard == "off" else {"divergence_window": 1}
    options = GuardedConfig(output_dir=str(folder), divergence_guard=guard, use_cpu=True, report_to="none", **window)
    return StepMonitor(options, Accelerator(cpu=True), Checkpointer(folder), lambda: Path("saved"), RectifiedFlow())


def test_means_are_of_the_interval_alone_and_each_metric_of_its_own_batches(tmp_path):
    watched = monitor(tmp_path)

    def record(**values):
        values = {name: torch.tensor([value]) for name, value in {"loss": 1.0, "time": 3.0, **values}.items()}
        watched.record(nn.Linear(1, 1), values, torch.tensor([0]), 0)

    record(margin=1.0, accuracy=0.5)
    record(margin=4.0)
    assert watched.take_means() == {"margin": 2.5, "accuracy": 0.5}
    record(margin=7.0)
    assert watched.take_means() == {"margin": 7.0}
    assert watched.take_means() == {}


def test_samples_without_a_value_are_left_out_of_its_mean_and_of_the_guard(tmp_path):
    nan, watched = float("nan"), monitor(tmp_path, "stop")
    values = {"loss": [1.0, 2.0], "mse/chosen": [nan, 0.1], "mse/ref_chosen": [nan, 0.1], "time": [500.0, 100.0]}
    values |= {"rewards/liked": [nan, 3.0], "rewards/disliked": [nan, nan]}
    watched.record(nn.Linear(1, 1), {name: torch.tensor(value) for name, value in values.items()}, torch.arange(2), 0)
    watched.on_step_end(None, TrainerState(global_step=1), None)
    assert watched.take_means() == pytest.approx({"rewards/liked": 3.0, "mse/chosen": 0.1, "mse/ref_chosen": 0.1})
    # A batch without any of them says nothing.
    values = {name: torch.tensor(value)[:1] for name, value in values.items()}
    watched.record(nn.Linear(1, 1), values, torch.arange(1), 1)
    watched.on_step_end(None, TrainerState(global_step=2), None)
    assert watched.take_means() == {}


def test_evaluation_means_are_over_the_samples_with_a_value():
    table = np.asarray([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    assert means_of(["loss", "liked", "disliked"], table) == {"loss": 2.0, "liked": 5.0}
    # Of losses none may be missing.
    assert np.isnan(means_of(["loss"], np.asarray([[np.nan], [1.0]]))["loss"])


@pytest.mark.parametrize("action", ["stop", "warn"])
def test_a_finding_stops_or_warns_and_says_what_to_do(action, tmp_path, caplog):
    watched = monitor(tmp_path, action)
    values = {"loss": 1.0, "mse/chosen": 0.2, "mse/ref_chosen": 0.1, "time": 500.0}
    values = {name: torch.tensor([value]) for name, value in values.items()}
    watched.record(nn.Linear(1, 1), values, torch.tensor([0]), 7)
    if action == "warn":
        watched.on_step_end(None, TrainerState(global_step=7), None)
        message = caplog.text
        assert not watched.checkpointer.marked
    else:
        with pytest.raises(DivergenceError) as error:
            watched.on_step_end(None, TrainerState(global_step=7), None)
        message = str(error.value)
        assert "the weights are in saved" in message
        assert watched.checkpointer.marked[0][0] == Path("saved")
    assert "At step 7" in message and "100% above" in message and "allowed: 25%" in message
    for option in ("learning_rate", "beta", "margin_clip", "winner_preserving_mu", "sft_weight"):
        assert option in message


def test_batches_of_unequal_length_are_joined():
    whole = np.arange(10.0).reshape(5, 2)
    assert np.array_equal(joined([whole[:3], whole[3:]]), whole)
    assert np.array_equal(joined(whole), whole)


def test_the_first_bad_loss_and_all_its_rows_are_named():
    losses, rows = torch.tensor([1.0, float("inf"), 2.0, float("nan")]), torch.tensor([4, 9, 2, 7])
    Accelerator(cpu=True)
    assert non_finite_losses(losses, rows) == "the loss is inf for the rows [7, 9] of train_dataset"
    assert non_finite_losses(losses[::2], rows[::2]) is None


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert non_finite_weights(model) == []
    with torch.no_grad():
        model[1].bias[0] = float("nan")
    assert non_finite_weights(model) == ["1.bias"]

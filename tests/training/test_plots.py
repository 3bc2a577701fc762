"""Plots of a run's log, read from matplotlib's own objects, against entries written out by hand."""

import json
import sys

import pytest
from datasets import Dataset
from matplotlib import pyplot
from matplotlib.figure import Figure

from trl_diffusion_pref import MaPOTrainer, SelfNPOConfig, SelfNPOTrainer
from trl_diffusion_pref.training.plots import plot_history


TRAINING = {"mse/chosen": 0.3, "mse/rejected": 0.4, "mse/ref_chosen": 0.35, "rewards/margins": 1.5}
OTHER = {"rewards/chosen": 1.0, "rewards/accuracies": 0.5, "learning_rate": 1e-4, "grad_norm": 2.0, "epoch": 1.0}
HISTORY = [
    {"loss": 0.7, **TRAINING, **OTHER, "step": 10},
    {
        "eval_loss": 0.65,
        "eval_mse/chosen": 0.2,
        "eval_preference_accuracy": 0.75,
        "eval_preference_accuracy_low": 0.625,
        "eval_preference_accuracy_high": 0.875,
        "eval_likelihood_accuracy": 0.5,
        "eval_base_likelihood_accuracy": 0.25,
        "eval_runtime": 3.0,
        "eval_samples_per_second": 5.0,
        "step": 10,
    },
    {"loss": 0.5, **TRAINING, **OTHER, "step": 20},
    {"train_runtime": 9.0, "train_loss": 0.6, "total_flos": 0.0, "step": 20},
]


def panels(figure: Figure) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Points of each line by the panels' titles and the lines' labels."""
    return {
        axes.get_title(): {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
        for axes in figure.axes
    }


def test_values_are_drawn_at_their_steps_by_kind():
    found = panels(plot_history(HISTORY))
    assert list(found) == ["loss", "denoising error", "margin", "held-out accuracy"]
    assert found["loss"] == {"loss": [(10, 0.7), (20, 0.5)], "loss, held out": [(10, 0.65)]}
    assert found["denoising error"] == {
        "chosen": [(10, 0.3), (20, 0.3)],
        "chosen, held out": [(10, 0.2)],
        "rejected": [(10, 0.4), (20, 0.4)],
        "chosen, reference": [(10, 0.35), (20, 0.35)],
    }
    assert (10, 1.5) in found["margin"]["margins"]


def test_the_held_out_accuracy_has_its_interval_and_the_base_s_value():
    figure = plot_history(HISTORY)
    (axes,) = (axes for axes in figure.axes if axes.get_title() == "held-out accuracy")
    found = panels(figure)["held-out accuracy"]
    assert found["preference accuracy"] == [(10, 0.75)]
    assert found["likelihood accuracy"] == [(10, 0.5)]
    assert found["likelihood accuracy, starting weights"] == [(10, 0.25)]
    assert [y for _, y in found["preference accuracy, starting weights"]] == [0.5, 0.5]
    (band,) = axes.collections
    assert {y for _, y in band.get_paths()[0].vertices} == {0.625, 0.875}


def test_several_evaluated_data_sets_have_lines_of_their_own():
    entries = [{"eval_art_loss": 0.1, "eval_photos_loss": 0.2, "step": 5}]
    assert panels(plot_history(entries))["loss"] == {
        "loss, held out art": [(5, 0.1)],
        "loss, held out photos": [(5, 0.2)],
    }


def test_a_metric_of_another_trainer_gets_a_panel():
    found = panels(plot_history([{"loss": 1.0, "kl_loss": 0.1, "step": 1}, {"eval_kl_loss": 0.2, "step": 1}]))
    assert found == {"loss": {"loss": [(1, 1.0)]}, "kl_loss": {"kl loss": [(1, 0.1)], "kl loss, held out": [(1, 0.2)]}}


def test_the_file_with_the_most_steps_of_an_output_folder_is_read(tmp_path):
    def write(folder, step):
        folder.mkdir(exist_ok=True)
        state = {"global_step": step, "log_history": [{"loss": float(step), "step": step}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))

    write(tmp_path / "checkpoint-2", 2)
    write(tmp_path / "checkpoint-10", 10)
    assert panels(plot_history(tmp_path))["loss"]["loss"] == [(10, 10.0)]
    write(tmp_path, 12)
    assert panels(plot_history(str(tmp_path)))["loss"]["loss"] == [(12, 12.0)]
    assert panels(plot_history(tmp_path / "checkpoint-2" / "trainer_state.json"))["loss"]["loss"] == [(2, 2.0)]


def test_what_cannot_be_plotted_is_an_error_that_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"save_state\(\)"):
        plot_history(tmp_path)
    with pytest.raises(ValueError, match="Nothing to plot"):
        plot_history([{"train_loss": 1.0, "step": 3}])
    with pytest.raises(ValueError, match="entry 0 has no step"):
        plot_history([{"loss": 1.0}])
    for text in ("[]", "{", '{"unknown": 1}'):
        (tmp_path / "trainer_state.json").write_text(text)
        with pytest.raises(ValueError, match="is no trainer_state.json"):
            plot_history(tmp_path)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "trl-diffusion-pref\[plot\]"'):
        plot_history(HISTORY)


def test_a_trainer_and_its_saved_state_are_plotted_alike(config, tiny_pipeline, pairs, tmp_path):
    args = config(max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=1)
    trainer = MaPOTrainer(tiny_pipeline, args, pairs, pairs.select(range(4)))
    trainer.train()
    figure = trainer.plot()
    assert list(panels(figure)) == ["loss", "denoising error", "margin", "held-out accuracy"]
    assert not pyplot.fignum_exists(figure.number)
    trainer.save_state()
    assert panels(plot_history(tmp_path / "output")) == panels(figure)


def test_self_npo_s_own_metrics_are_plotted(tiny_pipeline, tmp_path):
    args = SelfNPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        solver_steps=4,
        truncated_steps=2,
        disable_tqdm=True,
        dataset_cache_dir=str(tmp_path / "cache"),
    )
    trainer = SelfNPOTrainer(tiny_pipeline, args, Dataset.from_dict({"prompt": ["a cat", "a dog"]}))
    trainer.train()
    assert list(panels(trainer.plot())) == ["loss", "x0_error", "trajectories/begun"]

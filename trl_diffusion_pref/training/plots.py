"""Draws a run's log: loss, denoising errors, margins, held-out accuracy with its interval, and further metrics."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from transformers import Trainer
from transformers.trainer_callback import TrainerState

from .checkpoint import checkpoints


if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

# As text, since matplotlib need not be installed.
Figure: TypeAlias = "matplotlib.figure.Figure"
Axes: TypeAlias = "matplotlib.axes.Axes"

# transformers' own name, in the output folder (`save_state`) and in checkpoints.
_STATE = "trainer_state.json"
_ACCURACY = "preference_accuracy"
# Panels in their order, with the metrics that each shows. Any other metric that was logged gets a panel of its own.
_PANELS = {
    "loss": ("loss",),
    "denoising error": ("mse/chosen", "mse/rejected", "mse/ref_chosen"),
    "margin": ("rewards/margins",),
    "held-out accuracy": (_ACCURACY, "likelihood_accuracy", "base_likelihood_accuracy"),
}
# No metrics of the model; and what other panels show already: the margin is the difference of the two rewards, each of
# which moves with its error, and its sign is the training accuracy. The reference's error on chosen samples is drawn,
# since the divergence guard compares with it, and the one on rejected samples would only crowd the panel.
_LEFT_OUT = re.compile(
    r"train_.*|epoch|step|learning_rate|grad_norm|total_flos|num_input_tokens_seen"
    r"|eval_.*(runtime|_per_second)|(eval_)?(.+_)?(rewards/(chosen|rejected|accuracies)|mse/ref_rejected)"
)
_INTERVAL = ("_accuracy_low", "_accuracy_high")
_COLOURS = {"chosen": "C0", "rejected": "C3"}


def plot_history(history: str | os.PathLike[str] | Sequence[Mapping[str, Any]]) -> Figure:
    """Draws what a run has logged, one panel for each kind of metric that is there.

    Values of training are lines. Those of evaluations are dotted lines with a mark at each evaluation. The held-out
    accuracy has a band, its 95 % interval, and beside it lines for the starting weights: one half for the preference
    accuracy, which compares with them, and their own likelihood accuracy.

    Args:
        history: The output folder of a run, a checkpoint, or their `trainer_state.json`; or entries as
            `trainer.state.log_history` has them, each with `step`. Of an output folder's own file and that of its
            newest checkpoint, the one with more steps is read. Checkpoints hold the log up to their step;
            `trainer.save_state()` writes the whole one into the output folder.

    Returns:
        The figure: a notebook shows it, `savefig` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        FileNotFoundError: The folder has no log.
        ValueError: Nothing was logged, or the file is none of transformers'.

    Example:

    ```python
    from trl_diffusion_pref.training.plots import plot_history

    plot_history("mapo").savefig("mapo.png")
    ```
    """
    pyplot = _pyplot()
    entries = _read(Path(history)) if isinstance(history, str | os.PathLike) else list(history)
    curves = _curves(entries)
    metrics = [name for name in _metrics(curves) if name in curves or _evaluations(name, curves)]
    panels = {title: [name for name in names if name in metrics] for title, names in _PANELS.items()}
    panels |= {name: [name] for name in metrics if not any(name in names for names in panels.values())}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        raise ValueError(
            "Nothing to plot: no loss and no metric was logged. Train for at least logging_steps steps, or lower "
            "logging_steps."
        )
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(4.5 * columns, 2.8 * rows), squeeze=False)
    # The caller's now: pyplot would keep it in memory, and a notebook would show it twice.
    pyplot.close(figure)
    for axes, (title, names) in zip(grid.flat, panels.items(), strict=False):
        _draw(axes, title, names, curves)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.tight_layout()
    return cast(Figure, figure)


def plot_run(trainer: Trainer) -> Figure:
    """Draws what the trainer has logged so far; see [`plot_history`]."""
    return plot_history(trainer.state.log_history)


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            'Plots need matplotlib, which is not installed: pip install "trl-diffusion-pref[plot]"'
        ) from error
    return pyplot


def _read(path: Path) -> list[dict[str, Any]]:
    """The log in a `trainer_state.json`, or in the one of a folder that has the most steps."""
    files = [path] if path.is_file() else [file for file in _candidates(path) if file.is_file()]
    if not files:
        raise FileNotFoundError(
            f"{path} has no {_STATE}, nor has a checkpoint in it. Checkpoints hold one; trainer.save_state() writes "
            "one into the output folder."
        )
    states = []
    for file in files:
        try:
            states.append(TrainerState.load_from_json(str(file)))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(f"{file} is no {_STATE} of transformers: {error}") from error
    return max(states, key=lambda state: state.global_step).log_history


def _candidates(folder: Path) -> list[Path]:
    # A checkpoint that is being written has no state yet.
    newest = next((one for one in checkpoints(folder) if (one / _STATE).is_file()), None)
    return [folder / _STATE, *([newest / _STATE] if newest else [])]


def _curves(entries: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Values by step of each logged name; where a step was logged twice, as after resuming, the last one."""
    curves: dict[str, dict[int, float]] = {}
    for number, entry in enumerate(entries):
        if "step" not in entry:
            raise ValueError(f"history: entry {number} has no step. Pass trainer.state.log_history.")
        for name, value in entry.items():
            if isinstance(value, int | float) and not _LEFT_OUT.fullmatch(name):
                curves.setdefault(name, {})[int(entry["step"])] = float(value)
    return curves


def _metrics(curves: Iterable[str]) -> list[str]:
    """The metrics of the panels, and the other logged ones without "eval_" and the name of a data set."""
    names = [name for name in curves if not name.endswith(_INTERVAL)]
    found = [name for metrics in _PANELS.values() for name in metrics]
    found += [name for name in names if not name.startswith("eval_") and name not in found]
    for name in (name.removeprefix("eval_") for name in names if name.startswith("eval_")):
        if name not in found and not name.endswith(tuple(f"_{metric}" for metric in found)):
            found.append(name)
    return found


def _evaluations(metric: str, curves: Iterable[str]) -> dict[str, str]:
    """Logged names of a metric's evaluations by the data set's name, which is "" where there is one without a name."""
    # "eval_base_likelihood_accuracy" is no likelihood accuracy of a data set called "base".
    longer = tuple(f"_{name}" for name in _metrics(curves) if name.endswith(f"_{metric}"))
    found = {}
    for name in curves:
        match = re.fullmatch(rf"eval_(?:(.+)_)?{re.escape(metric)}", name)
        if match and not (longer and name.endswith(longer)):
            found[match.group(1) or ""] = name
    return found


def _draw(axes: Axes, title: str, metrics: Sequence[str], curves: Mapping[str, Mapping[int, float]]) -> None:
    for number, metric in enumerate(metrics):
        colour = next((value for part, value in _COLOURS.items() if metric.endswith(part)), f"C{number}")
        of_start = metric.startswith("base_")
        label = _label(metric)
        if metric in curves:
            style = "--" if "ref_" in metric else "-"
            axes.plot(*_points(curves[metric]), color=colour, linestyle=style, label=label)
        for dataset, logged in _evaluations(metric, curves).items():
            steps, values = _points(curves[logged])
            # An accuracy is always one of held-out pairs.
            held_out = "" if metric.endswith("_accuracy") else "held out"
            place = ", ".join(part for part in (label, f"{held_out} {dataset}".strip()) if part)
            style, marker = ("--", "") if of_start else (":", "o")
            axes.plot(steps, values, color=colour, linestyle=style, marker=marker, markersize=3, label=place)
            if f"{logged}_low" in curves:
                low, high = (_points(curves[f"{logged}_{end}"])[1] for end in ("low", "high"))
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, label="95 % interval")
    if _ACCURACY in metrics:
        axes.axhline(0.5, color="grey", linewidth=1, label="preference accuracy, starting weights")
    if "rewards/margins" in metrics:
        axes.axhline(0.0, color="grey", linewidth=1)
    axes.set(title=title, xlabel="step")
    axes.legend(fontsize="x-small", framealpha=0.5)


def _label(metric: str) -> str:
    name = metric.split("/")[-1].replace("_", " ")
    if metric.startswith("base_"):
        return f"{name.removeprefix('base ')}, starting weights"
    return f"{name.removeprefix('ref ')}, reference" if name.startswith("ref ") else name


def _points(curve: Mapping[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(curve)
    return steps, [curve[step] for step in steps]

"""Stops a run whose model forgets how to draw the chosen images, before it is wrecked."""

from collections import deque

from transformers import TrainerCallback


class DivergenceError(RuntimeError):
    """The chosen images' error rose above the reference's; the message names the checkpoint and what to change."""


class DivergenceGuard(TrainerCallback):
    """Compares the chosen images' mean error with the reference's over a window of steps.

    The easiest way to raise the margin of a preference loss is to lose both images, the rejected one faster; rewards
    and accuracies look splendid meanwhile. The chosen images' own error tells.

    Args:
        trainer: Saves the checkpoint.
        action: "stop" raises `DivergenceError` after saving a checkpoint; "warn" logs once per window.
        margin: By how much, relative to the reference's error, the mean over the window may rise.
        window: Steps.
    """

    def __init__(self, trainer, action: str, margin: float, window: int) -> None:
        self.trainer, self.action, self.margin = trainer, action, margin
        self.steps: deque[tuple[float, float]] = deque(maxlen=window)
        self._batches: list[tuple[float, float]] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.steps.clear()
        self._batches.clear()

    def record(self, chosen_error: float, reference_error: float) -> None:
        """Takes a micro-batch's means over all processes."""
        self._batches.append((chosen_error, reference_error))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not self._batches:
            return
        count = len(self._batches)
        self.steps.append(tuple(sum(values) / count for values in zip(*self._batches, strict=True)))
        self._batches.clear()
        if len(self.steps) < self.steps.maxlen:
            return
        chosen, reference = (sum(values) / len(self.steps) for values in zip(*self.steps, strict=True))
        if chosen <= (1 + self.margin) * reference:
            return
        self.steps.clear()
        what = (
            f"At step {state.global_step} the chosen images' denoising error is {chosen:.4g}, "
            f"{chosen / reference - 1:.0%} above the reference's {reference:.4g} over the last {self.steps.maxlen} "
            f"steps (allowed: {self.margin:.0%}). The model is losing the chosen images too, and soon its ability to "
            "draw."
        )
        advice = (
            "Start anew, or from an earlier checkpoint, with a lower learning_rate (try a tenth), a higher beta, "
            "margin_clip, winner_preserving_mu or sft_weight. divergence_guard='warn' only warns."
        )
        self.trainer.report_divergence(what, advice, stop=self.action == "stop")

"""Whether a run diverges, by the errors of its chosen samples."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from ..diffusion.noise import NoiseProcess


class DivergenceError(RuntimeError):
    """The chosen samples' error rose too far; the message names the checkpoint and what to change."""


class DivergenceGuard:
    """Stops a run whose model forgets how to generate the chosen samples, before it is wrecked.

    The easiest way to raise the margin of a preference loss is to lose both samples, the rejected one faster; rewards
    and accuracies look good meanwhile. The chosen samples' own error shows it. It is compared

    * with the reference's error on the same noise and times, where there is a reference. Late times have large errors
      for every model, and only the ratio is free of that;
    * with the run's own first errors, since a reference that moves, or none, hides a model that gets worse. Each error
      is divided by the mean of the first few in its range of times.

    Args:
        reference_margin: Relative rise of the window's mean over the reference's that is allowed, above 0. None: there
            is no reference.
        start_margin: The same over the run's own start. None leaves that comparison out: a reference that stays as it
            is serves better, since other samples stand on the two sides here.
        window: Steps over which errors are averaged.
        process: Its `time_fraction` orders the denoiser's times.

    Attributes:
        rise: The chosen error's relative rise over the run's start, found by the last `check`; None where there were
            too few samples.
    """

    description = "divergence guard's errors"
    per_process = False
    _RANGES = 8
    # Samples whose mean stands for the start, in each range of times.
    _START = 4
    # A window with fewer samples says too little about the start.
    _LEAST_SAMPLES = 32

    def __init__(
        self, window: int, process: NoiseProcess, *, reference_margin: float | None, start_margin: float | None
    ) -> None:
        self.window, self.process = window, process
        self.reference_margin, self.start_margin = reference_margin, start_margin
        self.rise: float | None = None
        self.reset()

    def reset(self) -> None:
        # Sums of the start's errors and how many there are, by range of times.
        self._start = torch.zeros(2, self._RANGES, dtype=torch.float64)
        # Of the last steps: (chosen, reference) means, and samples relative to the start as (sum, count).
        self._against_reference: deque[tuple[float, float]] = deque(maxlen=self.window)
        self._against_start: deque[tuple[float, float]] = deque()
        self._micro_batches: list[tuple[float, float]] = []
        self._relative = [0.0, 0.0]

    def record(self, chosen_error: Tensor, reference_error: Tensor | None, times: Tensor) -> None:
        """Takes a micro-batch's values of all processes, `(N,)` each; `times` are the denoiser's."""
        if not len(chosen_error):
            return
        # First to the CPU: Apple's GPUs have no float64.
        chosen_error, times = chosen_error.cpu().double(), times.cpu().double()
        if self.reference_margin is not None and reference_error is not None:
            self._micro_batches.append((chosen_error.mean().item(), reference_error.cpu().double().mean().item()))
        if self.start_margin is None:
            return
        ranges = (self.process.time_fraction(times) * self._RANGES).long().clamp(0, self._RANGES - 1)
        for error, index in zip(chosen_error.tolist(), ranges.tolist(), strict=True):
            if self._start[1, index] < self._START:
                self._start[0, index] += error
                self._start[1, index] += 1
            else:
                self._relative[0] += error * self._START / max(self._start[0, index].item(), 1e-12)
                self._relative[1] += 1

    def check(self) -> str | None:
        """What is wrong after a step, as the rest of a sentence, or None; a finding starts new windows."""
        finding = self._against_the_reference() or self._against_the_start()
        if finding is None:
            return None
        self._against_reference.clear()
        self._against_start.clear()
        return f"{finding} The model is losing the chosen samples too, and soon its ability to generate."

    def _against_the_reference(self) -> str | None:
        if self.reference_margin is None or not self._micro_batches:
            return None
        count = len(self._micro_batches)
        chosen, reference = (sum(values) / count for values in zip(*self._micro_batches, strict=True))
        self._against_reference.append((chosen, reference))
        self._micro_batches.clear()
        if len(self._against_reference) < self.window:
            return None
        chosen, reference = (sum(values) / self.window for values in zip(*self._against_reference, strict=True))
        if chosen <= (1 + self.reference_margin) * reference:
            return None
        return (
            f"the chosen samples' denoising error is {chosen:.4g}, {chosen / reference - 1:.0%} above the reference's "
            f"{reference:.4g} over the last {self.window} steps (allowed: {self.reference_margin:.0%})."
        )

    def _against_the_start(self) -> str | None:
        if self.start_margin is None:
            return None
        self.rise = None
        self._against_start.append((self._relative[0], self._relative[1]))
        self._relative = [0.0, 0.0]
        samples = sum(count for _, count in self._against_start)
        while len(self._against_start) > self.window and samples - self._against_start[0][1] >= self._LEAST_SAMPLES:
            samples -= self._against_start.popleft()[1]
        if len(self._against_start) < self.window or samples < self._LEAST_SAMPLES:
            return None
        self.rise = sum(total for total, _ in self._against_start) / samples - 1
        if self.rise <= self.start_margin:
            return None
        return (
            f"the chosen samples' denoising error is {self.rise:.0%} above that of the run's first steps, compared "
            f"within ranges of times over the last {len(self._against_start)} steps (allowed: "
            f"{self.start_margin:.0%})."
        )

    # ---- Checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "start": self._start,
            "against_reference": torch.tensor(list(self._against_reference), dtype=torch.float64).reshape(-1, 2),
            "against_start": torch.tensor(list(self._against_start), dtype=torch.float64).reshape(-1, 2),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.reset()
        self._start = state["start"].clone()
        self._against_reference.extend(map(tuple, state["against_reference"].tolist()))
        self._against_start.extend(map(tuple, state["against_start"].tolist()))

    def depends_on(self) -> dict[str, Any]:
        # The window and the margin may be changed between two runs.
        return {}

"""The gain from which a sample counts as better than expected: Diffusion-KTO's kl."""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback


class RunningGain(TrainerCallback):
    """The mean gain of earlier optimizer steps, or 0 where it is negative.

    The released code takes the mean of the micro-batch that is trained on, which with accumulation is that of a few
    samples, and another one in each micro-batch. Here all micro-batches of a step use one number, from the steps
    before: an exponential mean, corrected for its start, of each step's mean over all its samples, in all processes.
    As a callback it takes part in the loop after each optimizer step, and it takes part in checkpoints.

    Args:
        decay: Weight of earlier steps in the mean, in [0, 1).

    Attributes:
        value: The mean, from 0 on; 0 before the first step has ended.
    """

    description = "running mean of the gain"
    per_process = False

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.reset()

    def reset(self) -> None:
        # The mean times the weight, and the weight, which tends to 1.
        self._mean = torch.zeros(2, dtype=torch.float64)
        self._recorded: list[Tensor] = []

    @property
    def value(self) -> float:
        mean, weight = self._mean.tolist()
        return max(0.0, mean / weight) if weight else 0.0

    def record(self, gain: Tensor) -> None:
        """Takes a micro-batch's gains, `(B,)`, of this process."""
        self._recorded.append(gain.detach())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # First to the CPU: Apple's GPUs have no float64.
        gains = [gain.cpu().double() for gain in self._recorded]
        self._recorded.clear()
        # Micro-batches and processes may have unequally many samples.
        parts = gather_object([(sum(gain.sum().item() for gain in gains), sum(map(len, gains)))])
        total, count = (sum(values) for values in zip(*parts, strict=True))
        if count:
            step = torch.tensor([total / count, 1.0], dtype=torch.float64)
            self._mean = self.decay * self._mean + (1 - self.decay) * step

    # ---- Checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self._mean}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.reset()
        self._mean = state["mean"].clone()

    def depends_on(self) -> dict[str, Any]:
        return {}

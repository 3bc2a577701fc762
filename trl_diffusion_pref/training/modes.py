"""Makes the `Mode` of each batch: the one place where evaluation is made to differ from training."""

from torch import Tensor

from ..data import DatasetEncoder, Mode
from ..diffusion.randomness import EVALUATION, TRAINING, StepPositions
from .config import DiffusionPreferenceConfig


class Modes:
    """Makes the `Mode` of each batch of one call of `train`, and of evaluations.

    Args:
        args: Of the run.
        encoder: Has the empty prompt's conditioning.
    """

    def __init__(self, args: DiffusionPreferenceConfig, encoder: DatasetEncoder) -> None:
        self.args, self.encoder = args, encoder
        self.sample_posterior = args.latent_sampling == "sample"
        self.condition_dropout = encoder.family.condition_dropout
        self._positions = StepPositions(args.train_batch_size, (args.process_index, args.world_size))

    def training(self, rows: Tensor, step: int) -> Mode:
        """Of the next micro-batch `(B,)` of a step: other noise at every step, however its rows are split."""
        seed, dropout = self.args.seed, self.args.prompt_dropout
        # The 0 keeps the numbers that a seed gave when there was the process instead.
        keys = [(seed, TRAINING, 0, step, position) for position in self._positions.take(step, len(rows))]
        empty_prompt = self.encoder.empty_prompt if dropout else None
        return Mode(True, keys, "train", dropout, self.condition_dropout, self.sample_posterior, empty_prompt)

    def evaluation(self, rows: Tensor, dataset: str | None) -> Mode:
        """Of rows `(B,)`: noise by seed and row alone, so that two evaluations of the same weights agree."""
        keys = [(self.args.seed, EVALUATION, row) for row in rows.tolist()]
        return Mode(False, keys, dataset, sample_posterior=self.sample_posterior)

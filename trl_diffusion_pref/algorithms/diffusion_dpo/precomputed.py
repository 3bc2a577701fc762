"""The reference's errors at fixed draws, computed before training, after which no reference is needed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from ...data import Batch, EncodedDataset, Mode
from ...diffusion.randomness import EVALUATION, REFERENCE, generator_for
from ...training.row_cache import RowCache
from .config import DiffusionDPOConfig


class PrecomputedErrors:
    """Tables `(rows, draws, 2)` of the reference's errors of chosen and rejected, by data set.

    Training takes one of K fixed draws of noise and timestep per pair at random; evaluation has one, its own.

    Args:
        args: The run's.
        errors: Called as `errors(batch, mode)`; the reference's, `(2B,)`.
        cache: Computes and keeps them.
        record: What they depend on: the reference's weights, the noise process, the samples' size.
    """

    def __init__(
        self,
        args: DiffusionDPOConfig,
        errors: Callable[[Batch, Mode], Tensor],
        cache: RowCache,
        record: dict[str, Any],
    ) -> None:
        self.args, self.errors_of, self.cache = args, errors, cache
        self.shared_record = record | {"seed": args.seed, "latent_sampling": args.latent_sampling}
        self.tables: dict[str, Tensor] = {}

    def compute(self, name: str, dataset: EncodedDataset, mode: Mode) -> None:
        """Computes a data set's table, or loads it.

        Args:
            name: "train", or "eval" followed by the data set's name.
            mode: As its batches are drawn; keys are set here.
        """
        seed, draws = self.args.seed, self.args.reference_draws if mode.training else None

        def compute(batch: Batch) -> Tensor:
            rows, errors = batch.rows.tolist(), []
            for draw in range(draws or 1):
                keys = [(seed, EVALUATION, row) if draws is None else (seed, REFERENCE, row, draw) for row in rows]
                errors.append(torch.stack(self.errors_of(batch, replace(mode, keys=keys)).chunk(2), dim=1))
            return torch.stack(errors, dim=1)

        record = self.shared_record | {
            "what": f"reference errors, {name}",
            "draws": draws,
            "prompt_dropout": mode.prompt_dropout,
        }
        folder, file = self.args.reference_errors_dir, None
        if folder is not None:
            # Data sets are called anything, and no two files alike.
            parts = [quote(part, safe="") for part in name.split(" ", 1) if part]
            file = Path(folder) / ("-".join(["reference-errors", *parts]) + ".safetensors")
        size = self.args.per_device_train_batch_size
        self.tables[name] = self.cache.load_or_compute(dataset, compute, record, file, size)

    def at_stored_draws(self, batch: Batch, mode: Mode) -> tuple[Mode, tuple[Tensor, Tensor]]:
        """The mode with keys of stored draws, and the reference's errors at these, `(B,)` of chosen and rejected.

        Raises:
            ValueError: There are none for this data set.
        """
        table = self.tables.get(mode.dataset or "")
        if table is None:
            raise ValueError(
                "With reference='precomputed' there is no reference to evaluate a new data set with. Pass it to the "
                "trainer as eval_dataset, or use evaluation.preference_accuracy."
            )
        rows, draws = batch.rows.tolist(), [0] * len(batch.rows)
        if mode.training:
            count = self.args.reference_draws
            draws = [int(torch.randint(count, (1,), generator=generator_for(*key))) for key in mode.keys]
            keys = [(self.args.seed, REFERENCE, row, draw) for row, draw in zip(rows, draws, strict=True)]
            mode = replace(mode, keys=keys)
        chosen, rejected = table[torch.tensor(rows), torch.tensor(draws)].to(batch.rows.device).unbind(dim=1)
        return mode, (chosen, rejected)

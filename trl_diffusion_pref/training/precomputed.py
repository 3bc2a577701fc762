"""What a reference computes of each row, once, at fixed draws of noise and timestep."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..data import Batch, EncodedDataset, Mode
from ..diffusion.randomness import EVALUATION, REFERENCE, generator_for
from .reference_config import ReferenceConfig
from .row_cache import RowCache


# From a batch and how its noise is drawn to values of the reference by name, `(S, B)` each.
ReferenceValues = Callable[[Batch, Mode], dict[str, Tensor]]


class PrecomputedValues:
    """Tables `(rows, draws, values)` of what the reference computes, by data set.

    Training takes one of K fixed draws of noise and timestep per row at random; evaluation has one, its own.

    Args:
        args: The run's.
        names: Of the values; each has one number per sample, which stand side by side in this order.
        num_samples: That a row has at most; where one has fewer, the rest of its numbers is NaN.
        values_of: The reference's.
        cache: Computes and keeps them.
        record: What they depend on: the reference's weights, the noise process, the samples' size.
    """

    def __init__(
        self,
        args: ReferenceConfig,
        names: Sequence[str],
        num_samples: int,
        values_of: ReferenceValues,
        cache: RowCache,
        record: dict[str, Any],
    ) -> None:
        self.args, self.names, self.num_samples = args, names, num_samples
        self.values_of, self.cache = values_of, cache
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
            rows, of_draws = batch.rows.tolist(), []
            for draw in range(draws or 1):
                keys = [(seed, EVALUATION, row) if draws is None else (seed, REFERENCE, row, draw) for row in rows]
                values = self.values_of(batch, replace(mode, keys=keys))
                of_draws.append(torch.cat([self._of_row(values[name]) for name in self.names], dim=1))
            return torch.stack(of_draws, dim=1)

        record = self.shared_record | {
            "what": f"reference {' and '.join(f'{value}s' for value in self.names)}, {name}",
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

    def _of_row(self, values: Tensor) -> Tensor:
        """`(B, num_samples)` from `(S, B)`."""
        return pad(values.T, (0, self.num_samples - len(values)), value=torch.nan)

    def at_stored_draws(self, batch: Batch, mode: Mode) -> Mode:
        """The mode with keys of stored draws, of which one is drawn for each row in training."""
        if not mode.training:
            return mode
        count, rows = self.args.reference_draws, batch.rows.tolist()
        draws = [int(torch.randint(count, (1,), generator=generator_for(*key))) for key in mode.keys]
        return replace(
            mode, keys=[(self.args.seed, REFERENCE, row, draw) for row, draw in zip(rows, draws, strict=True)]
        )

    def values(self, batch: Batch, mode: Mode) -> dict[str, Tensor]:
        """The reference's values at the draws of `at_stored_draws`, by name, `(S B,)` each, sample by sample.

        Raises:
            ValueError: There are none for this data set.
        """
        table = self.tables.get(mode.dataset or "")
        if table is None:
            raise ValueError(
                "With reference='precomputed' there is no reference to evaluate a new data set with. Pass it to the "
                "trainer as eval_dataset, or use evaluation.preference_accuracy."
            )
        rows, count = batch.rows.tolist(), len(batch.posterior.mean)
        draws = [key[-1] for key in mode.keys] if mode.training else [0] * len(rows)
        found = table[torch.tensor(rows), torch.tensor(draws)].to(batch.rows.device)
        starts = range(0, len(self.names) * self.num_samples, self.num_samples)
        return {
            name: found[:, start : start + count].T.flatten() for name, start in zip(self.names, starts, strict=True)
        }

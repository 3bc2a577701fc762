"""Stacks encoded rows into a batch."""

from typing import Any

import torch
from torch import Tensor

from .encoding import CONDITIONING_PREFIX, image_conditioning_prefix, latent_columns
from .prompts import PromptTable


class RowCollator:
    """Turns rows of an encoded data set into tensors.

    Args:
        prompts: Table of prompt embeddings, for rows that do not carry their own as streamed ones do.
        image_columns: Those that were encoded.
    """

    def __init__(self, prompts: PromptTable, image_columns: tuple[str, ...] = ("chosen", "rejected")) -> None:
        self.prompts = prompts
        self.latent_columns = latent_columns(image_columns)
        self._conditioning = tuple(image_conditioning_prefix(column) for column in image_columns)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch of B rows.

        Returns:
            `<image column>_mean`, `<image column>_std`: `(B, C, h, w)` float32; `row`: `(B,)` int64 position in the
            data set that was passed to the trainer; `conditioning/<name>` (of the prompt) and `<image
            column>_conditioning/<name>` (of how the image was prepared, for families with it): `(B, ...)` float32;
            other columns: `(B,)` float32.
        """
        of_images = [*self.latent_columns, *(name for name in rows[0] if name.startswith(self._conditioning))]
        batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in of_images}
        others = rows[0].keys() - {*of_images, "prompt", "row"}
        extra = [name for name in others if not name.startswith(CONDITIONING_PREFIX)]
        batch |= {name: torch.tensor([float(row[name]) for row in rows]) for name in sorted(extra)}
        batch["row"] = torch.tensor([int(row["row"]) for row in rows], dtype=torch.int64)
        streamed = [name for name in rows[0] if name.startswith(CONDITIONING_PREFIX)]
        batch |= {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in streamed}
        if not streamed:
            conditioning = self.prompts([row["prompt"] for row in rows])
            batch |= {CONDITIONING_PREFIX + name: tensor for name, tensor in conditioning.items()}
        return batch


def conditioning_of(batch: dict[str, Tensor], image_column: str | None = None) -> dict[str, Tensor]:
    """The conditioning `(B, ...)` of a collated batch, by the names that `Family.predict` knows.

    Args:
        image_column: Whose images are denoised; the conditioning on how they were prepared is then there too.
    """
    prefixes = [CONDITIONING_PREFIX, *([image_conditioning_prefix(image_column)] if image_column else [])]
    return {
        name.removeprefix(prefix): tensor
        for prefix in prefixes
        for name, tensor in batch.items()
        if name.startswith(prefix)
    }

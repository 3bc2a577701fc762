"""Rows to tensors: decodes the cells of rows, says what is wrong with any, and has the VAE encode the rest."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from .bad_rows import RowProblem
from .batch import CONDITION, MEAN, SAMPLE, STD
from .decode.cell import CellProblem
from .image_shapes import shape_problems
from .layouts import Layout
from .options import EncodingOptions, as_stored
from .preparation import Preparation


@dataclass(frozen=True)
class PreparedRow:
    """One row's samples, then its condition images, with their conditioning, and notes by kind; or problems."""

    row: int
    problems: list[RowProblem]
    samples: list[Tensor]
    conditioning: list[dict[str, Tensor]]
    notes: dict[str, str]


class RowEncoder:
    """Encodes rows of one size.

    Args:
        preparation: Of this size.
        layout: The columns.
        options: Their draws and dtypes.
    """

    def __init__(self, preparation: Preparation, layout: Layout, options: EncodingOptions) -> None:
        self.preparation, self.layout, self.options = preparation, layout, options
        self.pipeline, self.family = preparation.pipeline, preparation.family

    def prepare(self, pool: Executor, rows: Sequence[int], cells: Sequence[dict[str, Any]]) -> list[PreparedRow]:
        """Decodes the cells of some rows."""
        return list(pool.map(self._prepare_row, rows, cells))

    def encode(self, prepared: Sequence[PreparedRow]) -> tuple[list[dict[str, Tensor]], list[RowProblem]]:
        """Encodes rows without problems, all at once.

        Returns:
            Each row's tensors on the CPU, by the names of an encoded row's columns; and the samples for which the VAE
            gives no finite numbers, whose rows' tensors mean nothing.
        """
        layout, vae = self.layout, type(self.pipeline.vae).__name__
        dtype = self.options.stored_dtype(self.pipeline.vae.dtype)
        problems, moments = [], []
        for index, place in enumerate(layout.places):
            pixels = torch.stack([row.samples[index] for row in prepared])
            if index < layout.num_samples:
                mean, std = self.family.encode_samples(self.pipeline, pixels)
            else:
                mean = std = self.family.encode_condition(self.pipeline, pixels)
            finite = (torch.isfinite(mean) & torch.isfinite(std)).flatten(1).all(dim=1).tolist()
            reason = f"the {vae} gives NaN or infinity, in float32 too, so its weights are damaged; load them again"
            problems += [
                RowProblem(row.row, place, reason, "not finite")
                for row, good in zip(prepared, finite, strict=True)
                if not good
            ]
            moments.append((mean, std))
        encoded = []
        for number, row in enumerate(prepared):
            tensors: dict[str, Tensor] = {}
            if layout.num_samples:
                of_samples = moments[: layout.num_samples]
                tensors[MEAN] = torch.stack([mean[number] for mean, _ in of_samples])
                if self.options.keep_std:
                    tensors[STD] = torch.stack([std[number] for _, std in of_samples])
            for column, (mean, _) in zip(layout.conditions, moments[layout.num_samples :], strict=True):
                tensors[CONDITION + column] = mean[number]
            tensors = {name: as_stored(value, dtype) for name, value in tensors.items()}
            for name in row.conditioning[0] if layout.num_samples else ():
                # In float32: sizes in pixels are no float16 numbers.
                values = [own[name].float() for own in row.conditioning[: layout.num_samples]]
                tensors[SAMPLE + name] = torch.stack(values).cpu()
            encoded.append(tensors)
        return encoded, problems

    def _prepare_row(self, row: int, cells: dict[str, Any]) -> PreparedRow:
        layout, preparation = self.layout, self.preparation
        crop_at, flip = self.options.draw(row)
        if problem := layout.problem(cells):
            return _bad(row, [RowProblem(row, *problem, "wrong length")])
        problems, decoded = [], []
        notes: dict[str, str] = {}
        for index, (place, cell) in enumerate(zip(layout.places, layout.cells(cells), strict=True)):
            try:
                if index >= layout.num_samples and isinstance(cell, (list, tuple)):
                    message = f"found {len(cell)} images, but {preparation.pipeline_class} takes one in this column"
                    raise CellProblem(message, "wrong length")
                decoded.append(preparation.decode(cell))
            except CellProblem as error:
                problems.append(RowProblem(row, place, str(error), error.kind))
                continue
            notes = preparation.notes(decoded[-1]) | notes
        # Those of stored data sets are known from headers already; not those of streams and behind URLs.
        if decoded and not problems and all(isinstance(item, Image) for item in decoded):
            sizes = np.asarray([[item.size for item in decoded]], dtype=np.int32)
            problems = [
                replace(found, row=row) for found in shape_problems(sizes, layout, self.options.bad_rows, None)
            ]
        if problems:
            return _bad(row, problems)
        samples = [preparation.tensor(sample, crop_at, flip) for sample in decoded]
        conditioning = [preparation.conditioning(item, crop_at, flip) for item in decoded]
        # Also where they differ only in what is always cut off; with another seed, another crop may show it.
        if (
            len(layout.samples) == 2
            and _alike(*samples[:2])
            and all(torch.equal(one, conditioning[1][name]) for name, one in conditioning[0].items())
            and (self.options.crop == "center" or preparation.same(*decoded[:2]))
        ):
            names = " and ".join(repr(column) for column in layout.samples)
            reason = f"what is used of them is the same {preparation.noun}, so there is no preference"
            return _bad(row, [RowProblem(row, f"columns {names}", reason, "same samples")])
        return PreparedRow(row, [], samples, conditioning, notes)


def _bad(row: int, problems: list[RowProblem]) -> PreparedRow:
    return PreparedRow(row, problems, [], [], {})


def _alike(one: Tensor, other: Tensor) -> bool:
    """Equal except for rounding, which is far below a step of 8-bit pixels or 16-bit audio."""
    return bool((one - other).abs().max() < 1e-6)

"""Rows to tensors: decodes the cells of rows, says what is wrong with any, and has the VAE encode the rest."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from PIL.Image import Image
from torch import Tensor

from ..families.conditions import LOSS_REGION
from .bad_rows import RowProblem
from .batch import CONDITION, EMPTY_PROMPT, MEAN, PROMPT, SAMPLE, STD
from .cells import captions_of
from .decode.cell import CellProblem, read_cell
from .decode.image import decode_image
from .image_shapes import shape_problems
from .layouts import Layout
from .options import EncodingOptions, as_stored
from .preparation import Preparation


@dataclass(frozen=True)
class PreparedRow:
    """One row, ready for the encoders; or its problems.

    Args:
        samples: As `Family.encode_samples` takes each.
        conditioning: Of each sample, see `Preparation.conditioning`.
        notes: What to know, by kind.
        conditions: Condition images as `Family.encode_conditions` takes each, by name.
        seen: The prompt and the condition images that a text encoder sees, where it does.
        region: Where errors count, see `Family.region_of`, where that is not everywhere and no condition image.
    """

    row: int
    problems: list[RowProblem]
    samples: list[Tensor]
    conditioning: list[dict[str, Tensor]]
    notes: dict[str, str]
    conditions: dict[str, Tensor]
    seen: tuple[str, list[Image]] | None = None
    region: Tensor | None = None


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
        problems: list[RowProblem] = []
        moments: list[tuple[Tensor, Tensor]] = []
        reason = f"the {vae} gives NaN or infinity, in float32 too, so its weights are damaged; load them again"

        def check(values: Sequence[Tensor], rows: Sequence[int], place: str) -> None:
            finite = torch.stack([torch.isfinite(value).flatten(1).all(dim=1) for value in values]).all(dim=0)
            problems.extend(
                RowProblem(row, place, reason, "not finite")
                for row, good in zip(rows, finite.tolist(), strict=True)
                if not good
            )

        rows = [row.row for row in prepared]
        # Rows that are encoded together have equally many samples.
        for index, place in enumerate(layout.places[: len(prepared[0].samples)]):
            pixels = torch.stack([row.samples[index] for row in prepared])
            moments.append(self.family.encode_samples(self.pipeline, pixels))
            check(moments[-1], rows, place)
        conditions: list[dict[str, Tensor]] = [{} for _ in prepared]
        for members in self._alike(prepared):
            of_members = self._conditions([prepared[number] for number in members])
            for name, condition in of_members.items():
                check([condition], [rows[number] for number in members], f"column '{name}'")
            for position, number in enumerate(members):
                conditions[number] = {name: condition[position] for name, condition in of_members.items()}
        encoded = []
        for number, row in enumerate(prepared):
            if row.region is not None:
                conditions[number][LOSS_REGION] = row.region
            tensors: dict[str, Tensor] = {}
            if moments:
                tensors[MEAN] = torch.stack([mean[number] for mean, _ in moments])
                if self.options.keep_std:
                    tensors[STD] = torch.stack([std[number] for _, std in moments])
            tensors |= {CONDITION + name: value for name, value in conditions[number].items()}
            tensors = {name: as_stored(value, dtype) for name, value in tensors.items()}
            if row.seen is not None:
                tensors |= self._prompt(*row.seen)
            for name in row.conditioning[0] if row.conditioning else ():
                # In float32: sizes in pixels are no float16 numbers.
                values = [own[name].float() for own in row.conditioning]
                tensors[SAMPLE + name] = torch.stack(values).cpu()
            encoded.append(tensors)
        return encoded, problems

    @staticmethod
    def _alike(prepared: Sequence[PreparedRow]) -> list[list[int]]:
        """Positions of the rows whose condition images have the same sizes; none of rows without any."""
        groups = defaultdict(list)
        for number, row in enumerate(prepared):
            if row.conditions:
                groups[tuple((name, value.shape) for name, value in row.conditions.items())].append(number)
        return list(groups.values())

    def _conditions(self, prepared: Sequence[PreparedRow]) -> dict[str, Tensor]:
        images = {name: torch.stack([row.conditions[name] for row in prepared]) for name in prepared[0].conditions}
        return self.family.encode_conditions(self.pipeline, images, self.preparation.shape)

    def _prompt(self, prompt: str, images: list[Image]) -> dict[str, Tensor]:
        """Conditioning on a prompt by a text encoder that sees the row's images, and on the empty one where asked."""
        dtype = self.options.stored_dtype(self.family.text_dtype(self.pipeline))
        texts = {PROMPT: prompt} | ({EMPTY_PROMPT: ""} if self.options.keep_empty_prompt else {})
        return {
            prefix + name: as_stored(value[0], dtype)
            for prefix, text in texts.items()
            for name, value in self.family.encode_prompts_with_images(self.pipeline, [text], [images]).items()
        }

    def _seen(self, cells: Mapping[str, Any], images: list[Image], flip: bool) -> tuple[str, list[Image]]:
        captions = captions_of(cells["prompt"])
        if len(captions) != 1:
            message = f"found {len(captions)} captions, but {self.preparation.pipeline_class} encodes a prompt with "
            raise CellProblem(message + "its row's images, once; keep one", "wrong length")
        return captions[0], [ImageOps.mirror(image) if flip else image for image in images]

    def _prepare_row(self, row: int, cells: dict[str, Any]) -> PreparedRow:
        layout, preparation = self.layout, self.preparation
        crop_at, flip = self.options.draw(row)
        if problem := layout.problem(cells):
            return _bad(row, [RowProblem(row, *problem, "wrong length")])
        problems: list[RowProblem] = []
        decoded: list[Any] = []
        images: list[Image] = []
        mask: Image | None = None
        notes: dict[str, str] = {}
        for index, cell in layout.cells(cells):
            place = layout.places[index]
            try:
                if index < layout.num_samples:
                    decoded.append(preparation.decode(cell))
                    notes = preparation.notes(decoded[-1]) | notes
                    continue
                if isinstance(cell, (list, tuple)):
                    message = f"found {len(cell)} images, but {preparation.pipeline_class} takes one in this column"
                    raise CellProblem(message, "wrong length")
                if index == layout.region_place:
                    mask = decode_image(read_cell(cell))
                    continue
                images.append(preparation.decode_condition(cell))
                # What it is cropped to is the sample's size.
                if not self.family.own_condition_sizes:
                    notes = preparation.condition_notes(images[-1]) | notes
            except CellProblem as error:
                problems.append(RowProblem(row, place, str(error), error.kind))
        # Those of stored data sets are known from headers already; not those of streams and behind URLs.
        shown = [*decoded, *images, *([] if mask is None else [mask])]
        if not problems and shown and all(isinstance(item, Image) for item in shown):
            sizes = np.zeros((1, len(layout.places), 2), dtype=np.int32)
            sizes[0, [number for number, _ in layout.cells(cells)]] = [item.size for item in shown]
            problems = [
                replace(found, row=row) for found in shape_problems(sizes, layout, self.options.bad_rows, None)
            ]
        seen = None
        try:
            if not problems and images and self.family.prompts_see_images:
                seen = self._seen(cells, images, flip)
        except CellProblem as error:
            problems.append(RowProblem(row, "column 'prompt'", str(error), error.kind))
        if problems:
            return _bad(row, problems)
        samples = [preparation.tensor(sample, crop_at, flip) for sample in decoded]
        conditioning = [preparation.conditioning(item, crop_at, flip) for item in decoded]
        conditions = {
            name: preparation.condition_tensor(image, len(images), crop_at, flip)
            for name, image in zip(layout.condition_names, images, strict=False)
        }
        try:
            region = None if mask is None else preparation.region(mask, crop_at, flip)
        except CellProblem as error:
            return _bad(row, [RowProblem(row, f"column '{layout.region}'", str(error), error.kind)])
        if layout.mask is not None and (reason := self.family.mask_problem(self.pipeline, conditions[layout.mask])):
            return _bad(row, [RowProblem(row, f"column '{layout.mask}'", reason, "empty mask")])
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
        return PreparedRow(row, [], samples, conditioning, notes, conditions, seen, region)


def _bad(row: int, problems: list[RowProblem]) -> PreparedRow:
    return PreparedRow(row, problems, [], [], {}, {})


def _alike(one: Tensor, other: Tensor) -> bool:
    """Equal except for rounding, which is far below a step of 8-bit pixels or 16-bit audio."""
    return bool((one - other).abs().max() < 1e-6)

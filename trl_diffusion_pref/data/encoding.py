"""Rows to latents: decodes a batch of rows, says what is wrong with any, and has the VAE encode the rest."""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import torch

from .batch import CONDITION, MEAN, PROMPT, SAMPLE, SCALAR, STD
from .decode.cell import CellProblem
from .layouts import Layout, prompt_problems, raise_row_problems
from .preparation import Preparation
from .prompts import truncation_report, without_truncation_messages
from .resolution import Resolution


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodingOptions:
    """What decides the encoded values, beside the weights.

    Args:
        resolution: Side length in pixels of images, shorter side of videos, or (height, width); None for what the
            pipeline generates.
        num_frames: Of a video; None for what the pipeline generates.
        crop: "center" or "random" (one place per row, drawn once from the seed and the row).
        random_flip: Whether each row's samples are mirrored with probability 1/2 (one decision per row, likewise).
        seed: Of these draws.
    """

    resolution: Resolution = None
    num_frames: int | None = None
    crop: Literal["center", "random"] = "center"
    random_flip: bool = False
    seed: int = 0

    @property
    def draws(self) -> bool:
        """Whether the seed plays a part."""
        return self.crop == "random" or self.random_flip


class BadRows(Exception):
    """Stops `map` at the first batch with rows that cannot be used."""

    def __init__(self, problems: list[str], next_row: int) -> None:
        super().__init__(problems[0])
        self.problems, self.next_row = problems, next_row


@dataclass(frozen=True)
class PreparedRow:
    """One row's samples, then its condition images, with their conditioning, and notes (kind, text); or problems."""

    problems: list[str]
    samples: list[torch.Tensor]
    conditioning: list[dict[str, torch.Tensor]]
    notes: list[tuple[str, str]]


class RowEncoder:
    """Encodes a batch of rows; the function that `map` calls."""

    def __init__(
        self,
        preparation: Preparation,
        layout: Layout,
        options: EncodingOptions,
        label: str,
        scalars: Sequence[str],
        *,
        with_prompts: bool = False,
        notes_file: Path | None = None,
    ) -> None:
        self.preparation, self.layout, self.options = preparation, layout, options
        self.label, self.scalars, self.with_prompts = label, scalars, with_prompts
        self.pipeline, self.family = preparation.pipeline, preparation.family
        self._reported_truncation = False
        # By kind, so that each is logged once.
        self._noted: dict[str, str] = {}
        self._notes_file = notes_file

    def prepared(self, batch: dict[str, list], rows: Sequence[int]) -> list[PreparedRow]:
        """Decodes the cells of each row."""
        columns = self.layout.media
        cells = [dict(zip(columns, row, strict=True)) for row in zip(*(batch[name] for name in columns), strict=True)]
        # Made here and not kept: data loader workers get this object by pickling or by forking.
        with ThreadPoolExecutor(max_workers=4) as pool:
            return list(pool.map(self._prepare_row, rows, cells)) if columns else []

    def __call__(self, batch: dict[str, list], rows: list[int]) -> dict[str, Any]:
        layout = self.layout
        prepared = self.prepared(batch, rows)
        problems = prompt_problems(batch["prompt"], rows)
        problems += [problem for row in prepared for problem in row.problems]
        if problems and self.with_prompts:
            raise_row_problems(problems, self.label)
        if problems:
            raise BadRows(problems, rows[-1] + 1)
        self._note_once([note for row in prepared for note in row.notes])
        encoded: dict[str, Any] = {"prompt": batch["prompt"], "row": rows}
        encoded |= {SCALAR + name: batch[name] for name in self.scalars}
        moments = []
        for index, place in enumerate(layout.places):
            mean, std = self.family.encode_samples(
                self.pipeline, torch.stack([row.samples[index] for row in prepared])
            )
            finite = (torch.isfinite(mean) & torch.isfinite(std)).flatten(1).all(dim=1).tolist()
            raise_row_problems(
                [
                    f"row {row}, {place}: the {type(self.pipeline.vae).__name__} gives NaN or infinity, in "
                    "float32 too, so its weights are damaged; load them again"
                    for row, good in zip(rows, finite, strict=True)
                    if not good
                ],
                self.label,
            )
            moments.append((mean.cpu().numpy(), std.cpu().numpy()))
        if layout.num_samples:
            of_samples = moments[: layout.num_samples]
            encoded[MEAN], encoded[STD] = (np.stack(part, axis=1) for part in zip(*of_samples, strict=True))
            for name in prepared[0].conditioning[0]:
                values = [
                    torch.stack([own[name] for own in row.conditioning[: layout.num_samples]]) for row in prepared
                ]
                encoded[SAMPLE + name] = torch.stack(values).cpu().numpy()
        for column, moment in zip(layout.conditions, moments[layout.num_samples :], strict=True):
            encoded[CONDITION + column] = moment[0]
        if self.with_prompts:
            self._report_truncation(batch["prompt"])
            with without_truncation_messages(self.pipeline):
                conditioning = self.family.encode_prompts(self.pipeline, batch["prompt"])
            encoded |= {PROMPT + name: tensor.cpu().numpy() for name, tensor in conditioning.items()}
        return encoded

    def _report_truncation(self, prompts: list[str]) -> None:
        """Once, since nobody knows how many are to come."""
        if self._reported_truncation:
            return
        report = truncation_report(prompts, self.pipeline, self.family)
        if report:
            logger.warning("%s is streamed, and so far: %s", self.label, report)
            self._reported_truncation = True

    def _note_once(self, notes: list[tuple[str, str]]) -> None:
        for kind, text in notes:
            if kind not in self._noted:
                self._noted[kind] = text
                logger.warning("%s: %s", self.label, text)
                if self._notes_file is not None:
                    # At once: the file of rows, which comes last, must not be there without it.
                    # Its name is its own, since another run may be encoding the same.
                    unfinished = self._notes_file.with_suffix(f".{uuid4().hex}")
                    unfinished.write_text(json.dumps(self._noted))
                    unfinished.replace(self._notes_file)

    def _prepare_row(self, row: int, cells: dict[str, Any]) -> PreparedRow:
        layout, options, preparation = self.layout, self.options, self.preparation
        rng = np.random.default_rng([options.seed, row])
        crop_at = tuple(rng.random(2)) if options.crop == "random" else (0.5, 0.5)
        flip = options.random_flip and bool(rng.random() < 0.5)
        problem = layout.problem(cells)
        if problem:
            return PreparedRow([f"row {row}, {problem}"], [], [], [])
        problems, decoded, notes = [], [], []
        for place, cell in zip(layout.places, layout.cells(cells), strict=True):
            try:
                decoded.append(preparation.decode(cell))
            except CellProblem as error:
                problems.append(f"row {row}, {place}: {error}")
                continue
            changes = preparation.notes(decoded[-1])
            notes += [(kind, f"{text} (first in row {row}, {place})") for kind, text in changes.items()]
        if problems:
            return PreparedRow(problems, [], [], [])
        samples = [preparation.tensor(sample, crop_at, flip) for sample in decoded]
        conditioning = [preparation.conditioning(item, crop_at, flip) for item in decoded]
        # Also where they differ only in what is always cut off; with another seed, another crop may show it.
        if (
            len(layout.samples) == 2
            and _alike(*samples[:2])
            and all(torch.equal(one, conditioning[1][name]) for name, one in conditioning[0].items())
            and (options.crop == "center" or preparation.same(*decoded[:2]))
        ):
            names = " and ".join(repr(column) for column in layout.samples)
            problems.append(
                f"row {row}, columns {names}: what is used of them is the same {preparation.noun}, so there is no "
                "preference"
            )
            return PreparedRow(problems, [], [], [])
        return PreparedRow([], samples, conditioning, notes)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal except for rounding, which is far below a step of 8-bit pixels or 16-bit audio."""
    return bool((one - other).abs().max() < 1e-6)

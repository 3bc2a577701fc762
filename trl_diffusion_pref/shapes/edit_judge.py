"""Determines whether an edit was made and whether everything else stayed as it was; also as a reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .edits import PLACE_TOLERANCE, changed_attribute, displacement, value_of
from .judge import judge


@dataclass(frozen=True)
class EditVerdict:
    """What became of an edit.

    Args:
        made: The image has the colour or the style that the instruction asks for.
        in_place: The shape is the source's, and so are its position and its size, each to a pixel.
        rest_kept: Of colour and style, the one that was not to change is the source's.
        distance: To the nearest drawing, see `judge.Verdict`.
    """

    made: bool
    in_place: bool
    rest_kept: bool
    distance: float

    @property
    def made_in_place(self) -> bool:
        """Whether the edit was made where the shape stands, whatever became of the rest."""
        return self.made and self.in_place


@dataclass(frozen=True)
class EditSummary:
    """Shares in [0, 1] over a set of edited images, see `EditVerdict`.

    Args:
        made_in_place: Both of the next two.
        made: The edit was made.
        in_place: Shape, position and size are the source's.
        rest_kept: Of colour and style, the one that was not to change is the source's.
        count: Number of images.
    """

    made_in_place: float
    made: float
    in_place: float
    rest_kept: float
    count: int


def judge_edits(
    images: Sequence[Image.Image], instructions: Sequence[str], sources: Sequence[Image.Image]
) -> list[EditVerdict]:
    """Judges edited images.

    Args:
        images: N RGB images of `IMAGE_SIZE` x `IMAGE_SIZE` pixels.
        instructions: N texts such as "make it blue" or "make it outlined".
        sources: What was edited: N drawings of the same size.

    Returns:
        One verdict per image, in order.

    Raises:
        ValueError: Numbers differ, an image has another size, or an instruction has another form.
    """
    if not len(images) == len(instructions) == len(sources):
        raise ValueError(f"{len(images)} images, {len(instructions)} instructions and {len(sources)} sources.")
    verdicts = []
    for after, before, instruction in zip(judge(images), judge(sources), instructions, strict=True):
        value = value_of(instruction)
        attribute = changed_attribute(value)
        other = "style" if attribute == "colour" else "colour"
        verdicts.append(
            EditVerdict(
                made=getattr(after, attribute) == value,
                in_place=after.shape == before.shape and displacement(after, before) <= PLACE_TOLERANCE,
                rest_kept=getattr(after, other) == getattr(before, other),
                distance=after.distance,
            )
        )
    return verdicts


def summarize_edits(
    images: Sequence[Image.Image], instructions: Sequence[str], sources: Sequence[Image.Image]
) -> EditSummary:
    """Shares of edits that were made, that were made in place, and that kept the rest.

    Args:
        images, instructions, sources: See `judge_edits`.

    Raises:
        ValueError: See `judge_edits`.
    """
    verdicts = judge_edits(images, instructions, sources)
    shares = {
        name: float(np.mean([getattr(verdict, name) for verdict in verdicts]))
        for name in ("made_in_place", "made", "in_place", "rest_kept")
    }
    return EditSummary(**shares, count=len(verdicts))


def edits_reward(
    prompts: Sequence[str], samples: Sequence[Image.Image], image: Sequence[Image.Image], **columns: Any
) -> list[float]:
    """Scores edited images: one point each if the edit was made, if the shape is in place, and if the rest was kept.

    The distance to the nearest drawing is subtracted, so that of two images which show the same the cleaner one wins.

    Args:
        prompts: Instructions, one per image.
        samples: Edited images, of `IMAGE_SIZE` x `IMAGE_SIZE` pixels.
        image: What was edited, one per sample: the column of that name.
        **columns: Ignored.

    Returns:
        One number per image, in (-1, 3].

    Raises:
        ValueError: See `judge_edits`.
    """
    return [
        verdict.made + verdict.in_place + verdict.rest_kept - verdict.distance
        for verdict in judge_edits(samples, prompts, image)
    ]

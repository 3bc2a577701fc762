"""Edits of drawn shapes: instructions such as "make it blue", the drawings to edit, and preference pairs of edits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from datasets import Dataset, Features, Image, Value

from .drawing import COLOURS, STYLES, Scene, random_scene
from .judge import Verdict
from .pairs import png_cell


# What the rejected image of a pair shows.
Rejected = Literal["elsewhere", "source"]
# In pixels: how far size and position may be from the source's where the shape counts as in place. Images of the
# embedded pipeline lie between the drawings' integer positions.
PLACE_TOLERANCE = 1
_INSTRUCTION = "make it "


@dataclass(frozen=True)
class Edit:
    """A drawing and what to change about it.

    Args:
        source: What is edited.
        value: The new colour, a key of `COLOURS`, or the new style, one of `STYLES`.
    """

    source: Scene
    value: str

    @property
    def instruction(self) -> str:
        """Such as "make it blue" or "make it outlined"."""
        return _INSTRUCTION + self.value

    @property
    def target(self) -> Scene:
        """The source with the new colour or style; everything else is unchanged."""
        if changed_attribute(self.value) == "colour":
            return replace(self.source, colour=self.value)
        return replace(self.source, style=self.value)


def changed_attribute(value: str) -> Literal["colour", "style"]:
    """Which of the two an edit changes.

    Args:
        value: A colour or a style.
    """
    return "colour" if value in COLOURS else "style"


def value_of(instruction: str) -> str:
    """The colour or style that an instruction asks for.

    Raises:
        ValueError: An instruction of another form.
    """
    value = instruction.removeprefix(_INSTRUCTION)
    if value == instruction or value not in (*COLOURS, *STYLES):
        raise ValueError(
            f'The instruction {instruction!r} is not "{_INSTRUCTION}" with one of {", ".join((*COLOURS, *STYLES))}.'
        )
    return value


def random_edit(rng: np.random.Generator) -> Edit:
    """An edit of a random scene: half of them change the style, half the colour to one of the others."""
    source = random_scene(rng, STYLES[rng.integers(len(STYLES))])
    old, values = (source.style, STYLES) if rng.random() < 0.5 else (source.colour, tuple(COLOURS))
    others = [value for value in values if value != old]
    return Edit(source, others[rng.integers(len(others))])


def displacement(one: Scene | Verdict, other: Scene | Verdict) -> int:
    """The largest of the differences of radius, x and y, in pixels."""
    return max(abs(one.radius - other.radius), abs(one.x - other.x), abs(one.y - other.y))


def redrawn_elsewhere(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same shape in the same colour and style at a random size and position, beyond `PLACE_TOLERANCE`."""
    while True:
        other = random_scene(rng, scene.style, shape=scene.shape, colour=scene.colour)
        if displacement(scene, other) > PLACE_TOLERANCE:
            return other


def edit_prompts(n: int, seed: int = 0) -> Dataset:
    """Instructions with the drawings to edit, as `make_pairs` takes them.

    Args:
        n: Number of edits.
        seed: Of the random scenes; the same seed gives the same bytes.

    Returns:
        Dataset with the columns `prompt` (the instruction) and `image` (what to edit, PNG bytes).

    Raises:
        ValueError: n < 1.
    """
    edits = _random_edits(n, np.random.default_rng(seed))
    return _dataset(_instructions_and_sources(edits))


def edit_pairs(n: int, seed: int = 0, *, rejected: Rejected = "elsewhere") -> Dataset:
    """Preference pairs of drawn edits: the chosen image is the edit made in place.

    Args:
        n: Number of pairs.
        seed: Of the random scenes; the same seed gives the same bytes.
        rejected: "elsewhere": the edit was made, but the shape has another size or position. "source": the image to
            edit itself, unchanged. The latter needs no sampling and no judge: any data set of sources and edited
            images gives such pairs.

    Returns:
        Dataset with the columns `prompt` (the instruction), `image` (what was edited), `chosen` and `rejected`
        (images, PNG bytes).

    Raises:
        ValueError: n < 1, or another value of `rejected`.
    """
    if rejected not in get_args(Rejected):
        raise ValueError(f"rejected={rejected!r} is not one of {', '.join(get_args(Rejected))}.")
    rng = np.random.default_rng(seed)
    edits = _random_edits(n, rng)
    worse = [edit.source if rejected == "source" else redrawn_elsewhere(edit.target, rng) for edit in edits]
    return _dataset(
        {
            **_instructions_and_sources(edits),
            "chosen": [png_cell(edit.target) for edit in edits],
            "rejected": [png_cell(scene) for scene in worse],
        }
    )


def _random_edits(n: int, rng: np.random.Generator) -> list[Edit]:
    if n < 1:
        raise ValueError(f"n={n}: at least one edit is needed.")
    return [random_edit(rng) for _ in range(n)]


def _instructions_and_sources(edits: Sequence[Edit]) -> dict[str, list]:
    return {"prompt": [edit.instruction for edit in edits], "image": [png_cell(edit.source) for edit in edits]}


def _dataset(columns: Mapping[str, list]) -> Dataset:
    features = {name: Value("string") if name == "prompt" else Image() for name in columns}
    return Dataset.from_dict(dict(columns), features=Features(features))

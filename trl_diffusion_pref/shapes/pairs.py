"""Preference pairs of drawn shapes, as a data set with PNG-encoded images."""

import io

import numpy as np
from datasets import Dataset, Features, Image, Value

from .drawing import COLOURS, SHAPES, STYLES, Scene, draw, random_scene


def preference_pairs(
    n: int, seed: int = 0, *, preferred_style: str = "outlined", shared_layout: bool = False
) -> Dataset:
    """Pairs that prefer one style: both images match the prompt, and the chosen one has the preferred style.

    Args:
        n: Number of pairs.
        seed: Of the random scenes; the same seed gives the same bytes.
        preferred_style: "outlined" or "filled".
        shared_layout: Whether both shapes of a pair have the same size and position. By default they differ, as two
            samples of a model would.

    Returns:
        Dataset with the columns `prompt` (str), `chosen` and `rejected` (images, PNG bytes).

    Raises:
        ValueError: Unknown style or n < 1.
    """
    if preferred_style not in STYLES:
        raise ValueError(f"preferred_style={preferred_style!r} is not one of {', '.join(STYLES)}.")
    if n < 1:
        raise ValueError(f"n={n}: at least one pair is needed.")
    rng = np.random.default_rng(seed)
    other_style = STYLES[1 - STYLES.index(preferred_style)]
    rows: dict[str, list] = {"prompt": [], "chosen": [], "rejected": []}
    for _ in range(n):
        shape, colour = SHAPES[rng.integers(len(SHAPES))], list(COLOURS)[rng.integers(len(COLOURS))]
        chosen = random_scene(rng, preferred_style, shape=shape, colour=colour)
        rejected = random_scene(rng, other_style, shape=shape, colour=colour)
        if shared_layout:
            rejected = type(chosen)(shape, colour, other_style, chosen.radius, chosen.x, chosen.y)
        rows["prompt"].append(chosen.prompt)
        for column, scene in (("chosen", chosen), ("rejected", rejected)):
            rows[column].append(png_cell(scene))
    return Dataset.from_dict(
        rows, features=Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    )


def png_cell(scene: Scene) -> dict[str, bytes | None]:
    """The drawing as a cell of a data set's column of images."""
    buffer = io.BytesIO()
    draw(scene).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}

"""Determines which style, colour and shape an image shows and how clean it is, by arithmetic on pixels.

An image is compared with every image that `drawing` can make (all shapes, styles, colours, sizes and positions). The
nearest one gives style, colour and shape; the distance to it measures how clean the image is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from .drawing import BACKGROUND, COLOURS, IMAGE_SIZE, SHAPES, STYLES, caption, coverage, layouts


# Above the distances of the embedded VAE's reconstructions of drawn images, as tests/shapes/test_pipeline.py checks.
CLEAN_DISTANCE = 0.08
# Of the images that the `mixed` base draws in each style, nine of ten are at most so far from a drawing. Outlines are
# harder to draw: one limit for both would take a change of style for a loss of quality. Measured by
# benchmarks/clean_in_style.py.
CLEAN_IN_STYLE = {"filled": 0.08, "outlined": 0.12}


@dataclass(frozen=True)
class Verdict:
    """What an image shows.

    Args:
        shape, colour, style: Of the nearest drawing.
        radius, x, y: Its size and centre in pixels, see `drawing.Scene`.
        distance: Root mean squared difference to it over pixels and channels, in [0, 1] where 1 is black against
            white.
    """

    shape: str
    colour: str
    style: str
    radius: int
    x: int
    y: int
    distance: float

    @property
    def clean(self) -> bool:
        """Whether the image is as close to a drawing as the embedded VAE's reconstructions are."""
        return self.distance <= CLEAN_DISTANCE

    @property
    def clean_in_style(self) -> bool:
        """Whether the image is as close to a drawing as nine of ten of the base's own images in its style are."""
        return self.distance <= CLEAN_IN_STYLE[self.style]

    @property
    def prompt(self) -> str:
        return caption(self.colour, self.shape)


@dataclass(frozen=True)
class Summary:
    """Shares in [0, 1] over a set of images.

    Args:
        preferred: In the preferred style.
        colour, shape: As prompted.
        clean: Close to a drawing, see `Verdict.clean`. The share depends on the style: of the `mixed` base's own
            images, 91 % of the filled and 56 % of the outlined ones are clean.
        clean_in_style: As close to a drawing as the base's own images in the same style, see `Verdict.clean_in_style`;
            about 0.9 for the base.
        count: Number of images.
    """

    preferred: float
    colour: float
    shape: float
    clean: float
    clean_in_style: float
    count: int


@lru_cache(maxsize=1)
def _templates() -> tuple[list[tuple[str, str, int, int, int]], np.ndarray, np.ndarray]:
    """(shape, style, radius, x, y) of each template, coverages `(K, pixels)` and their squared norms `(K,)`."""
    labels, rows = [], []
    for shape in SHAPES:
        for style in STYLES:
            for radius, x, y in layouts():
                labels.append((shape, style, radius, x, y))
                rows.append(coverage(shape, style, radius, x, y).reshape(-1))
    coverages = np.stack(rows)
    return labels, coverages, np.square(coverages).sum(axis=1)


def judge(images: Sequence[Image.Image]) -> list[Verdict]:
    """Judges images.

    Args:
        images: RGB images of `IMAGE_SIZE` x `IMAGE_SIZE` pixels.

    Returns:
        One verdict per image, in order.

    Raises:
        ValueError: An image has another size.
    """
    labels, coverages, norms = _templates()
    for index, image in enumerate(images):
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"image {index} has {image.size[0]}x{image.size[1]} pixels, but the judge compares with drawings of "
                f"{IMAGE_SIZE}x{IMAGE_SIZE}. Generate images of that size."
            )
    if not images:
        return []
    background = np.array(BACKGROUND, dtype=np.float32) / 255.0
    pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images]) / 255.0
    difference = (pixels - background).reshape(len(images), -1, 3)
    energy = np.square(difference).sum(axis=(1, 2))
    best = np.full(len(images), np.inf, dtype=np.float32)
    shown = [("", "", "", 0, 0, 0)] * len(images)
    for name, rgb in COLOURS.items():
        direction = np.array(rgb, dtype=np.float32) / 255.0 - background
        # |y - a d|^2 = |y|^2 - 2 a.(y d) + |a|^2 |d|^2 for coverage a and colour direction d
        squared = energy[:, None] - 2 * (difference @ direction) @ coverages.T + norms * np.dot(direction, direction)
        nearest = squared.argmin(axis=1)
        for index, template in enumerate(nearest):
            if squared[index, template] < best[index]:
                best[index] = squared[index, template]
                shape, style, radius, x, y = labels[template]
                shown[index] = (shape, name, style, radius, x, y)
    distances = np.sqrt(np.maximum(best, 0.0) / (IMAGE_SIZE * IMAGE_SIZE * 3))
    return [Verdict(*what, float(distance)) for what, distance in zip(shown, distances, strict=True)]


def summarize(images: Sequence[Image.Image], prompts: Sequence[str], preferred_style: str = "outlined") -> Summary:
    """Judges images against their prompts.

    Args:
        images: As for `judge`.
        prompts: One caption per image, of the form that `drawing.caption` writes.
        preferred_style: One of `STYLES`.
    """
    verdicts = judge(images)
    asked = [prompt.split()[1:] for prompt in prompts]
    pairs = list(zip(verdicts, asked, strict=True))
    return Summary(
        preferred=float(np.mean([verdict.style == preferred_style for verdict in verdicts])),
        colour=float(np.mean([verdict.colour == colour for verdict, (colour, _) in pairs])),
        shape=float(np.mean([verdict.shape == shape for verdict, (_, shape) in pairs])),
        clean=float(np.mean([verdict.clean for verdict in verdicts])),
        clean_in_style=float(np.mean([verdict.clean_in_style for verdict in verdicts])),
        count=len(verdicts),
    )

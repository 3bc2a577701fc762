"""Draws one coloured shape on white, anti-aliased, at integer sizes and positions.

Sizes and positions are integers, so that all possible images can be listed and the judge can compare an image with
each of them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw


IMAGE_SIZE = 32
SHAPES = ("circle", "square", "triangle")
STYLES = ("filled", "outlined")
COLOURS = {
    "red": (215, 40, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 220),
    "orange": (245, 140, 20),
    "purple": (150, 50, 200),
    "black": (30, 30, 30),
}
BACKGROUND = (255, 255, 255)
RADII = range(7, 12)

_STROKE = 2.0
_SUPERSAMPLING = 8
# Shapes look equally large if the square is a little smaller and the triangle a little larger than the circle.
_SQUARE_HALF_SIDE = 0.88
_TRIANGLE_CIRCUMRADIUS = 1.2


@dataclass(frozen=True)
class Scene:
    """One image: which shape, in which colour and style, how large and where.

    Args:
        shape: One of `SHAPES`.
        colour: A key of `COLOURS`.
        style: One of `STYLES`.
        radius: Size in pixels, one of `RADII`.
        x, y: Centre in pixels from the upper left corner; see `centres`.
    """

    shape: str
    colour: str
    style: str
    radius: int
    x: int
    y: int

    @property
    def prompt(self) -> str:
        """The caption. It names colour and shape but not the style, which the preferences are about."""
        return caption(self.colour, self.shape)


def caption(colour: str, shape: str) -> str:
    """Caption of an image, such as "a red circle" or "an orange square"."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def prompts() -> list[str]:
    """All captions, colours varying slowest."""
    return [caption(colour, shape) for colour in COLOURS for shape in SHAPES]


def centres(radius: int) -> range:
    """Centre coordinates at which a shape of this radius leaves a margin of at least one pixel on every side."""
    margin = math.ceil(_TRIANGLE_CIRCUMRADIUS * radius) + 1
    return range(margin, IMAGE_SIZE - margin + 1)


def layouts() -> Iterator[tuple[int, int, int]]:
    """Every `(radius, x, y)` that can be drawn."""
    for radius in RADII:
        for x in centres(radius):
            for y in centres(radius):
                yield radius, x, y


def _polygon(shape: str, radius: float, inset: float) -> list[tuple[float, float]]:
    """Corners around the origin, each edge moved inwards by `inset` pixels."""
    if shape == "square":
        half = _SQUARE_HALF_SIDE * radius - inset
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    # An equilateral triangle's inradius is half its circumradius.
    circumradius = _TRIANGLE_CIRCUMRADIUS * radius - 2 * inset
    return [
        (circumradius * math.cos(angle), circumradius * math.sin(angle))
        for angle in (-math.pi / 2, math.pi / 6, 5 * math.pi / 6)
    ]


@cache
def coverage(shape: str, style: str, radius: int, x: int, y: int) -> np.ndarray:
    """Share of each pixel that is painted, `(IMAGE_SIZE, IMAGE_SIZE)` float32 in [0, 1]."""
    k = _SUPERSAMPLING
    canvas = Image.new("L", (IMAGE_SIZE * k, IMAGE_SIZE * k), 0)
    pen = ImageDraw.Draw(canvas)
    for inset, paint in ((0.0, 255), (_STROKE, 0)):
        if shape == "circle":
            r = radius - inset
            pen.ellipse([(x - r) * k, (y - r) * k, (x + r) * k - 1, (y + r) * k - 1], fill=paint)
        else:
            pen.polygon([((x + dx) * k, (y + dy) * k) for dx, dy in _polygon(shape, radius, inset)], fill=paint)
        if style == "filled":
            break
    fine = np.asarray(canvas, dtype=np.float32) / 255.0
    painted = fine.reshape(IMAGE_SIZE, k, IMAGE_SIZE, k).mean(axis=(1, 3))
    painted.setflags(write=False)
    return painted


def draw(scene: Scene) -> Image.Image:
    """Draws the scene as an RGB image of `IMAGE_SIZE` x `IMAGE_SIZE` pixels."""
    painted = coverage(scene.shape, scene.style, scene.radius, scene.x, scene.y)[..., None]
    background = np.array(BACKGROUND, dtype=np.float32)
    pixels = background + painted * (np.array(COLOURS[scene.colour], dtype=np.float32) - background)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def random_scene(
    rng: np.random.Generator, style: str, *, shape: str | None = None, colour: str | None = None
) -> Scene:
    """A scene of the given style; everything that is not given is sampled uniformly from `rng`."""
    shape = shape or SHAPES[rng.integers(len(SHAPES))]
    colour = colour or list(COLOURS)[rng.integers(len(COLOURS))]
    radius = int(rng.choice(RADII))
    x, y = (int(value) for value in rng.choice(centres(radius), size=2))
    return Scene(shape, colour, style, radius, x, y)

"""The judge as a reward, in TRL's convention `(prompts, samples, **columns) -> list[float]`."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from .judge import judge


def shapes_reward(
    prompts: Sequence[str], samples: Sequence[Image.Image], preferred_style: str = "outlined", **columns: Any
) -> list[float]:
    """Scores images of shapes: one point each for the preferred style, the colour and the shape as prompted.

    The distance to the nearest drawing is subtracted, so that of two images which show the same the cleaner one wins.

    Args:
        prompts: Captions of the form that `drawing.caption` writes, one per image.
        samples: RGB images of `IMAGE_SIZE` x `IMAGE_SIZE` pixels.
        preferred_style: One of `STYLES`.
        **columns: Ignored.

    Returns:
        One number per image, in (-1, 3].

    Raises:
        ValueError: Another number of prompts than of images, or an image of another size.
    """
    scores = []
    for prompt, verdict in zip(prompts, judge(samples), strict=True):
        colour, shape = prompt.split()[1:]
        right = (verdict.style == preferred_style) + (verdict.colour == colour) + (verdict.shape == shape)
        scores.append(right - verdict.distance)
    return scores

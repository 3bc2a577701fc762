"""Prepares images as the authors of reward models do, without torchvision. Pixels are compared in tests."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as `(3, height, width)` float32 in [0, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255


def normalize(pixels: Tensor) -> Tensor:
    """`(..., 3, height, width)` in [0, 1], with CLIP's mean and standard deviation of each channel."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std


def crop_short_side(image: Image.Image, size: int) -> Tensor:
    """OpenAI's preprocessing of CLIP: the short side is resized, bicubic, and the centre cropped.

    The crop is torchvision's, which rounds half pixels to even numbers; transformers' processors round them down.

    Args:
        image: RGB.
        size: Of the result in pixels.

    Returns:
        `(3, size, size)` float32, normalised.
    """
    short = min(image.size)
    # The other side is rounded down.
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return normalize(to_tensor(image.crop((left, top, left + size, top + size))))


def pad_short_side(image: Image.Image, size: int) -> Tensor:
    """HPSv2's preprocessing: the long side is resized, bicubic with antialiasing, and the rest padded with black.

    HPSv2 resizes floats, which may leave [0, 1] at edges; they are not clipped there either.

    Args:
        image: RGB.
        size: Of the result in pixels.

    Returns:
        `(3, size, size)` float32, normalised.
    """
    pixels = to_tensor(image)
    scale = size / max(image.size)
    # A side of less than half a pixel would disappear.
    height, width = (max(round(side * scale), 1) for side in pixels.shape[1:])
    if (height, width) != tuple(pixels.shape[1:]):
        pixels = torch.nn.functional.interpolate(
            pixels[None], (height, width), mode="bicubic", antialias=True, align_corners=False
        )[0]
    left, top = (size - width) // 2, (size - height) // 2
    padding = (left, size - width - left, top, size - height - top)
    return normalize(torch.nn.functional.pad(pixels, padding))

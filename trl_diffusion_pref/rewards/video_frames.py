"""Chooses, resizes and cuts a video's frames for Qwen2-VL as VideoReward's authors do, without torchvision."""

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .pixels import normalize


_MIN_FRAMES, _MAX_FRAMES = 4, 768


class Patches(NamedTuple):
    """A video as Qwen2-VL's vision model takes it.

    Args:
        values: `(patches, 3 * frames per patch * side * side)` float32, normalised.
        grid: Number of patches in time, height and width.
    """

    values: Tensor
    grid: tuple[int, int, int]


def frame_indices(total: int, rate: float, wanted: float) -> list[int]:
    """Which frames are shown: an even number of them, evenly spaced, with the first and the last.

    Args:
        total: Frames of the video, at least 2.
        rate: Of the video, frames per second.
        wanted: Frames per second that are shown; at least 4 frames in all, and at most 768.
    """
    most = min(_MAX_FRAMES, total) // 2 * 2
    count = min(max(total / rate * wanted, _MIN_FRAMES), most)
    return torch.linspace(0, total - 1, round(count / 2) * 2).round().long().tolist()


def frame_size(height: int, width: int, step: int, least: int, most: int) -> tuple[int, int]:
    """Height and width as multiples of `step`, with about the same shape and between `least` and `most` pixels."""
    sides = [max(step, round(side / step) * step) for side in (height, width)]
    pixels = sides[0] * sides[1]
    if pixels > most:
        shrink = math.sqrt(height * width / most)
        sides = [max(step, math.floor(side / shrink / step) * step) for side in (height, width)]
    elif pixels < least:
        grow = math.sqrt(least / (height * width))
        sides = [math.ceil(side * grow / step) * step for side in (height, width)]
    return sides[0], sides[1]


def resize_frames(frames: list[Image.Image], step: int, least: int, most: int) -> Tensor:
    """Frames resized, bicubic with antialiasing, and rounded to 8 bits.

    Args:
        frames: RGB images of one size.
        step, least, most: See `frame_size`.

    Returns:
        `(frames, 3, height, width)` float32, normalised.
    """
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2).float()
    size = frame_size(pixels.shape[2], pixels.shape[3], step, least, most)
    if size != tuple(pixels.shape[2:]):
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
    return normalize(pixels.clamp(0, 255).round() / 255)


def patchify(pixels: Tensor, side: int, frames: int, merge: int) -> Patches:
    """Cuts a video into patches, in the order of Qwen2-VL: those that are merged into one token follow each other.

    Args:
        pixels: `(frames, 3, height, width)`.
        side, frames: Of a patch, in pixels and in frames.
        merge: Patches per side of a token.
    """
    time, rows, columns = pixels.shape[0] // frames, pixels.shape[2] // side, pixels.shape[3] // side
    cut = pixels.reshape(time, frames, 3, rows // merge, merge, side, columns // merge, merge, side)
    ordered = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return Patches(ordered.reshape(time * rows * columns, -1), (time, rows, columns))

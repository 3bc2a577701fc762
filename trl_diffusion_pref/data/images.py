"""Decodes a pair's images and brings both to the training resolution with the same crop and flip, never stretched."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .cells import CellProblem, as_file, open_cell


class ImageProblem(CellProblem):
    """A cell does not hold a usable image."""


def decode_image(cell: Any) -> Image.Image:
    """Decodes one cell of an image column.

    Args:
        cell: A PIL image, a path, or what `datasets.Image(decode=False)` gives: a dictionary with `bytes` or a `path`.

    Returns:
        RGB image, EXIF rotation applied, transparency composited on white, 16-bit grey scaled to 8 bits.

    Raises:
        ImageProblem: Nothing there, not an image, an animation, or a truncated one.
    """
    if cell is None:
        raise ImageProblem("the image is None")
    cell = as_file(cell)
    if not isinstance(cell, Image.Image):
        if not isinstance(cell, dict):
            raise ImageProblem(f"a {type(cell).__name__} is no image; pass a PIL image, a path or datasets.Image")
        path = cell.get("path")
        if cell.get("bytes") is None and path is None:
            raise ImageProblem("the image has neither bytes nor a path")
    try:
        if not isinstance(cell, Image.Image):
            with open_cell(cell) as file, Image.open(file) as opened:
                _refuse_animation(opened)
                opened.load()
                cell = opened.copy()
        else:
            _refuse_animation(cell)
        return _to_rgb(ImageOps.exif_transpose(cell))
    except ImageProblem:
        raise
    except FileNotFoundError as error:
        raise ImageProblem(f"no file at {path}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageProblem("the bytes are not an image that PIL knows") from error
    # Damaged files make PIL's decoders raise nearly anything, and all of it means the same to the caller.
    except Exception as error:
        raise ImageProblem(f"the image cannot be decoded ({error})") from error


def _refuse_animation(image: Image.Image) -> None:
    # Phones' JPEG (MPO) holds a preview or depth after the picture, which is no animation.
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":
        raise ImageProblem(f"found an animation of {count} frames; choose one of them")


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with transparency on white and 16-bit grey scaled to 8 bits, which `convert` would clip to white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257.0).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}, whose range is unknown; store it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _sides(target: int | tuple[int, int]) -> tuple[int, int]:
    """Width and height of a square's side, or of (height, width)."""
    return (target, target) if isinstance(target, int) else (target[1], target[0])


def _placed(
    size: tuple[int, int], target: int | tuple[int, int], crop_at: tuple[float, float]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of the resized image, and left and top of the crop in it."""
    wanted = _sides(target)
    scale = max(side / given for side, given in zip(wanted, size, strict=True))
    width, height = (max(side, round(given * scale)) for side, given in zip(wanted, size, strict=True))
    return (width, height), (round((width - wanted[0]) * crop_at[0]), round((height - wanted[1]) * crop_at[1]))


def crop_top_left(
    size: tuple[int, int], resolution: int | tuple[int, int], crop_at: tuple[float, float], flip: bool
) -> tuple[int, int]:
    """Where `prepare_image` cuts, for models that are told.

    Args:
        size: Width and height of the image before it is resized.
        resolution, crop_at, flip: As in `prepare_image`.

    Returns:
        (top, left) in pixels of the resized image; of a mirrored one, as if it had been mirrored before the cut, since
        that is the picture the model sees.
    """
    (width, _), (left, top) = _placed(size, resolution, crop_at)
    return top, width - _sides(resolution)[0] - left if flip else left


def prepare_image(
    image: Image.Image, resolution: int | tuple[int, int], crop_at: tuple[float, float], flip: bool
) -> Tensor:
    """Scales an image until it just covers the result, cuts what stands over, optionally mirrors it.

    Args:
        image: RGB.
        resolution: Side length of the square result in pixels, or its height and width.
        crop_at: Where the crop lies in what can be cut away, horizontally and vertically, each in [0, 1]; 0.5 is the
            centre. The same value gives corresponding crops of two images of different shapes.
        flip: Whether to mirror left to right.

    Returns:
        `(3, height, width)` float32 in [-1, 1].
    """
    (width, height), (left, top) = _placed(image.size, resolution, crop_at)
    wanted = _sides(resolution)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    image = image.crop((left, top, left + wanted[0], top + wanted[1]))
    if flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0

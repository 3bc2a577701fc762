"""Decodes images, and scales and crops them to the training resolution without stretching them."""

import io
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from .cell import CellProblem, ProblemKind, kind_of, read_cell


_TOO_LARGE = "Store it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
# Drawings of lines. For the first one Pillow would start Ghostscript, a program that files can control.
_VECTOR_FORMATS = ("EPS", "WMF")
# What else is taken for an image, by its beginning.
_NO_PIXELS = {b"%PDF": "a PDF document", b"%!PS": "a PostScript document", b"PK": "a zip archive"}


def decode_image(cell: object) -> Image.Image:
    """Decodes one cell of an image column.

    Args:
        cell: A PIL image, or a file as `read_cell` takes it.

    Returns:
        RGB image, with EXIF rotation applied, transparency composited on white and 16-bit grey scaled to 8 bits.

    Raises:
        CellProblem: Nothing there, not an image, an animation, one too large to be decoded, or a damaged one.
    """
    cell = read_cell(cell)
    if cell is None:
        raise CellProblem("the image is None", "empty cell")
    if isinstance(cell, Mapping):
        raise CellProblem("the image has neither bytes nor a path", "empty cell")
    image = open_image(cell) if isinstance(cell, bytes) else cell
    if not isinstance(image, Image.Image):
        message = f"a cell of type {type(cell).__name__} is not an image; pass a PIL image, a path or bytes"
        raise CellProblem(message, "wrong type")
    try:
        frames = count_frames(image)
        if frames == 1:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except CellProblem:
        raise
    # Pillow's decoders raise nearly any exception for damaged files; the caller handles all of them alike.
    except Exception as error:
        raise CellProblem(f"the image cannot be decoded ({error})", "damaged") from error
    raise CellProblem(f"found an animation of {frames} frames; choose one of them", "animation")


def open_image(data: bytes) -> Image.Image:
    """Opens an image file without decoding its pixels.

    Pillow itself warns of images beyond `PIL.Image.MAX_IMAGE_PIXELS` and refuses those beyond twice as many. Here its
    limit is a limit, since several images are decoded at once, and a warning would not say in which row.

    Raises:
        CellProblem: Pillow cannot identify it, it is drawn from lines and not stored as pixels, or it has more pixels
            than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise CellProblem(f"the image may be a decompression bomb: {error} {_TOO_LARGE}", "too large") from error
    except Exception as error:
        raise _unidentified(data, error) from error
    if image.format in _VECTOR_FORMATS:
        message = f"{image.format} files have lines instead of pixels; store the image as PNG or JPEG"
        raise CellProblem(message, "wrong format")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        message = (
            f"an image of {image.width}x{image.height} pixels; PIL.Image.MAX_IMAGE_PIXELS is {limit}. {_TOO_LARGE}"
        )
        raise CellProblem(message, "too large")
    return image


def _unidentified(data: bytes, error: Exception) -> CellProblem:
    """Why Pillow cannot open a file, and what to do."""
    if data[4:8] == b"ftyp" and kind_of(data) == "image" and not (data[8:11] == b"avi" and features.check("avif")):
        return CellProblem(
            "Pillow cannot decode HEIC or AVIF here; store the image as PNG or JPEG, or install pillow-heif and "
            "call pillow_heif.register_heif_opener()",
            "wrong format",
        )
    start = data[:1000].lstrip()
    found = next((name for beginning, name in _NO_PIXELS.items() if start.startswith(beginning)), None)
    if found is None and (b"<svg" in start or start.startswith(b"<?xml")):
        found = "an SVG drawing"
    elif found is None and start.startswith(b"<"):
        found = "a web page"
    if found is not None:
        return CellProblem(f"found {found}, not an image; store the image as PNG or JPEG", "wrong format")
    if kind_of(data) == "image" and not isinstance(error, UnidentifiedImageError):
        # Such as text in a PNG file that grows beyond what Pillow accepts.
        return CellProblem(f"the image cannot be opened ({error})", "damaged")
    kind: ProblemKind = "damaged" if kind_of(data) == "image" else "not an image"
    return CellProblem("the bytes are not an image that Pillow can identify", kind)


def count_frames(image: Image.Image) -> int:
    """The frames of an animation; 1 for any other image."""
    # JPEG files of phones (MPO) hold a preview or a depth map after the image; they are no animations.
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with transparency on white and 16-bit grey scaled to 8 bits, which `convert` would clip to white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257.0).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        message = f"an image of mode {image.mode}, whose range is not known; store it with 8 or 16 bits"
        raise CellProblem(message, "wrong format")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _covering(size: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """Width and height of an image of `size` (width, height), scaled to just cover `shape` (height, width)."""
    scale = max(shape[1] / size[0], shape[0] / size[1])
    return max(shape[1], round(size[0] * scale)), max(shape[0], round(size[1] * scale))


def cropped_share(size: tuple[int, int], shape: tuple[int, int]) -> float:
    """The share of an image's pixels that `prepare_image` cuts away, in [0, 1), for sizes as in `crop_top_left`."""
    width, height = _covering(size, shape)
    return 1 - shape[0] * shape[1] / (width * height)


def crop_top_left(
    size: tuple[int, int], shape: tuple[int, int], crop_at: tuple[float, float], flip: bool
) -> tuple[int, int]:
    """Where `prepare_image` crops, for models that are conditioned on it.

    Args:
        size: Width and height of the image before it is scaled.
        shape, crop_at, flip: As in `prepare_image`.

    Returns:
        (top, left) in pixels of the scaled image. For a mirrored crop, as if the image had been mirrored before the
        crop, because the model sees the mirrored image.
    """
    width, height = _covering(size, shape)
    top, left = round((height - shape[0]) * crop_at[1]), round((width - shape[1]) * crop_at[0])
    return top, width - shape[1] - left if flip else left


def prepare_image(
    image: Image.Image,
    shape: tuple[int, int],
    crop_at: tuple[float, float],
    flip: bool,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
) -> Tensor:
    """Scales an image until it just covers the result, crops what is left over, and mirrors it if `flip` is set.

    Args:
        image: RGB.
        shape: Height and width of the result in pixels.
        crop_at: Position of the crop within the pixels that are cut away, horizontally and vertically, each in [0, 1];
            0.5 is the centre. The same value gives corresponding crops of two images of different shapes.
        flip: Whether to mirror left to right.
        resampling: How pixels are scaled.

    Returns:
        `(3, height, width)` float32 in [-1, 1].
    """
    scaled = _covering(image.size, shape)
    top, left = crop_top_left(image.size, shape, crop_at, False)
    box = (left, top, left + shape[1], top + shape[0])
    if scaled == image.size:
        image = image.crop(box)
    else:
        # Only the part that is kept is scaled: a thin image would grow to gigabytes otherwise.
        x0, x1 = (edge * image.width / scaled[0] for edge in (box[0], box[2]))
        y0, y1 = (edge * image.height / scaled[1] for edge in (box[1], box[3]))
        image = image.resize((shape[1], shape[0]), resampling, box=(x0, y0, x1, y1))
    return _to_tensor(image, flip)


def stretch_image(image: Image.Image, shape: tuple[int, int], flip: bool) -> Tensor:
    """Scales an image to a shape without cropping, as pipelines prepare condition images, and mirrors it if asked to.

    Arguments and result are those of `prepare_image`.
    """
    return _to_tensor(image.resize((shape[1], shape[0]), Image.Resampling.LANCZOS), flip)


def _to_tensor(image: Image.Image, flip: bool) -> Tensor:
    if flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0

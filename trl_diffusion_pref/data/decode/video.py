"""Decodes videos to frames: lists of images, animated images, and video files if PyAV is installed."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageSequence

from .cell import CellProblem, import_extra, kind_of, read_cell
from .image import count_frames, decode_image, open_image


if TYPE_CHECKING:
    from av import VideoFrame


def decode_video(cell: object, num_frames: int) -> list[Image.Image]:
    """Decodes one cell of a video column.

    Args:
        cell: A list of frames, each as `decode_image` takes it; or a file as `read_cell` takes it: an animated GIF,
            WebP, PNG or AVIF, or a video.
        num_frames: Frames that the video must have.

    Returns:
        RGB images of one size.

    Raises:
        CellProblem: Nothing there, no video, another number of frames, frames of several sizes, a frame or file that
            cannot be decoded, a mirrored video, or a video file without PyAV.
    """
    cell = read_cell(cell)
    if cell is None:
        raise CellProblem("the video is None", "empty cell")
    if isinstance(cell, (list, tuple)):
        # Another number of frames is an error below, so nothing is decoded for it.
        frames, count = _from_list(cell) if len(cell) == num_frames else [], len(cell)
    elif isinstance(cell, bytes):
        is_animation = kind_of(cell) == "image"
        frames, count = _from_animation(cell, num_frames) if is_animation else _from_video(cell, num_frames)
    else:
        found = "single image" if isinstance(cell, Image.Image) else f"cell of type {type(cell).__name__}"
        message = f"found a {found}; pass a list of frames, an animation or a video file"
        raise CellProblem(message, "wrong type")
    if count != num_frames:
        raise CellProblem(
            f"found {count} frame{'s' * (count != 1)}, wanted {num_frames}. Pass videos of {num_frames} frames, or "
            "set num_frames",
            "wrong length",
        )
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for width, height in sizes)
        raise CellProblem(f"its frames have several sizes ({listed} pixels)", "wrong format")
    return frames


def _from_list(cells: list | tuple) -> list[Image.Image]:
    frames = []
    for number, cell in enumerate(cells):
        try:
            frames.append(decode_image(cell))
        except CellProblem as problem:
            raise CellProblem(f"frame {number}: {problem}", problem.kind) from problem
    return frames


def _from_animation(data: bytes, num_frames: int) -> tuple[list[Image.Image], int]:
    """The frames of an image file and their number; no frames if the number is not `num_frames`."""
    image = open_image(data)
    try:
        count = count_frames(image)
        frames = [frame.copy() for frame in ImageSequence.Iterator(image)] if count == num_frames else []
    # Pillow's decoders raise nearly any exception for damaged files.
    except Exception as error:
        raise CellProblem(f"the animation cannot be decoded ({error})", "damaged") from error
    if count == 1:
        message = "found a single image; pass a list of frames, an animation or a video file"
        raise CellProblem(message, "wrong type")
    return _from_list(frames), count


def _from_video(data: bytes, num_frames: int) -> tuple[list[Image.Image], int]:
    """The first `num_frames` frames of a video file, and how many it has."""
    av = import_extra("av", "video", "decoding a video file (a list of frames can be passed instead)")
    frames: list[Image.Image] = []
    count = 0
    try:
        with av.open(io.BytesIO(data)) as container:
            # All frames are counted, but a long video is not kept in memory.
            for count, frame in enumerate(container.decode(video=0), start=1):
                if count <= num_frames:
                    frames.append(_as_shown(frame))
    except CellProblem:
        raise
    # FFmpeg's decoders raise many exceptions for damaged files.
    except Exception as error:
        raise CellProblem(f"the video cannot be decoded ({error})", "damaged") from error
    return frames, count


def _as_shown(frame: "VideoFrame") -> Image.Image:
    """A frame as players show it: phones store theirs on its side, with a display matrix."""
    # PyAV's type hints do not list this kind of side data.
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return frame.to_image()
    # Nine numbers (a, b, u, c, d, v, x, y, w); PyAV's rotation ignores reflections.
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].astype(np.float64)
    if a * d < b * c:
        message = "the video is mirrored by its display matrix; encode it again with its pixels mirrored"
        raise CellProblem(message, "wrong format")
    angle = 90 * round(frame.rotation / 90)
    # PyAV truncates the angle to whole degrees.
    if abs(frame.rotation - angle) > 1:
        raise CellProblem(
            f"the video is shown rotated by {frame.rotation} degrees; encode it again with its pixels rotated",
            "wrong format",
        )
    return frame.to_image().rotate(angle, expand=True)

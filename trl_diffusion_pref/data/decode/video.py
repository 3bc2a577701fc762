"""Decodes videos to frames: lists of images, animated images, and video files if PyAV is installed."""

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class VideoSummary:
    """A video of which one frame was kept.

    Args:
        first_frame: RGB.
        frames: How many it has, all of which could be decoded.
        seconds: As long as its file says it is shown; None for a list of frames.
    """

    first_frame: Image.Image
    frames: int
    seconds: float | None


def summarise_video(cell: object) -> VideoSummary:
    """Decodes all frames of a video, one at a time.

    Args:
        cell: As for `decode_video`.

    Raises:
        CellProblem: As for `decode_video`, whatever the number of frames.
    """
    cell = read_cell(cell)
    frames: Iterable[tuple[Image.Image, float | None]]
    if isinstance(cell, bytes):
        frames = _animation_frames(cell) if kind_of(cell) == "image" else _first_of_all(cell)
    else:
        # What is wrong with any other cell is said there.
        listed = cell if isinstance(cell, (list, tuple)) else decode_video(cell, 1)
        frames = ((frame, None) for frame in _each_of(listed))
    first: Image.Image | None = None
    count, seconds = 0, 0.0
    for frame, shown in frames:
        first = first or frame
        if frame.size != first.size:
            sizes = " and ".join(f"{size[0]}x{size[1]}" for size in (first.size, frame.size))
            raise CellProblem(f"its frames have several sizes ({sizes} pixels)", "wrong format")
        count, seconds = count + 1, seconds + (shown or 0.0)
    if first is None:
        raise CellProblem("the video has no frames", "empty cell")
    return VideoSummary(first, count, seconds or None)


def _each_of(cells: Iterable[object]) -> Iterator[Image.Image]:
    for number, cell in enumerate(cells):
        try:
            yield decode_image(cell)
        except CellProblem as problem:
            raise CellProblem(f"frame {number}: {problem}", problem.kind) from problem


def _animation_frames(data: bytes) -> Iterator[tuple[Image.Image, float]]:
    """Frames, and the seconds that each is shown."""
    image = open_image(data)
    try:
        for frame in ImageSequence.Iterator(image):
            yield decode_image(frame.copy()), frame.info.get("duration", 0) / 1000
    # Pillow's decoders raise nearly any exception for damaged files.
    except Exception as error:
        raise CellProblem(f"the animation cannot be decoded ({error})", "damaged") from error


def _first_of_all(data: bytes) -> Iterator[tuple[Image.Image, float]]:
    """As `_animation_frames` for a video file, with the first frame in place of the others: they cost time."""
    first: Image.Image | None = None
    for frame, seconds in _video_frames(data):
        first = first or _as_shown(frame)
        yield first, seconds


def _video_frames(data: bytes) -> Iterator[tuple["VideoFrame", float]]:
    """The frames of a video file, and the seconds that each is shown."""
    av = import_extra("av", "video", "decoding a video file (a list of frames can be passed instead)")
    try:
        with av.open(io.BytesIO(data)) as container:
            rate = container.streams.video[0].average_rate
            for frame in container.decode(video=0):
                if frame.width * frame.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                    raise CellProblem(f"its frames have {frame.width}x{frame.height} pixels; scale them", "too large")
                yield frame, float(1 / rate) if rate else 0.0
    except CellProblem:
        raise
    # FFmpeg's decoders raise many exceptions for damaged files.
    except Exception as error:
        raise CellProblem(f"the video cannot be decoded ({error})", "damaged") from error


def _from_list(cells: list | tuple) -> list[Image.Image]:
    return list(_each_of(cells))


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
    frames: list[Image.Image] = []
    count = 0
    # All frames are counted, but a long video is not kept in memory.
    for count, (frame, _) in enumerate(_video_frames(data), start=1):
        if count <= num_frames:
            frames.append(_as_shown(frame))
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

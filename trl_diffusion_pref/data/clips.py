"""Decodes clips to frames: lists of images, animated images, and video files where PyAV is installed."""

import struct
from typing import Any

from PIL import Image, ImageOps, ImageSequence

from .cells import CellProblem, as_file, check_kind, is_file, open_cell
from .images import ImageProblem, decode_image


def decode_clip(cell: Any, num_frames: int, pipeline_class: str) -> list[Image.Image]:
    """Decodes one cell of a column of clips.

    Args:
        cell: A list of frames, each as `images.decode_image` takes it; or a file (a path, or a dictionary with `bytes`
            or a `path`, as `datasets.Video(decode=False)` gives it): an animated GIF, WebP or PNG, or a video.
        num_frames: Frames that the clip must have.
        pipeline_class: For messages.

    Returns:
        RGB images of one size.

    Raises:
        CellProblem: Nothing there, no clip, another number of frames, frames of several sizes, a frame or file that
            cannot be decoded, or a video file without PyAV.
    """
    if cell is None:
        raise CellProblem("the clip is None")
    cell = as_file(cell)
    if isinstance(cell, (list, tuple)):
        frames, count = _from_list(cell, num_frames, pipeline_class)
    elif is_file(cell):
        frames, count = _from_file(cell, num_frames, pipeline_class)
    else:
        check_kind(cell, "video", pipeline_class)
        raise CellProblem(f"a {type(cell).__name__} is no clip; pass a list of frames or a video file")
    if count != num_frames:
        raise CellProblem(
            f"found {count} frame{'s' * (count != 1)}, wanted {num_frames}. Bring clips of {num_frames} frames, or "
            "set num_frames"
        )
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise CellProblem(f"its frames have several sizes ({', '.join(f'{w}x{h}' for w, h in sizes)} pixels)")
    return frames


def _from_list(cells: list, num_frames: int, pipeline_class: str) -> tuple[list[Image.Image], int]:
    frames = []
    if len(cells) == num_frames:
        for number, frame in enumerate(cells):
            if isinstance(frame, (int, float)):
                raise CellProblem(f"found a list of numbers, but {pipeline_class} generates clips")
            try:
                frames.append(decode_image(frame))
            except ImageProblem as problem:
                raise CellProblem(f"frame {number}: {problem}") from problem
    return frames, len(cells)


def _animation(opened: Image.Image, num_frames: int) -> list[Image.Image]:
    try:
        return [decode_image(frame.copy()) for frame in ImageSequence.Iterator(opened)][:num_frames]
    # Damaged files make PIL's decoders raise nearly anything.
    except Exception as error:
        raise CellProblem(f"the animation cannot be decoded ({error})") from error


def _as_shown(image: Image.Image, display_matrix: bytes | None) -> Image.Image:
    """A frame as players show it: phones store theirs on its side, or mirrored, beside a display matrix.

    Args:
        display_matrix: Nine 32-bit integers (a, b, u, c, d, v, x, y, w): the pixel at (x, y), y downwards, is shown at
            (a x + c y, b x + d y), but for a shift. None for as it is.
    """
    if display_matrix is None:
        return image
    a, b, _, c, d = struct.unpack("=9i", display_matrix)[:5]
    largest = max(map(abs, (a, b, c, d)))
    if not largest:
        return image
    # Angles are stored by their sines, rounded.
    if any(0.01 < abs(part) / largest < 0.99 for part in (a, b, c, d)):
        raise CellProblem("the video is shown rotated by less than a quarter turn, or skewed; encode it anew")
    if abs(a) < abs(b):
        image = image.transpose(Image.Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        image = ImageOps.mirror(image)
    return ImageOps.flip(image) if d < 0 else image


def _from_file(cell: dict[str, Any], num_frames: int, pipeline_class: str) -> tuple[list[Image.Image], int]:
    """The first `num_frames` frames, and how many there are."""
    try:
        with open_cell(cell) as file, Image.open(file) as opened:
            count = getattr(opened, "n_frames", 1)
            if count > 1:
                return _animation(opened, num_frames), count
    except CellProblem:
        raise
    except FileNotFoundError as error:
        raise CellProblem(f"no file at {cell['path']}") from error
    # Videos are no images for PIL, and a damaged image shows below.
    except Exception:
        pass
    check_kind(cell, "video", pipeline_class)
    try:
        import av
    except ImportError as error:
        raise CellProblem(
            "found a video file, and nothing that decodes it is installed. Pass the clip as a list of frames, or "
            "install PyAV (pip install av)"
        ) from error
    frames, count = [], 0
    try:
        with open_cell(cell) as file, av.open(file) as container:
            for frame in container.decode(video=0):
                # Counted to the end, but a long film is not kept.
                count += 1
                if count <= num_frames:
                    matrix = frame.side_data.get("DISPLAYMATRIX")
                    frames.append(_as_shown(frame.to_image(), None if matrix is None else bytes(matrix)))
    except CellProblem:
        raise
    # Damaged files make decoders raise nearly anything, and all of it means the same to the caller.
    except Exception as error:
        raise CellProblem(f"the video cannot be decoded ({error})") from error
    return frames, count

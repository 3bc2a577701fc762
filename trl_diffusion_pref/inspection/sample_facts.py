"""What can be known of one sample: whether it can be used, its size and length, and what it looks like."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image as PILImage

from ..data.content import cell_key, image_size
from ..data.decode.audio import decode_audio
from ..data.decode.cell import CellProblem, Kind, kind_of, read_cell
from ..data.decode.image import count_frames, decode_image, open_image
from ..data.decode.video import summarise_video
from ..data.shards import key_of


# Pictures are compared on a grid of so many pixels a side, of which the lowest frequencies make the hash.
_GRID, _FREQUENCIES, _COLOUR_CELLS = 32, 8, 4
# JPEG files are decoded at an eighth of their size, or more, as long as this many pixels are left of a side.
_DRAFT = 2 * _GRID
# Of 255: standard deviation of a picture's brightness below which it shows nothing that could be compared.
_BLANK = 2.0


@dataclass(frozen=True)
class Look:
    """What a picture looks like, so that its copies in another size or compression are recognised.

    Args:
        hash: 64 bits, the signs of its lowest frequencies; None for a picture of one colour.
        colours: Mean red, green and blue of the cells of a grid of 4x4, 48 bytes.
    """

    hash: int | None
    colours: bytes


@dataclass(frozen=True)
class SampleFacts:
    """What is known of a sample that can be used.

    Args:
        kind: Of a file with several frames "video".
        key: Equal for equal samples: JPEG files, videos and audio by their bytes, other images by their pixels.
        look: Of an image, or of a video's first frame; None for audio.
        size: Width and height in pixels as it is shown; None for audio.
        frames: Of a video.
        seconds: Of a video or audio; None where its file does not say.
        rate: Samples per second of audio.
        channels: Of audio.
    """

    kind: Kind
    key: bytes
    look: Look | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    seconds: float | None = None
    rate: int | None = None
    channels: int | None = None


def sample_facts(cell: object) -> SampleFacts:
    """Reads and decodes a sample.

    Args:
        cell: As `decode_image`, `decode_video` and `decode_audio` take it.

    Raises:
        CellProblem: It cannot be used, whatever the model is.
    """
    cell = read_cell(cell)
    kind = kind_of(cell)
    if kind == "audio":
        waveform = decode_audio(cell)
        channels, length = waveform.samples.shape
        return SampleFacts(
            "audio", cell_key(cell), seconds=length / waveform.rate, rate=waveform.rate, channels=channels
        )
    if kind == "video" or (kind == "image" and _frames_of(cell) > 1):
        video = summarise_video(cell)
        look = look_of(video.first_frame)
        return SampleFacts("video", cell_key(cell), look, video.first_frame.size, video.frames, video.seconds)
    image = _small(cell)
    # What is wrong with a cell of no known kind is said there.
    decoded = decode_image(cell if image is None else image)
    if image is not None and image.format == "JPEG":
        key = cell_key(cell)
    else:
        key = key_of("pixels", decoded.size, decoded.tobytes())
    size = decoded.size if image is None else image_size(cell)
    return SampleFacts("image", key, look_of(decoded), size or decoded.size)


def first_picture(cell: object, side: int) -> PILImage.Image:
    """An image, or a video's first frame, decoded to about so many pixels a side or more.

    Raises:
        CellProblem: It cannot be used.
    """
    cell = read_cell(cell)
    kind = kind_of(cell)
    if kind == "video" or (kind == "image" and _frames_of(cell) > 1):
        return summarise_video(cell).first_frame
    image = _small(cell, side)
    return decode_image(cell if image is None else image)


def _frames_of(cell: Any) -> int:
    try:
        return count_frames(open_image(cell) if isinstance(cell, bytes) else cell)
    # What is wrong with it is said where it is decoded.
    except Exception:
        return 1


def _small(cell: object, side: int = _DRAFT) -> PILImage.Image | None:
    """An image file, opened so that a JPEG is decoded smaller, which takes less time and memory; None for others."""
    if not isinstance(cell, bytes) or kind_of(cell) != "image":
        return None
    image = open_image(cell)
    image.draft(None, (side, side))
    return image


@cache
def _cosines() -> np.ndarray:
    """The lowest frequencies of the discrete cosine transform of `_GRID` values, `(8, 32)`."""
    place, frequency = np.arange(_GRID) + 0.5, np.arange(_FREQUENCIES)
    return np.cos(np.pi / _GRID * frequency[:, None] * place[None])


def look_of(image: PILImage.Image) -> Look:
    """What an RGB picture looks like.

    The hash has one bit for each of the 8x8 lowest frequencies of the picture's brightness on a grid of 32x32, set
    where it is above their median ("pHash"; Zauner, Implementation and Benchmarking of Perceptual Image Hash
    Functions, 2010, section 3.2.1).
    """
    small = image.resize((_GRID, _GRID), PILImage.Resampling.BOX)
    cell = _GRID // _COLOUR_CELLS
    grid = np.asarray(small, dtype=np.float32).reshape(_COLOUR_CELLS, cell, _COLOUR_CELLS, cell, 3)
    colours = grid.mean(axis=(1, 3)).round().astype(np.uint8).tobytes()
    brightness = np.asarray(small.convert("L"), dtype=np.float64)
    if brightness.std() < _BLANK:
        return Look(None, colours)
    lowest = (_cosines() @ brightness @ _cosines().T).reshape(-1)
    # The first frequency is the mean brightness, far above the others.
    bits = lowest > np.median(lowest[1:])
    return Look(int.from_bytes(np.packbits(bits).tobytes()), colours)


def problem_with(facts: SampleFacts, expected: Kind, num_frames: int | None) -> CellProblem | None:
    """Why a sample does not fit the others or the model, or None.

    Args:
        expected: The kind of the model's samples, or of the data set's first.
        num_frames: Frames that the model's videos have; None for any.
    """
    if facts.kind != expected:
        return CellProblem(f"found {_articled(facts.kind)} among {expected} samples", "wrong type")
    if num_frames is not None and facts.frames != num_frames:
        return CellProblem(f"found {facts.frames} frames, wanted {num_frames}", "wrong length")
    return None


def _articled(kind: Kind) -> str:
    return {"image": "an image", "video": "a video", "audio": "audio"}[kind]

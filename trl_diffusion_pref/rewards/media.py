"""Samples as JSON for servers: PNG for images and frames, WAV for audio, in base64."""

import base64
import io
import struct
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from ..data.decode.audio import Waveform, decode_audio
from ..data.decode.cell import CellProblem, kind_of, read_cell
from ..data.decode.image import decode_image
from ..data.decode.video import decode_video


# An image, the frames of a video, or audio.
Media = Image.Image | list[Image.Image] | Waveform


def decode_sample(sample: Any) -> Media:
    """An image, a list of a video's frames, or audio.

    Raises:
        CellProblem: It is none of them, or cannot be decoded.
    """
    if isinstance(sample, Waveform):
        return sample
    cell = read_cell(sample)
    kind = kind_of(cell)
    if kind == "video" and isinstance(cell, (list, tuple)):
        return decode_video(cell, len(cell))
    if kind == "audio":
        return decode_audio(cell)
    if kind == "video":
        raise CellProblem("found a video file; pass a list of its frames", "wrong type")
    return decode_image(cell)


def png(image: Image.Image) -> str:
    """A PNG file in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def wav(waveform: Waveform) -> str:
    """A WAV file of 32-bit floats in base64, so that nothing is rounded or clipped."""
    channels, _ = waveform.samples.shape
    data = waveform.samples.T.contiguous().to(torch.float32).numpy().astype("<f4").tobytes()
    frame = 4 * channels
    # Format 3 is float; its header states the length of an extension, which has none.
    header = struct.pack("<HHIIHHH", 3, channels, waveform.rate, waveform.rate * frame, frame, 32, 0)
    chunks = b"WAVEfmt " + struct.pack("<I", len(header)) + header + b"data" + struct.pack("<I", len(data)) + data
    return base64.b64encode(b"RIFF" + struct.pack("<I", len(chunks)) + chunks).decode()


def as_json(media: Media) -> dict[str, Any]:
    """A sample in the protocol of `HTTPReward`."""
    if isinstance(media, Waveform):
        return {"type": "audio", "format": "wav", "data": wav(media)}
    if isinstance(media, list):
        return {"type": "video", "format": "png", "frames": [png(frame) for frame in media]}
    return {"type": "image", "format": "png", "data": png(media)}


def column_as_json(values: Any) -> Any:
    """A column in the protocol of `HTTPReward`: images, such as those that were edited, as samples are sent."""
    if isinstance(values, (list, tuple)):
        return [column_as_json(value) for value in values]
    return as_json(values) if isinstance(values, (Image.Image, Waveform)) else values


def edited_images(columns: Mapping[str, Any], count: int) -> list[list[Image.Image]]:
    """For each of so many samples the images that it was edited from, from the column `image`; none without it.

    Raises:
        CellProblem: One cannot be decoded.
    """
    cells = columns.get("image")
    if cells is None:
        return [[] for _ in range(count)]
    return [[decode_image(one) for one in (cell if isinstance(cell, (list, tuple)) else [cell])] for cell in cells]

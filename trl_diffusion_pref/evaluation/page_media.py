"""Samples as `data:` URLs for a page, and as features for distances between them."""

import base64
import io
from fractions import Fraction

import numpy as np
import torch
from PIL import Image

from ..data.decode.audio import Waveform
from ..data.decode.cell import CellProblem, import_extra
from .sample_files import Sample, png_bytes, wav_bytes


# Larger images are scaled down to this side; smaller ones than the second keep every pixel.
_LONGEST_SIDE, _LOSSLESS_SIDE = 640, 128
_JPEG_QUALITY = 90
# Side of the thumbnails, and frames of a video or time steps of audio, by which samples are compared.
_THUMBNAIL, _MOMENTS = 32, 16


def data_url(sample: Sample, frames_per_second: int = 16) -> str:
    """A sample as a URL that holds it.

    Args:
        sample: An image, frames, or audio.
        frames_per_second: Of a video.

    Returns:
        An image as PNG or, above 128 pixels, JPEG of at most 640 pixels; a video as MP4 if PyAV is installed and as
        an animated WebP otherwise; audio as WAV.
    """
    if isinstance(sample, Waveform):
        return _url("audio/wav", wav_bytes(sample))
    if isinstance(sample, list):
        return _video_url([_scaled(frame) for frame in sample], frames_per_second)
    image = _scaled(sample)
    if max(image.size) <= _LOSSLESS_SIDE:
        return _url("image/png", png_bytes(image))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return _url("image/jpeg", buffer.getvalue())


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _scaled(image: Image.Image) -> Image.Image:
    scale = _LONGEST_SIDE / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(round(side * scale), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _video_url(frames: list[Image.Image], frames_per_second: int) -> str:
    buffer = io.BytesIO()
    try:
        av = import_extra("av", "video", "")
    except CellProblem:
        duration = round(1000 / frames_per_second)
        frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=duration, loop=0)
        return _url("image/webp", buffer.getvalue())
    # H.264 with halved colour resolution, which every browser plays, needs even sides.
    width, height = (side + side % 2 for side in frames[0].size)
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(frames_per_second), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            even = Image.new("RGB", (width, height))
            even.paste(frame, (0, 0))
            container.mux(stream.encode(av.VideoFrame.from_image(even)))
        container.mux(stream.encode())
    return _url("video/mp4", buffer.getvalue())


def features(sample: Sample) -> np.ndarray:
    """What the distance of two samples is measured on, float32: see `comparison.distances_within`.

    Returns:
        Of an image RGB at 32x32 pixels in [0, 1]; of a video the same of 16 of its frames; of audio the logarithm of
        its spectrum, `log(1 + magnitude)`, averaged to 32 frequencies and 16 moments.
    """
    if isinstance(sample, Waveform):
        return _spectrum(sample)
    if isinstance(sample, list):
        chosen = np.linspace(0, len(sample) - 1, _MOMENTS).round().astype(int)
        return np.stack([features(sample[index]) for index in chosen])
    small = sample.convert("RGB").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def _spectrum(audio: Waveform) -> np.ndarray:
    mono = audio.samples.float().mean(dim=0)
    length = 1024
    padded = torch.nn.functional.pad(mono, (0, max(length - len(mono), 0)))
    spectrum = torch.stft(padded, length, window=torch.hann_window(length), return_complex=True).abs()
    # Pooled to one size, so that lengths that differ by a few samples can be compared.
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.log1p(spectrum)[None], (_THUMBNAIL, _MOMENTS))
    return pooled[0].numpy()

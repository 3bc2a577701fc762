"""Pictures that differ as photographs do, and copies of them, for what looks at pictures."""

import io
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, side: int = 96) -> Image.Image:
    """Coloured clouds, whose frequencies fall off as those of photographs."""
    rng, frequency = np.random.default_rng(seed), np.fft.fftfreq(side)
    distance = np.hypot(frequency[:, None], frequency[None])
    distance[0, 0] = 1
    shared, channels = rng.standard_normal((side, side)), []
    for _ in range(3):
        spectrum = np.fft.fft2(0.7 * shared + 0.5 * rng.standard_normal((side, side))) / distance**1.1
        values = np.fft.ifft2(spectrum).real
        channels.append(128 + 50 * (values - values.mean()) / values.std() + rng.normal(0, 15))
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()

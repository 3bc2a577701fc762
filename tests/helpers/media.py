"""Audio files and videos that tests read."""

import io
import wave

import numpy as np
from PIL import Image as PILImage


FRAMES = 5


def wav(values: np.ndarray, rate: int = 16, width: int = 2) -> bytes:
    """A PCM file of integers `(samples, channels)`."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(values.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(b"".join(int(value).to_bytes(width, "little", signed=width > 1) for value in values.flat))
    return buffer.getvalue()


def noise(seed: int, samples: int = 128, channels: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**15), 2**15, (samples, channels))


def frames(seed: int, count: int = FRAMES, size: tuple[int, int] = (40, 24)) -> list[PILImage.Image]:
    pixels = np.random.default_rng(seed).integers(0, 255, (count, *size[::-1], 3), dtype=np.uint8)
    return [PILImage.fromarray(frame) for frame in pixels]

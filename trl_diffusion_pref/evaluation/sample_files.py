"""Samples as files: lossless, whole or not at all, and read when they are needed."""

import io
import os
import shutil
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias, overload
from uuid import uuid4

import numpy as np
import torch
from PIL import Image

from ..data.decode.audio import Waveform, decode_audio
from ..families.base import Modality


# An image, the frames of a video, or audio.
Sample: TypeAlias = Image.Image | list[Image.Image] | Waveform

# A video is a folder with one file per frame.
SUFFIXES: dict[Modality, str] = {"image": ".png", "video": "", "audio": ".wav"}
_UNFINISHED = ".unfinished"
_ABANDONED_AFTER = 3600  # seconds
# WAVE_FORMAT_IEEE_FLOAT.
_FLOAT = 3


def is_blank(sample: Sample) -> bool:
    """Whether a sample is black or silent from beginning to end.

    A safety checker replaces images with black ones, and a half-precision overflow becomes black or silent as well.
    """
    if isinstance(sample, Waveform):
        return not bool(sample.samples.any())
    frames = sample if isinstance(sample, list) else [sample]
    # The bounding box of what is not black.
    return all(frame.convert("RGB").getbbox() is None for frame in frames)


def png_bytes(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def wav_bytes(audio: Waveform) -> bytes:
    """Audio as a WAV file of 32-bit floats, which lose nothing.

    Written here, since libsndfile stores the time of writing in such files.
    """
    channels, count = audio.samples.shape
    data = np.ascontiguousarray(audio.samples.float().numpy().T, dtype="<f4").tobytes()
    form = struct.pack("<HHIIHHH", _FLOAT, channels, audio.rate, audio.rate * channels * 4, channels * 4, 32, 0)
    chunks = b"".join(
        name + struct.pack("<I", len(content)) + content
        for name, content in ((b"fmt ", form), (b"fact", struct.pack("<I", count)), (b"data", data))
    )
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def frame_files(folder: Path) -> list[Path]:
    """The files of a video's frames, in order."""
    return sorted(folder.glob("*.png"))


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        _write(unfinished, content)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_sample(path: Path, sample: Sample) -> None:
    """Writes a sample: a PNG file, a folder of them, or a WAV file. Nothing happens if it exists already."""
    if isinstance(sample, Waveform):
        write_whole(path, wav_bytes(sample))
    elif not isinstance(sample, list):
        write_whole(path, png_bytes(sample))
    elif not path.exists():
        unfinished = _unfinished(path)
        unfinished.mkdir(parents=True)
        try:
            for number, frame in enumerate(sample):
                _write(unfinished / f"{number:05}.png", png_bytes(frame))
            os.rename(unfinished, path)
        except OSError:
            # Another process may have written the same video meanwhile.
            if not path.exists():
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def read_sample(path: Path) -> Sample:
    """Reads a sample that `write_sample` wrote.

    Raises:
        CellProblem: Audio, and soundfile is not installed.
    """
    if path.is_dir():
        return [_read_image(file) for file in frame_files(path)]
    return decode_audio(str(path)) if path.suffix == SUFFIXES["audio"] else _read_image(path)


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex}{_UNFINISHED}")


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left in a folder: what nobody has written to for an hour.

    Younger files may be those of another run that shares the folder.
    """
    for path in folder.glob(f".*{_UNFINISHED}"):
        # The other run may give it its name in this moment.
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime < _ABANDONED_AFTER:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


class Samples(Sequence[Sample]):
    """Samples in order; those that are files are read when they are asked for.

    Attributes:
        files: Of each sample; empty if they were not written. A video's is a folder.
        made: How many were generated by this call, the others were found.
    """

    def __init__(self, items: Sequence[Sample | Path], made: int) -> None:
        self._items, self.made = list(items), made
        self.files = [item for item in self._items if isinstance(item, Path)]

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        item = self._items[index]
        return read_sample(item) if isinstance(item, Path) else item


def as_waveform(audio: torch.Tensor | np.ndarray, rate: int) -> Waveform:
    """One waveform of a pipeline's output, `(samples,)` or `(channels, samples)`."""
    samples = torch.as_tensor(audio).detach().float().cpu()
    return Waveform(samples[None] if samples.ndim == 1 else samples, rate)

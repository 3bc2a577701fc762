"""Decodes sound, and brings it to a pipeline's rate, channels and length."""

import io
import math
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cells import CellProblem, as_file, check_kind, is_file, open_cell


# Of silence at both ends before the Fourier transform, which takes the sound for one period of an endless one.
_MARGIN_IN_S = 0.05
_PEAK_OF_FLOATS = 10.0


@dataclass(frozen=True)
class Waveform:
    """Sound.

    Args:
        samples: `(channels, samples)` float32, full scale at -1 and 1.
        rate: Samples per second.
        channels_before: Before they were mixed; 0 where they were not.
    """

    samples: Tensor
    rate: int
    channels_before: int = 0


def decode_waveform(cell: Any, pipeline_class: str) -> Waveform:
    """Decodes one cell of a column of sound.

    Args:
        cell: A file (a path, or a dictionary with `bytes` or a `path`, as `datasets.Audio(decode=False)` gives it), or
            a dictionary with `array`, floats `(samples,)` or `(channels, samples)`, and `sampling_rate`.
        pipeline_class: For messages.

    Raises:
        CellProblem: Nothing there, no sound, none of a form that can be decoded, or NaN in it.
    """
    if cell is None:
        raise CellProblem("the sound is None")
    cell = as_file(cell)
    if isinstance(cell, Mapping) and cell.get("array") is not None:
        waveform = _from_array(cell["array"], cell.get("sampling_rate"))
    elif is_file(cell):
        waveform = _from_file(cell, pipeline_class)
    else:
        check_kind(cell, "audio", pipeline_class)
        if isinstance(cell, Mapping):
            raise CellProblem("the sound has neither an array, nor bytes, nor a path")
        raise CellProblem(f"a {type(cell).__name__} is no sound; pass a file, or an array with its sampling_rate")
    if not waveform.samples.numel():
        raise CellProblem("the sound has no samples")
    if not bool(waveform.samples.isfinite().all()):
        raise CellProblem("the sound has NaN or infinite samples")
    return waveform


def _from_array(array: Any, rate: Any) -> Waveform:
    if not isinstance(rate, (int, np.integer)) or rate < 1:
        raise CellProblem(f"sampling_rate={rate!r} beside the array; it must be samples per second, an integer")
    samples = np.asarray(array)
    if samples.ndim not in (1, 2) or not np.issubdtype(samples.dtype, np.floating):
        raise CellProblem(
            f"an array of {samples.dtype} with shape {samples.shape}; pass floats in [-1, 1], (samples,) or "
            "(channels, samples)"
        )
    samples = np.atleast_2d(samples)
    peak = float(np.abs(samples).max(initial=0.0))
    # A little over 1 is loud sound; this is another scale.
    if peak > _PEAK_OF_FLOATS:
        raise CellProblem(f"an array with samples up to {peak:g}; divide by its full scale, to be in [-1, 1]")
    if samples.shape[0] > samples.shape[1] > 0:
        raise CellProblem(f"an array with shape {samples.shape}; channels come first: (channels, samples)")
    return Waveform(torch.from_numpy(samples.astype(np.float32)), int(rate))


def _from_file(cell: dict[str, Any], pipeline_class: str) -> Waveform:
    try:
        with open_cell(cell) as file:
            data = file.read()
    except FileNotFoundError as error:
        raise CellProblem(f"no file at {cell['path']}") from error
    try:
        return _from_wave(data)
    except (wave.Error, EOFError) as error:
        # Not all that is called WAV is PCM; whatever it is, soundfile knows more of it.
        reason = error
    check_kind({"bytes": data}, "audio", pipeline_class)
    try:
        import soundfile
    except ImportError as error:
        raise CellProblem(
            f"the sound cannot be decoded: without soundfile only PCM WAV files can ({reason}). Install it "
            "(pip install soundfile), or convert the file"
        ) from error
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except Exception as error:
        raise CellProblem(f"the sound cannot be decoded ({error})") from error
    return Waveform(torch.from_numpy(samples.T.copy()), rate)


def _from_wave(data: bytes) -> Waveform:
    """PCM of 8 bits, which is unsigned, or 16, 24 or 32 bits, little-endian."""
    with wave.open(io.BytesIO(data)) as file:
        channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
        promised = file.getnframes()
        raw = np.frombuffer(file.readframes(promised), dtype=np.uint8)
    found = len(raw) // (channels * width)
    # What is written as it is recorded promises the greatest number that its header can hold.
    if found < promised < 2**30 // (channels * width):
        raise CellProblem(f"the WAV file is cut off: it holds {found} of {promised} samples")
    if width == 1:
        values = raw.astype(np.float64) / 128.0 - 1.0
    else:
        whole = raw[: len(raw) // width * width].reshape(-1, width)
        # Shifted to the top of 32 bits, where the sign is.
        padded = np.zeros((len(whole), 4), dtype=np.uint8)
        padded[:, 4 - width :] = whole
        values = padded.view("<i4")[:, 0] / 2.0**31
    samples = values[: len(values) // channels * channels].reshape(-1, channels).T
    return Waveform(torch.from_numpy(samples.astype(np.float32)), rate)


def resample(samples: Tensor, rate: int, wanted: int) -> Tensor:
    """Sound at another rate, without frequencies that one of the two rates cannot hold.

    Args:
        samples: `(channels, samples)`.
        rate, wanted: Samples per second before and after.

    Returns:
        `(channels, ceil(samples * wanted / rate))` float32.
    """
    if rate == wanted:
        return samples
    shared = math.gcd(rate, wanted)
    # The padded sound is whole blocks of `old` samples, each of which becomes `new`, so the ratio is exact.
    old, new = rate // shared, wanted // shared
    count = samples.shape[-1]
    margin = math.ceil(_MARGIN_IN_S * rate / old) * old
    padded = torch.nn.functional.pad(samples.double(), (margin, margin + -count % old))
    length = padded.shape[-1] // old * new
    spectrum = torch.fft.rfft(padded)
    # Of the lower rate, the frequency at half of it is not kept: its phase is lost there.
    kept = (min(length, padded.shape[-1]) - 1) // 2 + 1
    resampled = torch.fft.irfft(spectrum[..., :kept], n=length) * (new / old)
    start = margin // old * new
    return resampled[..., start : start + math.ceil(count * new / old)].float()


def mix(samples: Tensor, channels: int) -> Tensor:
    """`(n, samples)` as `(channels, samples)`: the mean for one, copies of one.

    Raises:
        CellProblem: Several channels that are to become several others.
    """
    found = samples.shape[0]
    if found == channels:
        return samples
    if channels == 1:
        return samples.mean(dim=0, keepdim=True)
    if found == 1:
        return samples.expand(channels, -1)
    raise CellProblem(f"found sound of {found} channels, wanted {channels}; mix it")


def fit(samples: Tensor, length: int) -> Tensor:
    """`(channels, length)`: the beginning, or followed by silence."""
    return torch.nn.functional.pad(samples[:, :length], (0, max(length - samples.shape[1], 0)))

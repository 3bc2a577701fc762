"""Decodes audio, and converts it to a pipeline's sampling rate, channels and length."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cell import CellProblem, import_extra, read_cell


_MAX_PEAK = 10.0
# Numbers that a file may decode to, 256 MB of float32: 12 minutes of stereo at 44.1 kHz. Hours of silence are a small
# FLAC file.
_MAX_NUMBERS = 2**26


@dataclass(frozen=True)
class Waveform:
    """Audio.

    Args:
        samples: `(channels, samples)` float32, full scale at -1 and 1.
        rate: Samples per second.
    """

    samples: Tensor
    rate: int


def decode_audio(cell: object) -> Waveform:
    """Decodes one cell of an audio column.

    Args:
        cell: A file as `read_cell` takes it, or a dictionary with `sampling_rate` and `array`, floats `(samples,)` or
            `(channels, samples)`.

    Raises:
        CellProblem: Nothing there, no audio, a file that cannot be decoded, NaN in it, or a file without soundfile.
    """
    cell = read_cell(cell)
    if cell is None:
        raise CellProblem("the audio is None", "empty cell")
    if isinstance(cell, bytes):
        waveform = _from_file(cell)
    elif not isinstance(cell, Mapping):
        raise CellProblem(
            f"a cell of type {type(cell).__name__} is not audio; pass a file, or an array with its sampling_rate",
            "wrong type",
        )
    elif cell.get("array") is None:
        raise CellProblem("the audio has neither an array, nor bytes, nor a path", "empty cell")
    else:
        waveform = _from_array(cell["array"], cell.get("sampling_rate"))
    if not waveform.samples.numel():
        raise CellProblem("the audio has no samples", "empty cell")
    if not bool(waveform.samples.isfinite().all()):
        raise CellProblem("the audio has NaN or infinite samples", "damaged")
    return waveform


def _from_array(array: object, rate: object) -> Waveform:
    if not isinstance(rate, (int, np.integer)) or rate < 1:
        message = f"sampling_rate={rate!r} beside the array; it must be samples per second, an integer"
        raise CellProblem(message, "wrong format")
    samples = np.asarray(array)
    if samples.ndim not in (1, 2) or not np.issubdtype(samples.dtype, np.floating):
        raise CellProblem(
            f"an array of {samples.dtype} with shape {samples.shape}; pass floats in [-1, 1], (samples,) or "
            "(channels, samples)",
            "wrong format",
        )
    samples = np.atleast_2d(samples)
    peak = float(np.abs(samples).max(initial=0.0))
    # Loud audio may exceed 1 a little; samples far above it have another full scale.
    if peak > _MAX_PEAK:
        message = f"an array with samples up to {peak:g}; divide by its full scale, to be in [-1, 1]"
        raise CellProblem(message, "wrong format")
    if samples.shape[0] > samples.shape[1] > 0:
        message = f"an array with shape {samples.shape}; channels come first: (channels, samples)"
        raise CellProblem(message, "wrong format")
    return Waveform(torch.from_numpy(samples.astype(np.float32)), int(rate))


def _from_file(data: bytes) -> Waveform:
    soundfile = import_extra("soundfile", "audio", "decoding an audio file")
    # soundfile reads what there is of a WAV file without an error. Programs that write a stream do not know its size
    # and leave the largest number, or one close to it, in the header; some forget to pad an odd size.
    stated = int.from_bytes(data[4:8], "little") + 8 if data.startswith(b"RIFF") else 0
    if len(data) + 1 < stated < 2**30:
        raise CellProblem(f"the WAV file is cut off: it has {len(data)} of {stated} bytes", "damaged")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            limit, rate = _MAX_NUMBERS // file.channels, file.samplerate
            samples = file.read(limit, dtype="float32", always_2d=True)
    except Exception as error:
        raise CellProblem(f"the audio cannot be decoded ({error}); store it as WAV or FLAC", "damaged") from error
    if len(samples) == limit:
        raise CellProblem(f"the audio is longer than {limit / rate / 60:g} minutes; cut it", "too large")
    return Waveform(torch.from_numpy(samples.T.copy()), rate)


def resample(samples: Tensor, rate: int, wanted: int) -> Tensor:
    """Converts `(channels, samples)` float32 from `rate` to `wanted` samples per second.

    Frequencies that the lower rate cannot hold are removed.

    Raises:
        CellProblem: The rates differ and soxr is not installed.
    """
    if rate == wanted:
        return samples
    soxr = import_extra("soxr", "audio", f"resampling audio from {rate} Hz to {wanted} Hz")
    return torch.from_numpy(soxr.resample(samples.T.numpy(), rate, wanted).T.copy())


def mix(samples: Tensor, channels: int) -> Tensor:
    """`(n, samples)` as `(channels, samples)`: the mean of all channels for one, or copies of one channel.

    Raises:
        CellProblem: Several channels would have to become several others.
    """
    found = samples.shape[0]
    if found == channels:
        return samples
    if channels == 1:
        return samples.mean(dim=0, keepdim=True)
    if found == 1:
        return samples.expand(channels, -1)
    raise CellProblem(f"found audio of {found} channels, wanted {channels}; mix it", "wrong format")


def fit(samples: Tensor, length: int) -> Tensor:
    """`(channels, length)`: the beginning of longer audio, or shorter audio followed by silence."""
    return torch.nn.functional.pad(samples[:, :length], (0, max(length - samples.shape[1], 0)))

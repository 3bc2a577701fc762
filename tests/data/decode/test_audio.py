"""Audio as samples: decoding, and conversion to the pipeline's rate, channels and length."""

import io
import math
import sys

import numpy as np
import pytest
import soundfile
import torch
from helpers import tiny
from helpers.media import noise, wav
from helpers.pipelines import png
from PIL import Image as PILImage

from trl_diffusion_pref.data import preparation_for
from trl_diffusion_pref.data.decode.audio import decode_audio, fit, mix, resample
from trl_diffusion_pref.data.decode.cell import CellProblem
from trl_diffusion_pref.families import family_for


@pytest.fixture(scope="module")
def stable_audio():
    """Two channels, 128 samples at 16 Hz."""
    return tiny.build("stable_audio")


def sine(hertz: float, rate: int, seconds: float) -> torch.Tensor:
    # In float32 the phase alone would be wrong by 1e-3.
    phase = 2 * math.pi * hertz * torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    return torch.sin(phase).float()[None]


@pytest.mark.parametrize(
    ("width", "integers", "expected"),
    [
        (1, [0, 128, 192], [-1.0, 0.0, 0.5]),
        (2, [-(2**15), 0, 2**14], [-1.0, 0.0, 0.5]),
        (3, [-(2**23), 1, 2**22], [-1.0, 2.0**-23, 0.5]),
        (4, [-(2**31), 0, 2**30], [-1.0, 0.0, 0.5]),
    ],
)
def test_wav_files_are_read_back(width, integers, expected):
    stereo = np.array([integers, integers[::-1]]).T
    waveform = decode_audio({"bytes": wav(stereo, 44100, width), "path": None})
    assert waveform.rate == 44100
    assert waveform.samples.tolist() == [expected, expected[::-1]]


def test_flac_and_float_files_are_read_back():
    values = (noise(0, samples=1000) / 2**15).astype(np.float32)
    for format, subtype in (("FLAC", "PCM_24"), ("WAV", "FLOAT")):
        buffer = io.BytesIO()
        soundfile.write(buffer, values, 44100, format=format, subtype=subtype)
        waveform = decode_audio({"bytes": buffer.getvalue(), "path": None})
        assert waveform.rate == 44100
        torch.testing.assert_close(waveform.samples, torch.from_numpy(values.T.copy()), rtol=0, atol=0)


@pytest.mark.parametrize("kept", [30, 2000])
def test_a_damaged_audio_file_is_called_damaged(kept):
    buffer = io.BytesIO()
    soundfile.write(buffer, (noise(0, samples=10000) / 2**15), 44100, format="FLAC")
    with pytest.raises(CellProblem, match="the audio cannot be decoded"):
        decode_audio({"bytes": buffer.getvalue()[:kept], "path": None})


@pytest.mark.parametrize(("rate", "wanted"), [(44100, 16000), (8000, 16000), (22050, 44100), (16001, 16000)])
def test_resampling_keeps_a_sine_s_frequency_amplitude_and_phase(rate, wanted):
    resampled = resample(sine(440.0, rate, 0.5), rate, wanted)
    expected = sine(440.0, wanted, 0.5)
    assert abs(resampled.shape[1] - expected.shape[1]) <= 1
    # Except near the ends, where the sine starts and stops at once.
    inner = slice(wanted // 20, wanted // 2 - wanted // 20)
    torch.testing.assert_close(resampled[:, inner], expected[:, inner], rtol=0, atol=1e-5)


def test_resampling_removes_what_the_lower_rate_cannot_hold():
    resampled = resample(sine(6000.0, 16000, 0.5) + sine(500.0, 16000, 0.5), 16000, 8000)
    torch.testing.assert_close(resampled[:, 400:3600], sine(500.0, 8000, 0.5)[:, 400:3600], rtol=0, atol=1e-5)


def test_channels_are_mixed_and_length_is_cut_or_padded():
    stereo = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.5, 0.5]])
    assert mix(stereo, 1).tolist() == [[0.5, 0.25, 0.5]]
    assert mix(stereo[:1], 2).tolist() == [[1.0, 0.0, 0.5]] * 2
    with pytest.raises(CellProblem, match="found audio of 3 channels, wanted 2"):
        mix(torch.zeros(3, 4), 2)
    assert fit(stereo, 2).tolist() == [[1.0, 0.0], [0.0, 0.5]]
    assert fit(stereo, 4).tolist() == [[1.0, 0.0, 0.5, 0.0], [0.0, 0.5, 0.5, 0.0]]


@pytest.mark.parametrize("rate", [16, 24])
def test_cutting_before_resampling_changes_nothing(rate, stable_audio):
    preparation = preparation_for(stable_audio, family_for(stable_audio))
    waveform = preparation.decode({"array": sine(3.0, rate, 40.0)[0].numpy(), "sampling_rate": rate})
    whole = fit(resample(mix(waveform.samples, 2), rate, 16), 128)
    tensor = preparation.tensor(waveform, (0.5, 0.5), False)
    assert tensor.shape == (2, 128)
    torch.testing.assert_close(tensor[:, 8:], whole[:, 8:], rtol=0, atol=2e-2)


def test_audioldm_2_gets_audio_around_zero_with_a_peak_of_one_half():
    pipeline = tiny.build("audioldm2")
    preparation = preparation_for(pipeline, family_for(pipeline))
    samples = 0.1 + 0.02 * sine(440.0, 16000, 0.1)
    tensor = preparation.tensor(
        preparation.decode({"array": samples[0].numpy(), "sampling_rate": 16000}), (0, 0), False
    )
    audible, silence = tensor[:, :1600], tensor[:, 1600:]
    assert silence.numel() and not silence.any()
    torch.testing.assert_close(audible, 0.5 * sine(440.0, 16000, 0.1), rtol=0, atol=1e-3)
    quiet = preparation.decode({"array": np.zeros(1600), "sampling_rate": 16000})
    assert not preparation.tensor(quiet, (0, 0), False).any()


IMAGE = PILImage.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "the audio is None"),
        ({"bytes": None, "path": None}, "neither an array, nor bytes, nor a path"),
        ({"bytes": None, "path": "/nowhere.wav"}, "no file at /nowhere.wav"),
        (IMAGE, "found an image, but StableAudioPipeline generates audio"),
        (png(IMAGE), "found an image, but StableAudioPipeline generates audio"),
        ([IMAGE] * 3, "found a video, but StableAudioPipeline generates audio"),
        ({"array": [0.1, 0.2], "sampling_rate": None}, "sampling_rate=None beside the array"),
        ({"array": [1, 2], "sampling_rate": 16}, "an array of int64 .*pass floats"),
        ({"array": np.zeros((9, 2)), "sampling_rate": 16}, "channels come first"),
        ({"array": [0.1, float("nan")], "sampling_rate": 16}, "NaN"),
        ({"array": [0.1, -32767.0], "sampling_rate": 16}, "samples up to 32767; divide by its full scale"),
        ([[0.1, 0.2], [0.3, 0.4]], "a cell of type list is not audio;"),
        ([0.1, 0.2], "a cell of type list is not audio; pass a file, or an array with its sampling_rate"),
        ({"array": np.zeros(0), "sampling_rate": 16}, "no samples"),
        ({"bytes": wav(np.zeros((0, 1))), "path": None}, "no samples"),
        ({"array": np.zeros((3, 9)), "sampling_rate": 16}, "found audio of 3 channels, wanted 2"),
    ],
)
def test_a_cell_that_is_no_audio_says_what_it_is(cell, message, stable_audio):
    with pytest.raises(CellProblem, match=message):
        preparation_for(stable_audio, family_for(stable_audio)).decode(cell)


@pytest.mark.parametrize(
    ("package", "cell"),
    [("soundfile", wav(noise(0))), ("soxr", {"array": np.zeros(64), "sampling_rate": 32})],
    ids=["soundfile", "soxr"],
)
def test_without_the_audio_extra_the_message_says_what_to_install(package, cell, stable_audio, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CellProblem, match=rf"needs {package}: pip install 'trl-diffusion-pref\[audio\]'"):
        preparation_for(stable_audio, family_for(stable_audio)).decode(cell)


def test_audio_of_the_pipeline_s_rate_needs_no_package(stable_audio, monkeypatch):
    for package in ("soundfile", "soxr"):
        monkeypatch.setitem(sys.modules, package, None)
    preparation = preparation_for(stable_audio, family_for(stable_audio))
    samples = np.random.default_rng(0).uniform(-1, 1, (2, 128)).astype(np.float32)
    tensor = preparation.tensor(preparation.decode({"array": samples, "sampling_rate": 16}), (0.5, 0.5), False)
    assert torch.equal(tensor, torch.from_numpy(samples))


@pytest.mark.parametrize("option", [{"resolution": 16}, {"cropped_or_mirrored": True}], ids=str)
def test_options_of_images_are_an_error_for_audio(option, stable_audio):
    with pytest.raises(ValueError, match="are for images and videos, and StableAudioPipeline generates audio"):
        preparation_for(stable_audio, family_for(stable_audio), **option)


def test_a_wav_file_that_is_cut_off_is_an_error():
    whole = wav(noise(0, samples=1000))
    with pytest.raises(CellProblem, match="cut off: it has 2000 of 4044 bytes"):
        decode_audio(whole[:2000])


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_wav_file_of_a_stream_has_no_size_and_is_read(size):
    data = bytearray(wav(noise(0, samples=1000)))
    data[4:8] = data[40:44] = size.to_bytes(4, "little")
    torch.testing.assert_close(
        decode_audio(bytes(data)).samples, torch.from_numpy(noise(0, samples=1000).T / 2**15).float()
    )

"""Sound as samples: decoding, bringing it to the pipeline's rate, channels and length, encoding."""

import io
import json
import logging
import math
import sys
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import png
from datasets import Audio, Dataset
from PIL import Image as PILImage


sys.path.insert(0, str(Path(__file__).parents[1] / "families"))

import tiny  # noqa: E402

from trl_diffusion_pref.data import (  # noqa: E402
    EncodingOptions,
    encode_rows,
    encoding,
    latent_shape,
    preparation_for,
)
from trl_diffusion_pref.data.cells import CellProblem  # noqa: E402
from trl_diffusion_pref.data.waveforms import decode_waveform, fit, mix, resample  # noqa: E402
from trl_diffusion_pref.families import family_for  # noqa: E402


@pytest.fixture(scope="module")
def stable_audio():
    """Two channels, 128 samples at 16 Hz."""
    return tiny.build("stable_audio")


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


def sine(hertz: float, rate: int, seconds: float) -> torch.Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(round(rate * seconds)) / rate)[None]


def encode(dataset, pipeline, cache, say=print, **options) -> Dataset:
    return encode_rows(
        dataset,
        pipeline,
        family_for(pipeline),
        EncodingOptions(**options),
        what="train_dataset",
        cache_folder=cache,
        batch_size=2,
        say=say,
    )


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
    waveform = decode_waveform({"bytes": wav(stereo, 44100, width), "path": None}, "P")
    assert waveform.rate == 44100
    assert waveform.samples.tolist() == [expected, expected[::-1]]


def test_files_that_are_no_pcm_are_soundfile_s():
    values = (noise(0, samples=1000) / 2**15).astype(np.float32)
    for format, subtype in (("FLAC", "PCM_24"), ("WAV", "FLOAT")):
        buffer = io.BytesIO()
        soundfile.write(buffer, values, 44100, format=format, subtype=subtype)
        waveform = decode_waveform({"bytes": buffer.getvalue(), "path": None}, "P")
        assert waveform.rate == 44100
        torch.testing.assert_close(waveform.samples, torch.from_numpy(values.T.copy()), rtol=0, atol=0)


@pytest.mark.parametrize("kept", [30, 2000])
def test_a_damaged_sound_file_is_called_damaged(kept):
    buffer = io.BytesIO()
    soundfile.write(buffer, (noise(0, samples=10000) / 2**15), 44100, format="FLAC")
    with pytest.raises(CellProblem, match="the sound cannot be decoded"):
        decode_waveform({"bytes": buffer.getvalue()[:kept], "path": None}, "P")


@pytest.mark.parametrize(("rate", "wanted"), [(44100, 16000), (8000, 16000), (22050, 44100), (16001, 16000)])
def test_resampling_keeps_a_sine_s_frequency_size_and_phase(rate, wanted):
    resampled = resample(sine(440.0, rate, 0.5), rate, wanted)
    expected = sine(440.0, wanted, 0.5)
    assert abs(resampled.shape[1] - expected.shape[1]) <= 1
    # Away from the ends, where the sound begins at once.
    inner = slice(wanted // 20, wanted // 2 - wanted // 20)
    torch.testing.assert_close(resampled[:, inner], expected[:, inner], rtol=0, atol=5e-3)


def test_resampling_drops_what_the_lower_rate_cannot_hold():
    resampled = resample(sine(6000.0, 16000, 0.5) + sine(500.0, 16000, 0.5), 16000, 8000)
    torch.testing.assert_close(resampled[:, 400:3600], sine(500.0, 8000, 0.5)[:, 400:3600], rtol=0, atol=5e-3)


def test_channels_are_mixed_and_length_is_cut_or_filled():
    stereo = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.5, 0.5]])
    assert mix(stereo, 1).tolist() == [[0.5, 0.25, 0.5]]
    assert mix(stereo[:1], 2).tolist() == [[1.0, 0.0, 0.5]] * 2
    with pytest.raises(CellProblem, match="found sound of 3 channels, wanted 2"):
        mix(torch.zeros(3, 4), 2)
    assert fit(stereo, 2).tolist() == [[1.0, 0.0], [0.0, 0.5]]
    assert fit(stereo, 4).tolist() == [[1.0, 0.0, 0.5, 0.0], [0.0, 0.5, 0.5, 0.0]]


@pytest.mark.parametrize("rate", [16, 24])
def test_cutting_before_resampling_changes_nothing(rate, stable_audio):
    preparation = preparation_for(stable_audio, family_for(stable_audio))
    waveform = preparation.decode({"array": sine(3.0, rate, 40.0)[0].numpy(), "sampling_rate": rate})
    whole = fit(resample(waveform.samples, rate, 16), 128)
    tensor = preparation.tensor(waveform, (0.5, 0.5), False)
    assert tensor.shape == (2, 128)
    torch.testing.assert_close(tensor[:, 8:], whole[:, 8:], rtol=0, atol=2e-2)


def test_encoded_sound_is_the_family_s_of_its_samples(stable_audio, tmp_path):
    paths = [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]
    for seed, path in enumerate(paths):
        Path(path).write_bytes(wav(noise(seed)))
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": [paths[0]], "rejected": [paths[1]]})
    family = family_for(stable_audio)
    for columns in (dataset, dataset.cast_column("chosen", Audio()).cast_column("rejected", Audio(decode=False))):
        row = encode(columns, stable_audio, tmp_path)[0]
        for seed, column in enumerate(("chosen", "rejected")):
            samples = torch.from_numpy(noise(seed).T / 2**15).float()
            mean, std = family.encode_images(stable_audio, samples[None])
            assert row[f"{column}_mean"].shape == latent_shape(stable_audio, family)
            torch.testing.assert_close(row[f"{column}_mean"], mean[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(row[f"{column}_std"], std[0], rtol=1e-4, atol=1e-5)
    before = encode(dataset, stable_audio, tmp_path)[0]["chosen_mean"]
    Path(paths[0]).write_bytes(wav(noise(5)))
    assert not torch.equal(encode(dataset, stable_audio, tmp_path)[0]["chosen_mean"], before)


def test_what_is_changed_about_sound_is_said_once_also_where_the_cache_has_it(stable_audio, tmp_path, caplog):
    cells = [{"array": np.linspace(-1, end, 64), "sampling_rate": 32} for end in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]
    dataset = Dataset.from_dict({"prompt": ["a"] * 3, "chosen": cells[:3], "rejected": cells[3:]})
    with caplog.at_level(logging.WARNING):
        encode(dataset, stable_audio, tmp_path)
    said = [record.getMessage() for record in caplog.records if "sound of" in record.getMessage()]
    place = " (first in row 0, column 'chosen')"
    assert said == [
        f"train_dataset: sound of 32 Hz is resampled to 16 Hz{place}",
        f"train_dataset: sound of 1 channels is mixed to 2{place}",
        f"train_dataset: sound of 2 s is followed by silence up to 8 s{place}",
    ]
    again = []
    encode(dataset, stable_audio, tmp_path, say=again.append)
    assert again == said


def test_runs_that_encode_the_same_at_once_do_not_take_each_other_s_notes_away(tmp_path):
    """Nodes that share a cache do."""
    encoders = [encoding._RowEncoder.__new__(encoding._RowEncoder) for _ in range(2)]
    for encoder in encoders:
        encoder.what, encoder._notes_file = "train_dataset", tmp_path / "rows.json"

    def write(encoder):
        for number in range(100):
            encoder._said = {}
            encoder._say_once([("rate", f"sound {number}")])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, encoders))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    assert json.loads((tmp_path / "rows.json").read_text()) == {"rate": "sound 99"}


def test_the_duration_of_shorter_sound_is_what_the_sampler_is_told(stable_audio, tmp_path):
    cells = [{"array": np.random.default_rng(seed).uniform(-1, 1, (2, 40)), "sampling_rate": 16} for seed in (0, 1)]
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": cells[:1], "rejected": cells[1:]})
    row = encode(dataset, stable_audio, tmp_path)[0]
    told = []
    hook = stable_audio.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["global_hidden_states"]), with_kwargs=True
    )
    stable_audio.scheduler = tiny.CosineDPMSolverMultistepScheduler()
    stable_audio("a", audio_end_in_s=2.5, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    hook.remove()
    for column in ("chosen", "rejected"):
        assert torch.equal(row[f"{column}_conditioning/duration_embeds"].reshape(1, 1, -1), told[0])
    # Longer sound is cut, and fills all of what the sampler draws.
    cells = [{"array": np.random.default_rng(seed).uniform(-1, 1, (2, 400)), "sampling_rate": 16} for seed in (0, 1)]
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": cells[:1], "rejected": cells[1:]})
    row = encode(dataset, stable_audio, tmp_path)[0]
    expected = family_for(stable_audio).sound_conditioning(stable_audio, 8.0)["duration_embeds"]
    assert torch.equal(row["chosen_conditioning/duration_embeds"], expected)
    assert not torch.equal(expected.reshape(1, 1, -1), told[0])


def test_pairs_that_differ_only_beyond_the_end_are_no_preference(stable_audio, tmp_path):
    beginning = np.random.default_rng(0).uniform(-1, 1, (2, 128))
    cells = [
        {"array": np.concatenate([beginning, np.full((2, 9), end)], axis=1), "sampling_rate": 16} for end in (0.1, 0.2)
    ]
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": cells[:1], "rejected": cells[1:]})
    with pytest.raises(
        ValueError, match="row 0, columns 'chosen' and 'rejected': what is used of them is the same sound"
    ):
        encode(dataset, stable_audio, tmp_path)


def test_sounds_of_one_beginning_and_several_lengths_are_told_apart(stable_audio, tmp_path):
    """Where silence fills them up they are one sound; what the model is told of them is not."""
    bell = np.concatenate([np.random.default_rng(0).uniform(-1, 1, (2, 40)), np.zeros((2, 20))], axis=1)
    cells = [{"array": bell[:, :count], "sampling_rate": 16} for count in (60, 40)]
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": cells[:1], "rejected": cells[1:]})
    row = encode(dataset, stable_audio, tmp_path)[0]
    assert torch.equal(row["chosen_mean"], row["rejected_mean"])
    durations = [row[f"{column}_conditioning/duration_embeds"] for column in ("chosen", "rejected")]
    assert not torch.equal(*durations)


def test_loudness_alone_is_no_preference_for_audioldm_2_which_is_said(tmp_path):
    pipeline, sound = tiny.build("audioldm2"), np.random.default_rng(0).uniform(-0.1, 0.1, 2560)
    cells = [{"array": factor * sound, "sampling_rate": 16000} for factor in (1.0, 3.0)]
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": cells[:1], "rejected": cells[1:]})
    with pytest.raises(ValueError, match="row 0, .*what is used of them is the same sound"):
        encode(dataset, pipeline, tmp_path)
    preparation = preparation_for(pipeline, family_for(pipeline))
    notes = preparation.notes(preparation.decode(cells[0]))
    assert notes == {"loudness": "sound is brought to the loudness that AudioLDM2Pipeline's model was trained on"}


def test_audioldm_2_hears_every_sound_around_zero_with_a_peak_of_one_half():
    pipeline = tiny.build("audioldm2")
    preparation = preparation_for(pipeline, family_for(pipeline))
    sound = 0.1 + 0.02 * sine(440.0, 16000, 0.1)
    tensor = preparation.tensor(preparation.decode({"array": sound[0].numpy(), "sampling_rate": 16000}), (0, 0), False)
    heard, silence = tensor[:, :1600], tensor[:, 1600:]
    assert silence.numel() and not silence.any()
    torch.testing.assert_close(heard, 0.5 * sine(440.0, 16000, 0.1), rtol=0, atol=1e-3)
    quiet = preparation.decode({"array": np.zeros(1600), "sampling_rate": 16000})
    assert not preparation.tensor(quiet, (0, 0), False).any()


def test_another_sampling_rate_of_the_pipeline_is_another_entry_of_the_cache(tmp_path):
    cells = [{"array": np.random.default_rng(seed).uniform(-1, 1, 2560), "sampling_rate": 16000} for seed in (0, 1)]
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": cells[:1], "rejected": cells[1:]})
    pipeline = tiny.build("audioldm2")
    before = encode(dataset, pipeline, tmp_path)[0]["chosen_mean"]
    # The vocoder is no encoder, so no weights that are looked at change.
    pipeline.vocoder.config.sampling_rate = 8000
    assert not torch.equal(encode(dataset, pipeline, tmp_path)[0]["chosen_mean"], before)


IMAGE = PILImage.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "the sound is None"),
        ({"bytes": None, "path": None}, "neither an array, nor bytes, nor a path"),
        ({"bytes": None, "path": "/nowhere.wav"}, "no file at /nowhere.wav"),
        (IMAGE, "found an image, but StableAudioPipeline generates sound"),
        (png(IMAGE), "found an image, but StableAudioPipeline generates sound"),
        ([IMAGE] * 3, "found a clip, but StableAudioPipeline generates sound"),
        ({"array": [0.1, 0.2], "sampling_rate": None}, "sampling_rate=None beside the array"),
        ({"array": [1, 2], "sampling_rate": 16}, "an array of int64 .*pass floats"),
        ({"array": np.zeros((9, 2)), "sampling_rate": 16}, "channels come first"),
        ({"array": [0.1, float("nan")], "sampling_rate": 16}, "NaN"),
        ({"array": [0.1, -32767.0], "sampling_rate": 16}, "samples up to 32767; divide by its full scale"),
        ([[0.1, 0.2], [0.3, 0.4]], "a list is no sound;"),
        ([0.1, 0.2], "a list is no sound; pass a file, or an array with its sampling_rate"),
        ({"array": np.zeros(0), "sampling_rate": 16}, "no samples"),
        ({"bytes": wav(np.zeros((0, 1))), "path": None}, "no samples"),
        ({"array": np.zeros((3, 9)), "sampling_rate": 16}, "found sound of 3 channels, wanted 2"),
    ],
)
def test_cells_that_are_no_sound_say_what_they_are(cell, message, stable_audio):
    with pytest.raises(CellProblem, match=message):
        preparation_for(stable_audio, family_for(stable_audio)).decode(cell)


def test_a_file_that_needs_soundfile_says_so(stable_audio, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(CellProblem, match="without soundfile only PCM WAV files can.*pip install soundfile"):
        preparation_for(stable_audio, family_for(stable_audio)).decode({"bytes": b"fLaC" + bytes(40), "path": None})


def test_sound_for_a_pipeline_of_images_is_refused_by_row(tiny_pipeline, tmp_path):
    message = "row 0, column 'chosen': found sound, but StableDiffusionPipeline generates images"
    arrays = [{"array": [0.1, 0.2], "sampling_rate": 16}], [{"array": [0.1, 0.3], "sampling_rate": 16}]
    files = [{"bytes": wav(noise(0)), "path": None}], [{"bytes": wav(noise(1)), "path": None}]
    for chosen, rejected in (arrays, files):
        dataset = Dataset.from_dict({"prompt": ["a"], "chosen": chosen, "rejected": rejected})
        with pytest.raises(ValueError, match=message):
            encode(dataset, tiny_pipeline, tmp_path, resolution=16)
    with pytest.raises(ValueError, match=message):
        audio = dataset.cast_column("chosen", Audio()).cast_column("rejected", Audio())
        encode(audio, tiny_pipeline, tmp_path, resolution=16)


@pytest.mark.parametrize("option", [{"resolution": 16}, {"crop": "random"}, {"random_flip": True}], ids=str)
def test_options_of_pictures_are_refused_for_sound(option, stable_audio):
    with pytest.raises(ValueError, match="are for what is seen, and StableAudioPipeline generates sound"):
        EncodingOptions(**option).preparation(stable_audio, family_for(stable_audio))


def test_a_wav_file_that_is_cut_off_is_refused_with_what_is_missing():
    whole = wav(noise(0, samples=1000))
    with pytest.raises(CellProblem, match="cut off: it holds 489 of 1000 samples"):
        decode_waveform({"path": None, "bytes": whole[:2000]}, "StableAudioPipeline")

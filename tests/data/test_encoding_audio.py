"""Audio in a data set: encoded, cached, and errors by row."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset
from helpers import tiny
from helpers.encoding import Rows, encode_rows, latent_shape
from helpers.media import noise, wav

from trl_diffusion_pref.data import EncodingOptions, preparation_for
from trl_diffusion_pref.families import family_for


@pytest.fixture(scope="module")
def stable_audio():
    """Two channels, 128 samples at 16 Hz."""
    return tiny.build("stable_audio")


def encode(dataset, pipeline, cache, **options) -> Rows:
    return encode_rows(
        dataset,
        pipeline,
        family_for(pipeline),
        EncodingOptions(**options),
        what="train_dataset",
        cache_folder=cache,
        batch_size=2,
    )


def test_audio_is_encoded_as_the_family_encodes_its_samples(stable_audio, tmp_path):
    paths = [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]
    for seed, path in enumerate(paths):
        Path(path).write_bytes(wav(noise(seed)))
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": [paths[0]], "rejected": [paths[1]]})
    family = family_for(stable_audio)
    for columns in (dataset, dataset.cast_column("chosen", Audio()).cast_column("rejected", Audio(decode=False))):
        row = encode(columns, stable_audio, tmp_path)[0]
        for seed, column in enumerate(("chosen", "rejected")):
            samples = torch.from_numpy(noise(seed).T / 2**15).float()
            mean, std = family.encode_samples(stable_audio, samples[None])
            assert row[f"{column}_mean"].shape == latent_shape(stable_audio, family)
            torch.testing.assert_close(row[f"{column}_mean"], mean[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(row[f"{column}_std"], std[0], rtol=1e-4, atol=1e-5)
    before = encode(dataset, stable_audio, tmp_path)[0]["chosen_mean"]
    Path(paths[0]).write_bytes(wav(noise(5)))
    assert not torch.equal(encode(dataset, stable_audio, tmp_path)[0]["chosen_mean"], before)


def test_changes_to_audio_are_reported_once_also_from_the_cache(stable_audio, tmp_path, caplog):
    cells = [{"array": np.linspace(-1, end, 64), "sampling_rate": 32} for end in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]
    dataset = Dataset.from_dict({"prompt": ["a"] * 3, "chosen": cells[:3], "rejected": cells[3:]})
    with caplog.at_level(logging.WARNING):
        encode(dataset, stable_audio, tmp_path)
    reported = [record.getMessage() for record in caplog.records if "audio of" in record.getMessage()]
    assert reported == [
        "train_dataset: audio of 1 channels is mixed to 2",
        "train_dataset: audio of 2 s is padded with silence to 8 s",
        "train_dataset: audio of 32 Hz is resampled to 16 Hz",
    ]
    caplog.clear()
    encode(dataset, stable_audio, tmp_path)
    assert [record.getMessage() for record in caplog.records if "audio of" in record.getMessage()] == reported


def test_the_duration_of_shorter_audio_is_what_the_sampler_gets(stable_audio, tmp_path):
    cells = [{"array": np.random.default_rng(seed).uniform(-1, 1, (2, 40)), "sampling_rate": 16} for seed in (0, 1)]
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": cells[:1], "rejected": cells[1:]})
    row = encode(dataset, stable_audio, tmp_path)[0]
    durations = []
    hook = stable_audio.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: durations.append(kwargs["global_hidden_states"]), with_kwargs=True
    )
    stable_audio.scheduler = tiny.CosineDPMSolverMultistepScheduler()
    stable_audio("a", audio_end_in_s=2.5, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    hook.remove()
    for column in ("chosen", "rejected"):
        assert torch.equal(row[f"{column}/duration_embeds"].reshape(1, 1, -1), durations[0])
    # Longer audio is cut, and fills all that the sampler generates.
    cells = [{"array": np.random.default_rng(seed).uniform(-1, 1, (2, 400)), "sampling_rate": 16} for seed in (0, 1)]
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": cells[:1], "rejected": cells[1:]})
    row = encode(dataset, stable_audio, tmp_path)[0]
    expected = family_for(stable_audio).audio_conditioning(stable_audio, 8.0)["duration_embeds"]
    assert torch.equal(row["chosen/duration_embeds"], expected)
    assert not torch.equal(expected.reshape(1, 1, -1), durations[0])


def test_audio_that_differs_only_beyond_the_end_is_no_preference(stable_audio, tmp_path):
    beginning = np.random.default_rng(0).uniform(-1, 1, (2, 128))
    cells = [
        {"array": np.concatenate([beginning, np.full((2, 9), end)], axis=1), "sampling_rate": 16} for end in (0.1, 0.2)
    ]
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": cells[:1], "rejected": cells[1:]})
    with pytest.raises(
        ValueError, match="row 0, columns 'chosen' and 'rejected': what is used of them is the same audio"
    ):
        encode(dataset, stable_audio, tmp_path)


def test_audio_that_differs_only_in_its_duration_is_a_preference(stable_audio, tmp_path):
    """Padded with silence both are equal, but the model is conditioned on different durations."""
    bell = np.concatenate([np.random.default_rng(0).uniform(-1, 1, (2, 40)), np.zeros((2, 20))], axis=1)
    cells = [{"array": bell[:, :count], "sampling_rate": 16} for count in (60, 40)]
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": cells[:1], "rejected": cells[1:]})
    row = encode(dataset, stable_audio, tmp_path)[0]
    assert torch.equal(row["chosen_mean"], row["rejected_mean"])
    durations = [row[f"{column}/duration_embeds"] for column in ("chosen", "rejected")]
    assert not torch.equal(*durations)


def test_loudness_alone_is_no_preference_for_audioldm_2(tmp_path):
    pipeline, samples = tiny.build("audioldm2"), np.random.default_rng(0).uniform(-0.1, 0.1, 2560)
    cells = [{"array": factor * samples, "sampling_rate": 16000} for factor in (1.0, 3.0)]
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": cells[:1], "rejected": cells[1:]})
    with pytest.raises(ValueError, match="row 0, .*what is used of them is the same audio"):
        encode(dataset, pipeline, tmp_path)
    preparation = preparation_for(pipeline, family_for(pipeline))
    notes = preparation.notes(preparation.decode(cells[0]))
    assert notes == {"loudness": "audio is scaled to the loudness that AudioLDM2Pipeline's model was trained on"}


def test_another_sampling_rate_of_the_pipeline_is_encoded_again(tmp_path):
    cells = [{"array": np.random.default_rng(seed).uniform(-1, 1, 2560), "sampling_rate": 16000} for seed in (0, 1)]
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": cells[:1], "rejected": cells[1:]})
    pipeline = tiny.build("audioldm2")
    before = encode(dataset, pipeline, tmp_path)[0]["chosen_mean"]
    # The vocoder is no encoder, so no weights that are looked at change.
    pipeline.vocoder.config.sampling_rate = 8000
    assert not torch.equal(encode(dataset, pipeline, tmp_path)[0]["chosen_mean"], before)


def test_audio_for_a_pipeline_of_images_is_reported_by_row(tiny_pipeline, tmp_path):
    message = "row 0, column 'chosen': found audio, but StableDiffusionPipeline generates images"
    arrays = [{"array": [0.1, 0.2], "sampling_rate": 16}], [{"array": [0.1, 0.3], "sampling_rate": 16}]
    files = [{"bytes": wav(noise(0)), "path": None}], [{"bytes": wav(noise(1)), "path": None}]
    for chosen, rejected in (arrays, files):
        dataset = Dataset.from_dict({"prompt": ["a"], "chosen": chosen, "rejected": rejected})
        with pytest.raises(ValueError, match=message):
            encode(dataset, tiny_pipeline, tmp_path, resolution=16)
    with pytest.raises(ValueError, match=message):
        audio = dataset.cast_column("chosen", Audio()).cast_column("rejected", Audio())
        encode(audio, tiny_pipeline, tmp_path, resolution=16)

import math

import numpy as np
import pytest
import torch
from helpers import tiny

from trl_diffusion_pref.diffusion.noise import noise_process
from trl_diffusion_pref.families import family_for


@pytest.mark.parametrize("shape", [(1, 2, 120), (1, 1, 128), (2, 128)], ids=str)
def test_waveforms_of_another_size_are_refused(shape):
    pipeline = tiny.build("stable_audio")
    family = family_for(pipeline)
    assert family.audio_size(pipeline) == (2, 128)
    with pytest.raises(ValueError, match=r"\(batch, 2, 128\), 8 s at 16 Hz, but got .*Resample"):
        family.encode_samples(pipeline, torch.zeros(shape))


def test_sound_has_no_resolution():
    pipeline = tiny.build("stable_audio")
    with pytest.raises(TypeError, match="generates audio"):
        family_for(pipeline).resolution(pipeline)


def test_the_audio_scheduler_with_another_prediction_is_refused():
    scheduler = tiny.CosineDPMSolverMultistepScheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match="prediction_type='epsilon'.*only 'v_prediction'"):
        noise_process(scheduler)


@pytest.mark.parametrize("options", [{"timestep_sampling": "uniform"}, {"timestep_shift": 1.0}], ids=str)
def test_stable_audio_refuses_a_flow_s_options(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}=.*whose training times are uniform"):
        noise_process(tiny.build("stable_audio").scheduler, **options)


def test_a_tone_is_loudest_where_its_frequency_is_on_the_mel_scale():
    pipeline = tiny.build("audioldm2")
    family = family_for(pipeline)
    assert family.audio_size(pipeline) == (1, 2560)
    seconds = torch.arange(2560) / 16000
    tones = torch.stack([torch.sin(2 * torch.pi * hertz * seconds) for hertz in (500.0, 2000.0, 6000.0)])
    spectrograms = family.spectrograms(pipeline, tones[:, None])
    assert spectrograms.shape == (3, 1, 16, 16)
    # Slaney's scale: 3 mels per 200 Hz up to 1000, then 27 per factor of 6.4; 16 triangles between 0 and 8000 Hz.
    mels = [7.5, 15 + 27 * math.log(2) / math.log(6.4), 15 + 27 * math.log(6) / math.log(6.4)]
    highest = 15 + 27 * math.log(8) / math.log(6.4)
    expected = [round(mel / highest * 17) - 1 for mel in mels]
    assert spectrograms[:, 0, 8].argmax(dim=-1).tolist() == expected
    assert family.spectrograms(pipeline, torch.zeros(1, 1, 2560)).unique().tolist() == pytest.approx([math.log(1e-5)])


def test_a_spectrogram_has_the_values_of_one_that_is_written_out():
    """In float64: Hann window, discrete Fourier transform as a sum, Slaney's triangles of unit area, logarithm."""
    pipeline = tiny.build("audioldm2")
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 2560)
    spectrogram = family_for(pipeline).spectrograms(pipeline, torch.from_numpy(samples)[None, None])[0, 0]

    def hertz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    highest = 15 + 27 * math.log(8) / math.log(6.4)
    corners = [hertz(highest * i / 17) for i in range(18)]
    bins = np.arange(513) * 16000 / 1024
    triangles = np.array(
        [
            np.clip(np.minimum((bins - low) / (top - low), (high - bins) / (high - top)), 0, None) * 2 / (high - low)
            for low, top, high in zip(corners, corners[1:], corners[2:], strict=False)
        ]
    )
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    waves = np.exp(-2j * np.pi * np.outer(np.arange(513), np.arange(1024)) / 1024)
    for frame in (0, 8, 15):
        # 432 samples stand before the first hop: (1024 - 160) / 2, mirrored at the ends.
        positions = np.abs(np.arange(1024) + 160 * frame - 432)
        positions = np.where(positions > 2559, 2 * 2559 - positions, positions)
        expected = np.log(np.maximum(triangles @ np.abs(waves @ (window * samples[positions])), 1e-5))
        torch.testing.assert_close(spectrogram[frame].double(), torch.from_numpy(expected), rtol=0, atol=1e-3)


def test_each_frame_of_a_spectrogram_looks_at_the_middle_of_its_hop():
    """As HiFi-GAN's: a click halfway through the ninth hop is in the middle of the ninth frame."""
    pipeline = tiny.build("audioldm2")
    click = torch.zeros(1, 1, 2560)
    click[0, 0, 8 * 160 + 80] = 1.0
    loudness = family_for(pipeline).spectrograms(pipeline, click)[0, 0].exp().sum(dim=-1)
    assert loudness.argmax() == 8
    for distance in (1, 2, 3):
        torch.testing.assert_close(loudness[8 - distance], loudness[8 + distance])


def test_a_prompt_beside_a_longer_one_has_the_embeddings_that_it_has_alone():
    pipeline = tiny.build("audioldm2")
    family = family_for(pipeline)
    together = family.encode_prompts(pipeline, ["a bell", "a bell and a very long train far away"])
    alone = family.encode_prompts(pipeline, ["a bell"])
    for name, value in alone.items():
        assert torch.equal(together[name][:1], value)

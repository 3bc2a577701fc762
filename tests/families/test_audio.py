import pytest
import tiny
import torch

from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.noise import noise_process


@pytest.mark.parametrize("shape", [(1, 2, 120), (1, 1, 128), (2, 128)], ids=str)
def test_waveforms_of_another_size_are_refused(shape):
    pipeline = tiny.build("stable_audio")
    family = family_for(pipeline)
    assert family.audio_size(pipeline) == (2, 128)
    with pytest.raises(ValueError, match=r"\(batch, 2, 128\), 8 s at 16 Hz, but got .*Resample"):
        family.encode_images(pipeline, torch.zeros(shape))


def test_sound_has_no_resolution():
    pipeline = tiny.build("stable_audio")
    with pytest.raises(TypeError, match="generates sound"):
        family_for(pipeline).resolution(pipeline)


def test_the_audio_scheduler_with_another_prediction_is_refused():
    scheduler = tiny.CosineDPMSolverMultistepScheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match="prediction_type='epsilon'.*only 'v_prediction'"):
        noise_process(scheduler)

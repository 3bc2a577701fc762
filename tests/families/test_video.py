"""Clips that a VAE would cut short, and pipelines that cannot be trained."""

import pytest
import torch
from helpers import tiny

from trl_diffusion_pref.data import preparation_for
from trl_diffusion_pref.families import family_for


@pytest.mark.parametrize("name", ["wan", "ltx", "hunyuan_video", "hunyuan_video15", "cogvideox"])
def test_images_are_refused(name):
    pipeline = tiny.build(name)
    with pytest.raises(ValueError, match=r"generates videos, but got pixels of shape \(1, 3, 16, 32\)"):
        family_for(pipeline).encode_samples(pipeline, torch.zeros(1, 3, 16, 32))


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox"])
@pytest.mark.parametrize(("frames", "advice"), [(7, "Cut it to 5 frames, or pass 9"), (3, "to 1 frames, or pass 5")])
def test_clips_with_the_wrong_number_of_frames_are_refused(name, frames, advice):
    pipeline = tiny.build(name)
    with pytest.raises(ValueError, match=f"has {frames} frames.* multiple of 4 plus one.*{advice}"):
        family_for(pipeline).encode_samples(pipeline, torch.zeros(1, 3, frames, 16, 32))


def test_clips_that_do_not_fill_cogvideox_1_5_s_patches_are_refused():
    pipeline = tiny.build("cogvideox_1_5")
    with pytest.raises(ValueError, match="9 frames has 3 latent frames.* of 2. Cut it to 5 frames, or pass 13"):
        family_for(pipeline).encode_samples(pipeline, torch.zeros(1, 3, 9, 16, 32))


def test_two_transformers_with_a_time_per_token_are_refused():
    pipeline = tiny.build("wan")
    pipeline.register_to_config(expand_timesteps=True, boundary_ratio=0.875)
    with pytest.raises(ValueError, match=r"two transformers \(boundary_ratio\) and .* each token .*expand_timesteps"):
        family_for(pipeline).denoiser(pipeline)


def test_cogvideox_1_5_s_config_has_no_size_in_it():
    """The published one has 300 by 300 for its table of positions, of clips of 768 by 1360 pixels."""
    pipeline = tiny.build("cogvideox_1_5")
    family = family_for(pipeline)
    pipeline.transformer.register_to_config(sample_height=300, sample_width=300, sample_frames=81)
    assert family.video_size(pipeline) == (85, 768, 1360)
    assert preparation_for(pipeline, family).shape == (3, 85, 768, 1360)
    assert preparation_for(pipeline, family, 384, 77).shape == (3, 77, 384, 672)


def test_clips_have_the_height_and_width_that_are_asked_for():
    pipeline = tiny.build("wan")
    family = family_for(pipeline)
    assert preparation_for(pipeline, family, (720, 1280)).shape == (3, 81, 720, 1280)
    with pytest.raises(ValueError, match="resolution=1283: WanPipeline takes multiples of 16 pixels. Take 1280 or 12"):
        preparation_for(pipeline, family, (720, 1283))

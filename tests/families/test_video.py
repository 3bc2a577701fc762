"""Clips that a VAE would cut short, and pipelines that cannot be trained."""

import pytest
import tiny
import torch

from trl_diffusion_pref.families import family_for


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_images_are_refused(name):
    pipeline = tiny.build(name)
    with pytest.raises(ValueError, match=r"generates clips, but got pixels of shape \(1, 3, 16, 32\)"):
        family_for(pipeline).encode_images(pipeline, torch.zeros(1, 3, 16, 32))


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
@pytest.mark.parametrize(("frames", "advice"), [(7, "Cut it to 5 frames, or bring 9"), (3, "to 1 frames, or bring 5")])
def test_clips_with_the_wrong_number_of_frames_are_refused(name, frames, advice):
    pipeline = tiny.build(name)
    with pytest.raises(ValueError, match=f"has {frames} frames.* multiple of 4 plus one.*{advice}"):
        family_for(pipeline).encode_images(pipeline, torch.zeros(1, 3, frames, 16, 32))


def test_clips_that_do_not_fill_cogvideox_1_5_s_patches_are_refused():
    pipeline = tiny.build("cogvideox_1_5")
    with pytest.raises(ValueError, match="9 frames has 3 latent frames.*multiples of 2. Bring 13"):
        family_for(pipeline).encode_images(pipeline, torch.zeros(1, 3, 9, 16, 32))


def test_wan_2_2_is_refused():
    pipeline = tiny.build("wan")
    pipeline.register_to_config(expand_timesteps=True)
    with pytest.raises(ValueError, match="expand_timesteps"):
        family_for(pipeline).denoiser(pipeline)
    pipeline = tiny.build("wan")
    pipeline.transformer_2 = tiny.build_wan().transformer
    with pytest.raises(ValueError, match="two transformers"):
        family_for(pipeline).denoiser(pipeline)

"""Lumina Image 2.0: its system prompt, its tables of positions, and the times of a sampler that counts channels."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import tiny
from helpers.recorder import PROMPTS

from trl_diffusion_pref.data import preparation_for
from trl_diffusion_pref.diffusion.noise import noise_process
from trl_diffusion_pref.families import family_for


@pytest.fixture
def pipeline():
    return tiny.build("lumina2")


def test_the_system_prompt_precedes_every_prompt_but_the_unconditional_one(pipeline):
    family = family_for(pipeline)
    mask = family.encode_prompts(pipeline, PROMPTS)["prompt_attention_mask"]
    texts = [f"{pipeline.system_prompt} <Prompt Start> {prompt}" for prompt in PROMPTS]
    assert mask.sum(dim=1).tolist() == [len(pipeline.tokenizer(text).input_ids) for text in texts]
    unconditional = family.encode_unconditional(pipeline)["prompt_attention_mask"]
    assert unconditional.sum() == len(pipeline.tokenizer("").input_ids) < 5


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_times_shift_as_the_sampler_shifts_them(pipeline, kind):
    """Where the scheduler shifts by the size, the pipeline tells it the number of channels."""
    options = {"base_image_seq_len": 2, "max_image_seq_len": 64, "max_shift": 3.0, "time_shift_type": kind}
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)
    grids = set()
    for height in (32, 64):
        pipeline("a cat", height=height, width=32, num_inference_steps=5, output_type="latent")
        process = noise_process(pipeline.scheduler, family_for(pipeline).image_tokens((4, height // 8, 4)))
        torch.testing.assert_close(process.solver_times(5).flip(0), pipeline.scheduler.sigmas)
        grids.add(tuple(pipeline.scheduler.sigmas.tolist()))
    assert len(grids) == 1


def test_images_beyond_the_tables_of_positions_are_refused(pipeline):
    family = family_for(pipeline)
    conditioning = family.encode_prompts(pipeline, ["a"])
    time = torch.tensor([500.0])
    with torch.no_grad():
        # 32 rows of patches of two by two latents, and one row more.
        family.predict(pipeline.transformer, torch.zeros(1, 4, 64, 4), time, conditioning)
        with pytest.raises(RuntimeError, match="out of bounds"):
            family.predict(pipeline.transformer, torch.zeros(1, 4, 66, 4), time, conditioning)
    assert preparation_for(pipeline, family, (512, 32)).shape == (3, 512, 32)
    with pytest.raises(ValueError, match="resolution=528: .* positions for 512 pixels"):
        preparation_for(pipeline, family, (528, 32))

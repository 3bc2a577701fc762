"""Z-Image: prompts of their own lengths, guidance on [positive; negative] that may stop, tables of positions."""

import copy

import pytest
import torch
from helpers import tiny
from helpers.recorder import PROMPTS

from trl_diffusion_pref.data import preparation_for
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.guidance import negative_guidance


@pytest.fixture
def pipeline():
    return tiny.build("z_image")


def test_each_prompt_has_the_rows_that_the_pipeline_gives_it(pipeline):
    prompts = list(PROMPTS)
    conditioning = family_for(pipeline).encode_prompts(pipeline, prompts)
    # The pipeline writes its template into the list that it gets.
    assert prompts == PROMPTS
    expected, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert prompts != PROMPTS
    assert len(expected[0]) != len(expected[1])
    counts = conditioning["prompt_embeds_mask"].sum(dim=1).long().tolist()
    for row, count, own in zip(conditioning["prompt_embeds"], counts, expected, strict=True):
        torch.testing.assert_close(row[:count], own)
        assert not row[count:].any()


def test_the_negative_model_rests_where_the_pipeline_stops_guiding(pipeline):
    """Steps are at the times 0, 0.1, 0.25 and 0.5 of the way from noise to the image."""
    options = {"height": 32, "width": 32, "num_inference_steps": 4, "cfg_truncation": 0.2, "output_type": "latent"}
    other = copy.deepcopy(pipeline.transformer)
    calls: list[int] = []
    with negative_guidance(pipeline, other):
        second = pipeline.transformer._negative_guidance.second
        second.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
        pipeline(list(PROMPTS), **options, guidance_scale=3.0)
        assert calls == [2, 2]
        pipeline(list(PROMPTS), **options, guidance_scale=0.0)
    assert calls == [2, 2]


def test_images_beyond_the_tables_of_positions_are_refused(pipeline):
    family = family_for(pipeline)
    conditioning = family.encode_prompts(pipeline, ["a"])
    time = torch.tensor([500.0])
    with torch.no_grad():
        # 64 rows of patches of two by two latents, and one row more.
        family.predict(pipeline.transformer, torch.zeros(1, 4, 128, 4), time, conditioning)
        with pytest.raises(IndexError, match="out of bounds"):
            family.predict(pipeline.transformer, torch.zeros(1, 4, 130, 4), time, conditioning)
    assert preparation_for(pipeline, family, (1024, 32)).shape == (3, 1024, 32)
    with pytest.raises(ValueError, match="resolution=1040: .* positions for 1024 pixels"):
        preparation_for(pipeline, family, (1040, 32))

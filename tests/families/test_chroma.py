"""Chroma's mask, under gradient checkpointing too, and its two calls for guidance, which carry no name."""

import copy

import pytest
import torch
from diffusers import ChromaImg2ImgPipeline
from helpers import tiny
from helpers.recorder import PROMPTS, Recorder
from torch import Tensor

from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.guidance import add_negative_guidance


@pytest.fixture
def pipeline():
    return tiny.build("chroma")


def test_the_mask_has_the_tokens_and_one_of_padding(pipeline):
    mask = family_for(pipeline).encode_prompts(pipeline, PROMPTS)["prompt_attention_mask"]
    lengths = [len(pipeline.tokenizer(prompt).input_ids) + 1 for prompt in PROMPTS]
    assert mask.sum(dim=1).tolist() == lengths
    assert all(row[:length].all() and not row[length:].any() for row, length in zip(mask, lengths, strict=True))


def test_what_the_mask_leaves_out_still_changes_the_prediction(pipeline):
    """So that all of an embedding must be stored; a diffusers that masks may set `prompt_masks`."""
    family = family_for(pipeline)
    conditioning = family.encode_prompts(pipeline, PROMPTS[:1])
    latents, time = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    outside = 1 - conditioning["prompt_attention_mask"][..., None]
    others = {**conditioning, "prompt_embeds": conditioning["prompt_embeds"] + outside}
    with torch.no_grad():
        one, other = (family.predict(pipeline.transformer, latents, time, each) for each in (conditioning, others))
    assert (one - other).abs().max() > 1e-4


def test_checkpointed_single_blocks_get_the_mask_in_both_passes(pipeline):
    family = family_for(pipeline)
    pipeline.transformer.enable_gradient_checkpointing()
    checkpoint = pipeline.transformer._gradient_checkpointing_func
    recorder = Recorder(pipeline.transformer.single_transformer_blocks[0])
    conditioning = family.encode_prompts(pipeline, PROMPTS)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    family.predict(pipeline.transformer, latents, torch.tensor([500.0, 20.0]), conditioning).mean().backward()
    expected = torch.cat([conditioning["prompt_attention_mask"], torch.ones(2, 16)], dim=1)
    assert len(recorder.calls) == 2
    for call in recorder.calls:
        assert torch.equal(call["attention_mask"], expected)
    assert pipeline.transformer._gradient_checkpointing_func is checkpoint


def test_the_negative_model_acts_in_image_to_image():
    """With a negative model that predicts zero, guidance 3 gives three times the positive prediction."""

    def generate(pipeline, scale: float) -> Tensor:
        image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        options = {"image": image, "height": 16, "width": 16, "strength": 0.8, "num_inference_steps": 4}
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipeline(PROMPTS[0], guidance_scale=scale, output_type="latent", generator=generator, **options).images

    plain = ChromaImg2ImgPipeline(**tiny.build("chroma").components)
    plain.transformer.register_forward_hook(lambda module, args, output: (3.0 * output[0],))
    expected = generate(plain, 1.0)
    pipeline = ChromaImg2ImgPipeline(**tiny.build("chroma").components)
    guidance = add_negative_guidance(pipeline, copy.deepcopy(pipeline.transformer))
    guidance.second.register_forward_hook(lambda module, args, output: (torch.zeros_like(output[0]),))
    torch.testing.assert_close(generate(pipeline, 3.0), expected, rtol=1e-4, atol=1e-4)


def test_one_tensor_for_both_sides_of_the_guidance_raises(pipeline):
    embeds, _, mask, *_ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    negative = {"negative_prompt_embeds": embeds, "negative_prompt_attention_mask": mask}
    options = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    options |= {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    add_negative_guidance(pipeline, copy.deepcopy(pipeline.transformer))
    with pytest.raises(ValueError, match=r"are one tensor.*Pass negative_prompt_embeds=prompt_embeds.clone\(\)"):
        pipeline(**options, **negative)
    pipeline(**options, **{name: value.clone() for name, value in negative.items()})
    pipeline(**options, **negative, guidance_scale=1.0)

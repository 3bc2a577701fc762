import copy

import pytest
import torch
from helpers import tiny

from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.guidance import add_negative_guidance


PROMPTS = ["a red circle", "a blue ring"]
# The first CLIP encoder is 32 wide, the second 16; T5's tokens stand after CLIP's 16.
OF_FIRST = (slice(None), slice(0, 16), slice(0, 32))
OF_SECOND = (slice(None), slice(0, 16), slice(32, 48))
OF_T5 = (slice(None), slice(16, None), slice(None))


def encode(pipeline, absent: tuple[int, ...]) -> dict[str, torch.Tensor]:
    for number in absent:
        suffix = "" if number == 1 else f"_{number}"
        setattr(pipeline, f"text_encoder{suffix}", None)
        setattr(pipeline, f"tokenizer{suffix}", None)
    # without a tokenizer the pipeline takes 77 tokens, CLIP's usual length
    pipeline.tokenizer_max_length = 16
    return family_for(pipeline).encode_prompts(pipeline, PROMPTS)


@pytest.mark.parametrize("absent", [(1,), (2,), (3,), (1, 2), (1, 3), (2, 3)], ids=str)
def test_zeros_stand_for_absent_text_encoders_and_nothing_else_changes(absent):
    whole = encode(tiny.build("stable_diffusion_3"), ())
    part = encode(tiny.build("stable_diffusion_3"), absent)
    embeds, pooled = whole["prompt_embeds"].clone(), whole["pooled_prompt_embeds"].clone()
    for number, where, columns in ((1, OF_FIRST, slice(0, 32)), (2, OF_SECOND, slice(32, 48)), (3, OF_T5, None)):
        if number in absent:
            embeds[where] = 0
            if columns is not None:
                pooled[:, columns] = 0
    torch.testing.assert_close(part["prompt_embeds"], embeds)
    torch.testing.assert_close(part["pooled_prompt_embeds"], pooled)


def test_a_pipeline_without_text_encoders_is_refused():
    with pytest.raises(ValueError, match="no text encoder .text_encoder, text_encoder_2, text_encoder_3"):
        encode(tiny.build("stable_diffusion_3"), (1, 2, 3))


def test_skip_layer_guidance_is_the_model_s_own_under_a_negative_model():
    """The pipeline's further call, with layers left out, is on the positive side alone."""
    pipeline, steps = tiny.build("stable_diffusion_3"), 3
    options = {"height": 16, "width": 24, "num_inference_steps": steps, "output_type": "latent", "guidance_scale": 3.0}
    skips = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}

    def sample(**more) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt=PROMPTS, negative_prompt=["", ""], generator=generator, **options, **more)[0]

    plain, skipping = sample(), sample(**skips)
    assert (skipping - plain).abs().max() > 1e-3
    calls: list[int] = []
    guidance = add_negative_guidance(pipeline, copy.deepcopy(pipeline.transformer))
    guidance.second.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
    torch.testing.assert_close(sample(**skips), skipping, rtol=1e-4, atol=1e-5)
    assert calls == [2] * steps

import pytest
import torch
from helpers import tiny

from trl_diffusion_pref.families import family_for


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

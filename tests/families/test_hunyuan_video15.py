"""HunyuanVideo 1.5: quoted words, the place of an image beside the latents, and its guider."""

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from helpers import tiny
from helpers.recorder import Recorder
from helpers.tiny_hunyuan_video15 import build_hunyuan_video15

from trl_diffusion_pref.evaluation import sample
from trl_diffusion_pref.families import family_for


QUOTED = ['a sign that says "open" and "closed"', "a blue ring", "a wall with “no entry”"]


@pytest.fixture
def pipeline():
    return tiny.build("hunyuan_video15")


def test_quoted_words_are_encoded_as_the_sampler_does(pipeline):
    family, recorder = family_for(pipeline), Recorder(pipeline.transformer)
    options = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    pipeline(QUOTED, **options)
    theirs = recorder.calls[-1]
    with torch.no_grad():
        conditioning = family.encode_prompts(pipeline, QUOTED)
        family.predict(pipeline.transformer, theirs["hidden_states"][:, :4], theirs["timestep"], conditioning)
    ours = recorder.calls[-1]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    counts = conditioning["prompt_embeds_mask_2"].sum(dim=1)
    # One token per byte, and one for the end.
    texts = ['Text "open". Text "closed". ', None, 'Text "no entry". ']
    assert counts.tolist() == [0 if text is None else len(text) + 1 for text in texts]


def test_padding_that_is_not_stored_changes_no_prediction(pipeline):
    family = family_for(pipeline)
    conditioning = family.encode_prompts(pipeline, QUOTED)
    without = {**conditioning}
    for name, mask in family.prompt_masks.items():
        without[name] = conditioning[name] * conditioning[mask][..., None]
    latents, time = torch.randn(3, 4, 2, 4, 8), torch.tensor([900.0, 500.0, 20.0])
    with torch.no_grad():
        one, other = (family.predict(pipeline.transformer, latents, time, each) for each in (conditioning, without))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_transformer_of_another_pipeline_is_refused():
    torch.manual_seed(0)
    pipeline = build_hunyuan_video15(in_channels=8)
    with pytest.raises(
        ValueError, match="takes 8 channels, but noisy latents, the latents of an image and a mask .* 9"
    ):
        family_for(pipeline).check_complete(pipeline)


def test_distilled_weights_are_known_by_their_config_and_name(pipeline):
    family = family_for(pipeline)
    assert family.distilled(pipeline) is None
    pipeline.transformer.register_to_config(use_meanflow=True)
    assert "use_meanflow=True" in family.distilled(pipeline)
    pipeline.transformer.register_to_config(use_meanflow=False)
    pipeline.register_to_config(_name_or_path="hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v_distilled")
    assert "t2v_distilled" in family.distilled(pipeline)


def test_a_batch_is_encoded_and_decoded_as_its_videos_are(pipeline):
    """In diffusers 0.42 the VAE itself raises for two, unless it takes them one by one."""
    family, pixels = family_for(pipeline), tiny.CASES["hunyuan_video15"].pixels(batch=2)
    pipeline.vae.disable_slicing()
    mean, std = family.encode_samples(pipeline, pixels)
    for row in range(2):
        alone = family.encode_samples(pipeline, pixels[row : row + 1])
        torch.testing.assert_close((mean[row], std[row]), (alone[0][0], alone[1][0]))
    decoded = family.decode_samples(pipeline, mean)
    torch.testing.assert_close(decoded[1], family.decode_samples(pipeline, mean[1:])[0])


def test_several_prompts_are_sampled_one_by_one(pipeline):
    """In diffusers 0.42 the pipeline itself raises for two, unless its VAE takes them one by one."""
    pipeline.vae.disable_slicing()
    options = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 1}
    videos = sample(pipeline, QUOTED[:2], [0, 0], show_progress=False, **options)
    assert [len(video) for video in videos] == [5, 5]


def test_guidance_is_the_guider_s(pipeline):
    recorder = Recorder(pipeline.transformer)
    options = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    pipeline(QUOTED[:1], **options)
    assert len(recorder.calls) == 2
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=3.0)
    pipeline(QUOTED[:1], **options)
    assert len(recorder.calls) == 6

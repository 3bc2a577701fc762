"""ACE-Step 1.5: prompts of different length, the learned embedding, durations and loudness."""

import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import tiny
from helpers.recorder import PROMPTS, Recorder
from helpers.tiny_ace_step import build_ace_step
from torch import Tensor

from trl_diffusion_pref.evaluation import sample
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.families.weightless import pipeline_around
from trl_diffusion_pref.guidance import add_negative_guidance


# In diffusers from 0.39 on.
pytest.importorskip("diffusers.pipelines.ace_step")


@pytest.fixture
def pipeline() -> DiffusionPipeline:
    return tiny.build("ace_step")


def noise(rows: int, latents: int = 120) -> Tensor:
    return torch.randn(rows, 4, latents, generator=torch.Generator().manual_seed(0))


def test_prompts_of_different_length_are_predicted_as_each_by_itself(pipeline):
    family = family_for(pipeline)
    prompts, time = [*PROMPTS, PROMPTS[0]], torch.tensor([0.9, 0.5, 0.1])
    conditioning, latents = family.encode_prompts(pipeline, prompts), noise(3)
    recorder = Recorder(pipeline.transformer)
    with torch.no_grad():
        together = family.predict(pipeline.transformer, latents, time, conditioning)
        assert len(recorder.calls) == 2
        for row, prompt in enumerate(prompts):
            alone = family.encode_prompts(pipeline, [prompt])
            expected = family.predict(pipeline.transformer, latents[row : row + 1], time[row : row + 1], alone)
            torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_the_learned_embedding_acts_alike_at_any_length(pipeline):
    """So that a dropped prompt needs no length of its own."""
    family = family_for(pipeline)
    conditioning, latents, time = family.encode_unconditional(pipeline), noise(1), torch.tensor([0.5])
    null = pipeline.condition_encoder.null_condition_emb.detach()
    longer = {
        **conditioning,
        "prompt_embeds": null.expand_as(conditioning["prompt_embeds"]),
        "prompt_embeds_mask": torch.ones_like(conditioning["prompt_embeds_mask"]),
    }
    assert conditioning["prompt_embeds_mask"].sum() < longer["prompt_embeds_mask"].sum()
    with torch.no_grad():
        one, other = (family.predict(pipeline.transformer, latents, time, each) for each in (conditioning, longer))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_another_duration_is_conditioned_on_as_the_sampler_does(pipeline):
    family, recorder = type(family_for(pipeline))(audio_duration=30), Recorder(pipeline.transformer)
    assert family.audio_size(pipeline) == (2, 240)
    pipeline(PROMPTS[:1], audio_duration=30, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    theirs = recorder.calls[-1]
    with torch.no_grad():
        conditioning = family.encode_prompts(pipeline, PROMPTS[:1])
        family.predict(pipeline.transformer, theirs["hidden_states"].transpose(1, 2), theirs["timestep"], conditioning)
    ours = recorder.calls[-1]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert "- duration: 30 seconds" in family.tokenized_text(pipeline, "a bell")


def test_guidance_takes_its_unconditional_side_from_the_negative_model(pipeline, monkeypatch):
    negative = tiny.build("ace_step", seed=1).transformer
    guidance = add_negative_guidance(pipeline, negative)
    positives, negatives, given = [], [], []
    pipeline.transformer.proj_out_conv.register_forward_hook(lambda *call: positives.append(call[2].transpose(1, 2)))
    guidance.second.register_forward_hook(lambda *call: negatives.append(call[2][0]))
    step = pipeline.scheduler.step
    monkeypatch.setattr(
        pipeline.scheduler, "step", lambda out, *args, **kw: given.append(out) or step(out, *args, **kw)
    )
    pipeline(PROMPTS, lyrics=["", ""], num_inference_steps=2, guidance_scale=3.0, output_type="latent")
    assert len(positives) == len(negatives) == len(given) == 2
    module = sys.modules[type(pipeline).__module__]
    expected = module.normalized_guidance(
        positives[0],
        negatives[0],
        2.0,
        module.MomentumBuffer(-0.75),
        eta=0.0,
        norm_threshold=2.5,
        use_original_formulation=True,
        norm_dim=(1,),
    )
    torch.testing.assert_close(given[0], expected)
    assert (given[0] - positives[0]).abs().max() > 1e-3


def test_several_prompts_are_sampled_one_by_one(pipeline):
    """In diffusers 0.42 the pipeline itself raises an IndexError for two without lyrics for each."""
    sounds = sample(pipeline, PROMPTS, [0, 0], num_inference_steps=1, guidance_scale=1.0, show_progress=False)
    assert [sound.samples.shape for sound in sounds] == [(2, 480)] * 2


def test_decoded_audio_has_the_sampler_s_peak(pipeline):
    family = family_for(pipeline)
    decoded = family.decode_samples(pipeline, 0.1 * noise(2))
    torch.testing.assert_close(decoded.abs().amax(dim=(1, 2)), torch.full((2,), 10**-0.05))


def test_turbo_weights_are_known_to_be_distilled(pipeline):
    torch.manual_seed(0)
    turbo = build_ace_step(model_version="turbo")
    assert "turbo" in family_for(turbo).distilled(turbo)
    assert family_for(pipeline).distilled(pipeline) is None


def test_a_transformer_alone_has_the_published_minute(pipeline):
    family = family_for(pipeline)
    alone = pipeline_around(family, pipeline.transformer)
    assert family.audio_size(alone) == (2, 60 * 48000)
    shapes = family.input_shapes(alone, (2, 60 * 48000))
    assert shapes.latents == (4, 1500)
    assert shapes.conditioning["silence_latents"] == (1500, 4)


def test_waveforms_of_another_length_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"takes waveforms \(batch, 2, 480\), 60 s at 8 Hz, but got \(1, 2, 240\)"):
        family_for(pipeline).encode_samples(pipeline, torch.zeros(1, 2, 240))

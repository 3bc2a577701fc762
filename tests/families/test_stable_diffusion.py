import pytest
import torch
from conftest import build_tiny_pipeline
from diffusers import DDPMPipeline, DiffusionPipeline
from PIL import Image

from trl_diffusion_pref.families import family_for, supported_pipelines
from trl_diffusion_pref.noise import noise_process
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_predict_calls_the_denoiser_as_the_pipeline_does(prediction_type):
    pipeline = build_tiny_pipeline(prediction_type)
    family = family_for(pipeline)
    calls = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    pipeline("a red circle", guidance_scale=1.0, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    theirs_args, theirs = calls[0]
    x_t, timestep = theirs_args[:2]
    calls.clear()
    conditioning = family.encode_prompts(pipeline, ["a red circle"])
    family.predict(pipeline.unet, x_t, noise_process(pipeline.scheduler).model_time(timestep[None]), conditioning)
    ours_args, ours = calls[0]
    assert torch.equal(ours_args[0], x_t)
    assert ours_args[1].tolist() == [timestep.item()]
    assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    assert ours["encoder_hidden_states"].dtype == theirs["encoder_hidden_states"].dtype
    # Whatever else the pipeline passes is off.
    rest = {name: value for name, value in theirs.items() if name not in ("encoder_hidden_states", "return_dict")}
    assert all(value is None for value in rest.values()), rest


def test_encoded_latents_decode_to_the_vae_s_own_reconstruction():
    pipeline = load_pipeline()
    image = preference_pairs(1)[0]["chosen"]
    pixels = pipeline.image_processor.preprocess(image)
    mean, std = family_for(pipeline).encode_images(pipeline, pixels)
    with torch.inference_mode():
        posterior = pipeline.vae.encode(pixels).latent_dist
        expected = pipeline.vae.decode(posterior.mean).sample
        decoded = pipeline.vae.decode(mean / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(std, posterior.std * pipeline.vae.config.scaling_factor)
    # and that reconstruction is the picture
    assert (decoded - pixels).square().mean().sqrt().item() / 2 < 0.05


def test_resolution_is_what_the_pipeline_generates(tiny_pipeline):
    image = tiny_pipeline("a red circle", num_inference_steps=1).images[0]
    assert image.size == (family_for(tiny_pipeline).resolution(tiny_pipeline),) * 2


def test_unsupported_pipelines_are_refused_with_the_supported_ones(tiny_pipeline):
    assert "StableDiffusionPipeline" in supported_pipelines()
    other = DDPMPipeline(unet=tiny_pipeline.unet, scheduler=tiny_pipeline.scheduler)
    assert isinstance(other, DiffusionPipeline)
    with pytest.raises(TypeError, match="DDPMPipeline is not supported.*StableDiffusionPipeline"):
        family_for(other)
    with pytest.raises(TypeError, match="UNet2DConditionModel alone.*whole pipeline"):
        family_for(tiny_pipeline.unet)
    with pytest.raises(TypeError, match="not a diffusers pipeline"):
        family_for(Image.new("RGB", (1, 1)))

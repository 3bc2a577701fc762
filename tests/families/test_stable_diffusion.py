import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from helpers import tiny
from PIL import Image

from trl_diffusion_pref.diffusion.noise import noise_process
from trl_diffusion_pref.families import family_for, supported_pipelines
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs


def test_encoded_latents_decode_to_the_vae_s_own_reconstruction():
    pipeline = load_pipeline()
    image = preference_pairs(1)[0]["chosen"]
    pixels = pipeline.image_processor.preprocess(image)
    mean, std = family_for(pipeline).encode_samples(pipeline, pixels)
    with torch.inference_mode():
        posterior = pipeline.vae.encode(pixels).latent_dist
        expected = pipeline.vae.decode(posterior.mean).sample
        decoded = pipeline.vae.decode(mean / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(std, posterior.std * pipeline.vae.config.scaling_factor)
    # and that reconstruction is the picture
    assert (decoded - pixels).square().mean().sqrt().item() / 2 < 0.05


def test_zero_terminal_snr_ends_in_noise_that_v_prediction_can_be_trained_on():
    process = noise_process(tiny.build("stable_diffusion_zero_terminal_snr").scheduler)
    last = torch.tensor([process.num_train_timesteps - 1])
    alpha, sigma = process.alpha_sigma(last)
    assert alpha.item() < 1e-3
    assert sigma.item() == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(0)
    x0, noise, prediction = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(3))
    x_t = process.corrupt(x0, noise, last)
    torch.testing.assert_close(x_t, noise, rtol=0, atol=1e-2)
    torch.testing.assert_close(process.target(x0, noise, last), -x0, rtol=0, atol=1e-2)
    assert process.predict_x0(prediction, x_t, last).isfinite().all()
    assert process.squared_x0_scale(last).item() == pytest.approx(1.0)


def test_zero_terminal_snr_with_epsilon_prediction_is_refused():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        noise_process(tiny.build_stable_diffusion("epsilon", rescale_betas_zero_snr=True).scheduler)


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

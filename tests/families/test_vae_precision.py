"""Half-precision VAEs: what overflows is encoded in float32, and said once."""

import logging

import pytest
import torch
from helpers import tiny

from trl_diffusion_pref.families import autoencoders, family_for


@pytest.fixture(autouse=True)
def warn_anew():
    autoencoders._warn_of_non_finite_values.cache_clear()


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def messages(caplog) -> list[str]:
    """Ours; diffusers warns of every cast."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("trl_diffusion_pref")]


def overflowing(vae):
    """Makes activations pass float16's largest number, which the next normalisation turns into NaN."""
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e5).clamp_(-6e4, 6e4)
    return vae


def test_latents_that_overflow_in_float16_are_encoded_in_float32_and_named_once(pixels, caplog):
    vae = overflowing(tiny.autoencoder_kl().half())
    with torch.no_grad():
        assert not vae.encode(pixels.half()).latent_dist.mean.isfinite().all()
    with caplog.at_level(logging.WARNING):
        encoded = [autoencoders.encode_with_autoencoder_kl(vae, pixels) for _ in range(2)]
    assert [message[:25] for message in messages(caplog)] == ["AutoencoderKL in float16 "]
    # as it was, for the next batch and for sampling
    assert {tensor.dtype for tensor in vae.state_dict().values()} == {torch.float16}
    expected = autoencoders.encode_with_autoencoder_kl(vae.float(), pixels)
    for mean, std in encoded:
        assert mean.dtype == std.dtype == torch.float32
        torch.testing.assert_close((mean, std), expected)


def test_finite_half_precision_latents_are_left_alone(pixels, caplog):
    vae = tiny.autoencoder_kl().to(torch.bfloat16)
    with torch.no_grad():
        expected = vae.encode(pixels.bfloat16()).latent_dist.mean.float() * vae.config.scaling_factor
    assert torch.equal(autoencoders.encode_with_autoencoder_kl(vae, pixels)[0], expected)
    assert not messages(caplog)


@pytest.mark.parametrize("force_upcast", [True, False])
def test_the_vae_of_stable_diffusion_xl_is_encoded_in_float32_where_its_config_says_so(force_upcast, pixels, caplog):
    torch.manual_seed(0)
    pipeline = tiny.build_stable_diffusion_xl(force_upcast=force_upcast)
    vae = pipeline.vae.half()
    if force_upcast:
        overflowing(vae)
    mean, _ = family_for(pipeline).encode_samples(pipeline, pixels)
    assert vae.dtype == torch.float16
    assert not messages(caplog)
    used = vae.float() if force_upcast else vae
    with torch.no_grad():
        expected = used.encode(pixels.to(used.dtype)).latent_dist.mean.float() * vae.config.scaling_factor
    assert torch.equal(mean, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_latents_that_are_not_finite_in_float32_either_are_handed_on(dtype, pixels):
    vae = tiny.autoencoder_kl().to(dtype)
    pixels[0, 0, 0, 0] = float("nan")
    mean, _ = autoencoders.encode_with_autoencoder_kl(vae, pixels)
    # Of the first image only; the caller names the row.
    assert not mean[0].isfinite().all()
    assert mean[1].isfinite().all()
    assert vae.dtype == dtype


def test_other_autoencoders_are_retried_in_float32_too(pixels, caplog):
    for name in ("sana", "qwen_image"):
        pipeline = tiny.build(name)
        family = family_for(pipeline)
        expected = family.encode_samples(pipeline, pixels)
        vae = pipeline.vae
        forward = vae.encode

        def nan_in_half(x, forward=forward, vae=vae):
            output = forward(x)
            if vae.dtype == torch.float16:
                latents = output.latent if hasattr(output, "latent") else output.latent_dist.mean
                latents.fill_(float("nan"))
            return output

        vae.encode = nan_in_half
        vae.half()
        mean, _ = family.encode_samples(pipeline, pixels)
        torch.testing.assert_close(mean, expected[0], rtol=1e-2, atol=1e-2)
        assert messages(caplog)[-1].startswith(f"{type(vae).__name__} in float16")

"""DiffusionNFT's loss against closed forms in float64."""

import pytest
import torch

from trl_diffusion_pref.algorithms.diffusion_nft.loss import (
    DiffusionNFTOptions,
    diffusion_nft_loss,
    liked_probability,
)
from trl_diffusion_pref.diffusion.noise import RectifiedFlow, VariancePreserving


SHAPE = (3, 4, 5, 5)
PLAIN = DiffusionNFTOptions(nft_beta=0.3, advantage_clip=5.0, self_normalized=False)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(4)]


def gradient(place, old, x0, liked, options):
    place = place.clone().requires_grad_()
    diffusion_nft_loss(place, old, x0, liked, options).sum().backward()
    return place.grad


def test_the_loss_is_the_formula_of_the_velocities(tensors):
    """Written out in v, as published, for one sample at a time."""
    v, v_old, x0, noise = tensors
    times, p, b = [0.2, 0.5, 0.9], [0.0, 0.4, 1.0], 0.3
    options = DiffusionNFTOptions(nft_beta=b)
    for row, (t, own) in enumerate(zip(times, p, strict=True)):
        x_t = (1 - t) * x0[row] + t * noise[row]
        wanted = 0.0
        for weight, mixed in ((own, b * v[row] + (1 - b) * v_old[row]), (1 - own, (1 + b) * v_old[row] - b * v[row])):
            error = x_t - t * mixed - x0[row]
            wanted += 5 / b * weight * error.square().mean() / error.abs().mean().clamp(min=1e-5)
        clean, old_clean = ((x_t - t * each[row])[None] for each in (v, v_old))
        liked = torch.tensor([own], dtype=torch.float64)
        found = diffusion_nft_loss(clean, old_clean, x0[row][None], liked, options)
        torch.testing.assert_close(found, wanted.reshape(1), rtol=1e-12, atol=0)


def test_at_the_old_policy_the_gradient_is_2b_2p_minus_1_times_the_error(tensors):
    old, x0 = tensors[:2]
    p = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    for options in (PLAIN, DiffusionNFTOptions(nft_beta=0.3)):
        found = gradient(old, old, x0, p, options)
        scale = options.advantage_clip / options.nft_beta / old[0].numel()
        wanted = scale * 2 * options.nft_beta * (2 * p - 1).reshape(-1, 1, 1, 1) * (old - x0)
        if options.self_normalized:
            wanted = wanted / (old - x0).abs().mean(dim=(1, 2, 3), keepdim=True)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_the_gradient_in_v_is_t_squared_times_the_velocity_error(tensors):
    """Through a flow's clean latents, at v = v_old: 2 b (2p - 1) (v_old - target), up to the scale."""
    v, x0, noise, _ = (tensor.float() for tensor in tensors)
    t, p = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.1, 0.5, 0.8])
    process = RectifiedFlow()
    x_t, target = process.corrupt(x0, noise, t), process.target(x0, noise, t)
    t = process.time_of(process.model_time(t))
    trained = v.clone().requires_grad_()
    clean, old = (process.predict_x0(each, x_t, t) for each in (trained, v))
    diffusion_nft_loss(clean, old, x0, p, PLAIN).sum().backward()
    factor = 5 / PLAIN.nft_beta / v[0].numel() * 2 * PLAIN.nft_beta * t**2 * (2 * p - 1)
    torch.testing.assert_close(trained.grad, factor.reshape(-1, 1, 1, 1) * (v - target), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_mixing_clean_latents_is_mixing_predictions(tensors, prediction_type):
    prediction, old, x_t, _ = (tensor.float() for tensor in tensors)
    process = VariancePreserving(torch.linspace(0.999, 0.01, 10), prediction_type)
    t, b = torch.tensor([1, 4, 8]), 0.3
    mixed = process.predict_x0((1 + b) * old - b * prediction, x_t, t)
    clean, old_clean = (process.predict_x0(each, x_t, t) for each in (prediction, old))
    torch.testing.assert_close((1 + b) * old_clean - b * clean, mixed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("self_normalized", [False, True])
def test_a_disliked_sample_has_its_minimum_at_a_finite_place(tensors, self_normalized):
    old, x0, direction = tensors[:3]
    options, none = DiffusionNFTOptions(0.3, 5.0, self_normalized), torch.zeros(3, dtype=torch.float64)
    least = old + (old - x0) / 0.3
    torch.testing.assert_close(diffusion_nft_loss(least, old, x0, none, options), none, rtol=0, atol=1e-12)
    assert gradient(least, old, x0, none, options).abs().max() < 1e-9
    # Beyond it the loss pulls back.
    beyond = least + 10 * (least - x0)
    assert ((gradient(beyond, old, x0, none, options) * (beyond - least)).flatten(1).sum(dim=1) > 0).all()
    assert (diffusion_nft_loss(least + direction, old, x0, none, options) > 0).all()


def test_the_gradient_is_that_of_finite_differences(tensors):
    clean, old, x0, direction = tensors
    p = torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64)
    step = 1e-5
    losses = [diffusion_nft_loss(clean + sign * step * direction, old, x0, p, PLAIN) for sign in (1, -1)]
    slope = (gradient(clean, old, x0, p, PLAIN) * direction).flatten(1).sum(dim=1)
    torch.testing.assert_close(slope, (losses[0] - losses[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_weights_have_no_gradient_and_are_at_least_1e_minus_5(tensors):
    x0 = tensors[0]
    near = x0 + 1e-7
    for p in (0.0, 1.0):
        found = diffusion_nft_loss(near, near, x0, torch.full((3,), p), DiffusionNFTOptions())
        torch.testing.assert_close(found, torch.full((3,), 5e-14 / 1e-5, dtype=torch.float64), rtol=1e-6, atol=0)


def test_half_precision_is_computed_in_float32(tensors):
    clean, old, x0 = (tensor.bfloat16() for tensor in tensors[:3])
    found = diffusion_nft_loss(clean, old, x0, torch.ones(3), PLAIN)
    assert found.dtype == torch.float32
    assert torch.equal(found, diffusion_nft_loss(clean.float(), old.float(), x0.float(), torch.ones(3), PLAIN))


def test_a_region_counts_alone(tensors):
    clean, old, x0, _ = tensors
    region = torch.zeros(3, 1, 5, 5)
    region[..., :2] = 1
    options, p = DiffusionNFTOptions(nft_beta=0.5), torch.tensor([0.2, 0.5, 1.0])
    inside = [tensor[..., :2] for tensor in (clean, old, x0)]
    torch.testing.assert_close(
        diffusion_nft_loss(clean, old, x0, p, options, region), diffusion_nft_loss(*inside, p, options)
    )


def test_advantages_beyond_the_clip_are_certain():
    advantages = torch.tensor([-7.0, -5.0, -1.0, 0.0, 1.0, 5.0, 7.0])
    torch.testing.assert_close(liked_probability(advantages, 5.0), torch.tensor([0.0, 0.0, 0.4, 0.5, 0.6, 1.0, 1.0]))


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_constants_that_mean_nothing_raise(value):
    for name in ("nft_beta", "advantage_clip"):
        with pytest.raises(ValueError, match=name):
            DiffusionNFTOptions(**{name: value})


def test_shapes_that_differ_raise(tensors):
    with pytest.raises(ValueError, match="one number in liked"):
        diffusion_nft_loss(*tensors[:3], torch.ones(2), PLAIN)

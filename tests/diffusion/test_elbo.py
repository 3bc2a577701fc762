"""Likelihood estimates against closed forms: data that are Gaussian, with the denoiser that is best for them."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from trl_diffusion_pref.diffusion.elbo import error_weight, estimate_elbo, time_quantiles
from trl_diffusion_pref.diffusion.noise import noise_process


DATA_STD = 0.7
# Few, coarse steps: the discrete bound differs visibly from a continuous one.
STEPS = 50


def process_of(kind: str):
    if kind == "flow":
        return noise_process(FlowMatchEulerDiscreteScheduler())
    return noise_process(
        DDPMScheduler(
            num_train_timesteps=STEPS,
            beta_schedule="scaled_linear",
            beta_start=0.01,
            beta_end=0.2,
            prediction_type=kind,
        )
    )


KINDS = ("epsilon", "v_prediction", "sample", "flow")


def best_denoiser(process, kind: str):
    """E[x0 | x_t] of N(0, DATA_STD^2) data, turned into what the process predicts."""

    def predict(x_t, model_time):
        t = model_time / process.num_train_timesteps if kind == "flow" else model_time
        alpha, sigma = (value.reshape(-1, 1) for value in process.alpha_sigma(t))
        x0 = alpha * DATA_STD**2 / (alpha**2 * DATA_STD**2 + sigma**2) * x_t
        noise = (x_t - alpha * x0) / sigma
        return {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0, "flow": noise - x0}[kind]

    return predict


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def expected_x0_error(process, t, x0: float) -> torch.Tensor:
    """Over the noise, at one clean value."""
    alpha, sigma = (value.double() for value in process.alpha_sigma(t))
    k = alpha * DATA_STD**2 / (alpha**2 * DATA_STD**2 + sigma**2)
    return (1 - k * alpha) ** 2 * x0**2 + k**2 * sigma**2


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_exact_bound_is_the_sum_over_steps(kind):
    """With as many strata as steps each step is drawn once, so only the noise is random."""
    process = process_of(kind)
    value, pixels = 0.9, 20_000
    x0 = torch.full((1, pixels), value)
    elbo = estimate_elbo(
        best_denoiser(process, kind), x0, process, generators(1), draws=STEPS, weighting="elbo"
    ).item()
    t = torch.arange(1, STEPS)
    alpha, sigma = (quantity.double() for quantity in process.alpha_sigma(torch.arange(STEPS)))
    snr = (alpha / sigma) ** 2
    expected = -(0.5 * (snr[:-1] - snr[1:]) * expected_x0_error(process, t, value)).sum().item()
    assert elbo == pytest.approx(expected, rel=0.02)


def test_the_bound_differs_between_values_as_their_log_densities_do():
    """For the best denoiser of Gaussian data the continuous bound is tight: its differences are the density's.

    Taken over the flow's times from 1e-3 on; what lies below adds the same to both values at this accuracy.
    """
    process = process_of("flow")
    values, pixels = (0.2, 1.4), 4000
    x0 = torch.stack([torch.full((pixels,), value) for value in values])
    same = [torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)]
    elbo = estimate_elbo(best_denoiser(process, "flow"), x0, process, same, draws=400, weighting="elbo")
    log_density = [-0.5 * (value / DATA_STD) ** 2 for value in values]
    assert (elbo[1] - elbo[0]).item() == pytest.approx(log_density[1] - log_density[0], rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", ["simple", "elbo", "min_snr"])
def test_weights_turn_prediction_errors_into_the_named_objective(kind, weighting):
    process = process_of(kind)
    t = torch.tensor([0.05, 0.4, 0.9]) if kind == "flow" else torch.tensor([1, 20, 49])
    alpha, sigma = process.alpha_sigma(t)
    snr = (alpha / sigma).double() ** 2
    per_x0_error = {
        "epsilon": snr,
        "v_prediction": snr + 1,
        "sample": torch.ones_like(snr),
        "flow": 1 / sigma.double() ** 2,
    }[kind]
    if weighting == "simple":
        on_x0 = per_x0_error
    elif weighting == "min_snr":
        on_x0 = snr.clamp(max=5.0)
    elif kind == "flow":
        on_x0 = (1 - t.double()) / t.double() ** 3
    else:
        before_alpha, before_sigma = process.alpha_sigma(t - 1)
        on_x0 = STEPS / 2 * ((before_alpha / before_sigma).double() ** 2 - snr)
    torch.testing.assert_close(
        error_weight(process, t, weighting).double() * per_x0_error, on_x0, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_simple_weighting_is_the_mean_training_error(kind):
    process = process_of(kind)
    x0 = torch.randn(3, 8)
    elbo = estimate_elbo(lambda x_t, t: torch.zeros_like(x_t), x0, process, generators(3), draws=2)
    by_hand = torch.zeros(3)
    twins = generators(3)
    quantiles = time_quantiles(twins, 2, "stratified")
    for row in quantiles:
        t = process.times_at(row)
        noise = torch.stack([torch.randn(8, generator=generator) for generator in twins])
        by_hand -= process.target(x0, noise, t).square().mean(dim=1) / 2
    torch.testing.assert_close(elbo, by_hand)


def test_stratified_draws_fall_one_into_each_stratum():
    quantiles = time_quantiles(generators(50), 8, "stratified")
    assert quantiles.shape == (8, 50)
    np.testing.assert_array_equal((quantiles * 8).floor().numpy(), np.arange(8)[:, None].repeat(50, axis=1))


def test_antithetic_draws_come_in_mirrored_twos():
    quantiles = time_quantiles(generators(50), 5, "antithetic")
    torch.testing.assert_close(quantiles[0] + quantiles[1], torch.ones(50), rtol=0, atol=1e-6)
    torch.testing.assert_close(quantiles[2] + quantiles[3], torch.ones(50), rtol=0, atol=1e-6)
    assert (quantiles >= 0).all() and (quantiles < 1).all()


def test_images_with_equal_generators_share_times_and_noise():
    process = process_of("epsilon")
    seen = []

    def predict(x_t, t):
        seen.append((x_t, t))
        return torch.zeros_like(x_t)

    x0 = torch.randn(1, 6).repeat(2, 1)
    elbo = estimate_elbo(predict, x0, process, [torch.Generator().manual_seed(1) for _ in range(2)], draws=3)
    assert elbo[0] == elbo[1]
    assert all(torch.equal(x_t[0], x_t[1]) and t[0] == t[1] for x_t, t in seen)


def test_an_estimate_does_not_depend_on_what_else_is_in_the_batch():
    process, x0 = process_of("epsilon"), torch.randn(3, 6)
    predict = best_denoiser(process, "epsilon")
    together = estimate_elbo(predict, x0, process, generators(3))
    alone = [estimate_elbo(predict, x0[i : i + 1], process, [torch.Generator().manual_seed(i)]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_last_time_can_be_drawn_and_none_beyond():
    process = process_of("epsilon")
    assert process.times_at(torch.tensor([0.0, 0.5, 1 - 2**-24])).tolist() == [0, STEPS // 2, STEPS - 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws=0"),
        ({"sampling": "sobol"}, "stratified, antithetic, independent"),
        ({"weighting": "snr"}, "simple, elbo, min_snr"),
    ],
)
def test_bad_options_are_refused(options, message):
    process = process_of("epsilon")
    with pytest.raises(ValueError, match=message):
        estimate_elbo(best_denoiser(process, "epsilon"), torch.zeros(1, 2), process, generators(1), **options)
    with pytest.raises(ValueError, match="2 generators for 1 images"):
        estimate_elbo(best_denoiser(process, "epsilon"), torch.zeros(1, 2), process, generators(2))

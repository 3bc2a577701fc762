import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from trl_diffusion_pref.noise import ContinuousVariancePreserving, RectifiedFlow, VariancePreserving, noise_process


def scheduler(prediction_type: str, **options) -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        **options,
    )


@pytest.fixture
def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(5, 4, 3, 3, generator=generator) for _ in range(2))
    return x0, noise, torch.tensor([0, 1, 250, 998, 999])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_corruption_and_target_are_the_scheduler_s(prediction_type, sample):
    x0, noise, t = sample
    reference = scheduler(prediction_type)
    process = noise_process(reference)
    torch.testing.assert_close(process.corrupt(x0, noise, t), reference.add_noise(x0, noise, t), rtol=1e-5, atol=1e-6)
    expected = {"epsilon": noise, "v_prediction": reference.get_velocity(x0, noise, t), "sample": x0}[prediction_type]
    torch.testing.assert_close(process.target(x0, noise, t), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predict_x0_inverts_target(prediction_type, sample):
    x0, noise, t = sample
    process = noise_process(scheduler(prediction_type))
    x_t = process.corrupt(x0, noise, t)
    # dividing by alpha = 0.068 at t = 999 magnifies float32 rounding
    torch.testing.assert_close(process.predict_x0(process.target(x0, noise, t), x_t, t), x0, rtol=1e-4, atol=2e-5)


def test_rectified_flow_interpolates_and_inverts(sample):
    x0, noise, _ = sample
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    process = noise_process(FlowMatchEulerDiscreteScheduler())
    assert isinstance(process, RectifiedFlow)
    x_t = process.corrupt(x0, noise, t)
    torch.testing.assert_close(x_t[0], x0[0])
    torch.testing.assert_close(x_t[4], noise[4])
    torch.testing.assert_close(x_t[2], (x0[2] + noise[2]) / 2)
    torch.testing.assert_close(process.target(x0, noise, t), noise - x0)
    torch.testing.assert_close(process.predict_x0(noise - x0, x_t, t), x0, rtol=1e-5, atol=1e-6)
    assert process.model_time(t).tolist() == pytest.approx([0.0, 100.0, 500.0, 900.0, 1000.0])


@pytest.mark.parametrize("kind", ["variance preserving", "flow"])
def test_renoise_reaches_the_process_s_mean_and_variance(kind):
    if kind == "flow":
        process, t, s = RectifiedFlow(), torch.tensor([0.3]), torch.tensor([0.8])
    else:
        process, t, s = noise_process(scheduler("epsilon")), torch.tensor([200]), torch.tensor([700])
    alpha_t, sigma_t = (value.double().item() for value in process.alpha_sigma(t))
    alpha_s, sigma_s = (value.double().item() for value in process.alpha_sigma(s))
    # x_t = alpha_t x0 + sigma_t e is taken apart: the factors on x0, on e and on the new noise
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    on_x = process.renoise(one, zero, t, s).item()
    on_noise = process.renoise(zero, one, t, s).item()
    assert on_x * alpha_t == pytest.approx(alpha_s, rel=1e-5)
    assert np.hypot(on_x * sigma_t, on_noise) == pytest.approx(sigma_s, rel=1e-5)


def test_renoise_to_the_same_time_changes_nothing_and_backwards_is_refused():
    process = noise_process(scheduler("epsilon"))
    x = torch.randn(2, 3)
    t = torch.tensor([10, 500])
    torch.testing.assert_close(process.renoise(x, torch.randn(2, 3), t, t), x, rtol=1e-5, atol=1e-3)
    with pytest.raises(ValueError, match="at or after"):
        process.renoise(x, x, t, t - 1)


def test_timesteps_cover_the_range_uniformly_and_follow_the_generator():
    process = noise_process(scheduler("epsilon"))
    drawn = process.sample_timesteps(20000, torch.Generator().manual_seed(0))
    assert drawn.min() == 0 and drawn.max() == 999
    # mean of 20,000 uniform draws: standard error 2.04
    assert drawn.float().mean().item() == pytest.approx(499.5, abs=8.2)
    assert torch.equal(drawn, process.sample_timesteps(20000, torch.Generator().manual_seed(0)))


def test_flow_times_are_logit_normal():
    drawn = RectifiedFlow().sample_timesteps(20000, torch.Generator().manual_seed(0))
    logits = torch.logit(drawn.double())
    assert logits.mean().item() == pytest.approx(0.0, abs=0.03)
    assert logits.std().item() == pytest.approx(1.0, abs=0.03)


def test_any_sampler_of_the_same_betas_gives_the_same_process():
    config = scheduler("v_prediction").config
    t = torch.arange(1000)
    for other in (DDIMScheduler, UniPCMultistepScheduler):
        process = noise_process(other.from_config(config))
        assert process.prediction_type == "v_prediction"
        torch.testing.assert_close(process.alpha_sigma(t), noise_process(scheduler("v_prediction")).alpha_sigma(t))


def test_zero_terminal_snr_needs_v_or_sample_prediction():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        noise_process(scheduler("epsilon", rescale_betas_zero_snr=True))
    process = noise_process(scheduler("v_prediction", rescale_betas_zero_snr=True))
    x0, noise, last = torch.randn(1, 2), torch.randn(1, 2), torch.tensor([999])
    torch.testing.assert_close(process.corrupt(x0, noise, last), noise)
    torch.testing.assert_close(process.predict_x0(process.target(x0, noise, last), noise, last), x0)


def test_unknown_prediction_type_and_scheduler_are_refused():
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample"):
        VariancePreserving(torch.tensor([0.9, 0.5]), "flow")
    with pytest.raises(TypeError, match="object is neither"):
        noise_process(object())


def test_half_precision_latents_are_corrupted_in_float32():
    process = noise_process(scheduler("epsilon"))
    x = torch.randn(2, 3).bfloat16()
    assert process.corrupt(x, x, torch.tensor([3, 4])).dtype == torch.float32


def test_a_multistep_solver_set_to_flows_is_a_flow():
    for kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        process = noise_process(kind(prediction_type="flow_prediction", use_flow_sigmas=True))
        assert isinstance(process, RectifiedFlow)
        assert process.num_train_timesteps == 1000
        assert isinstance(noise_process(kind()), VariancePreserving)


def test_the_continuous_process_keeps_the_variance_and_inverts(sample):
    x0, noise, _ = sample
    process = ContinuousVariancePreserving()
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    alpha, sigma = process.alpha_sigma(t)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(5))
    x_t = process.corrupt(x0, noise, t)
    torch.testing.assert_close(x_t[0], x0[0])
    torch.testing.assert_close(x_t[4], noise[4])
    # v is the velocity of the angle, pi t / 2
    step = 1e-3
    velocity = (process.corrupt(x0, noise, t + step) - process.corrupt(x0, noise, t - step)) / (torch.pi * step)
    target = process.target(x0, noise, t)
    torch.testing.assert_close(target, velocity, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(process.predict_x0(target, x_t, t), x0, rtol=1e-5, atol=1e-5)


def test_the_continuous_process_s_elbo_weight_is_half_the_fall_of_the_snr():
    process = ContinuousVariancePreserving()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    snr = 1 / torch.tan(torch.pi / 2 * t) ** 2
    (slope,) = torch.autograd.grad(snr.sum(), t)
    torch.testing.assert_close(process.elbo_weight(t.detach()).double(), -slope / 2, rtol=1e-4, atol=1e-6)
    drawn = process.sample_timesteps(20000, torch.Generator().manual_seed(0))
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    assert drawn.std().item() == pytest.approx(12**-0.5, abs=0.01)

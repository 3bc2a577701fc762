import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from trl_diffusion_pref.diffusion.noise import (
    TIMESTEP_SAMPLINGS,
    ContinuousVariancePreserving,
    RectifiedFlow,
    VariancePreserving,
    noise_process,
)


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


def logit_normal_cdf(t: float) -> float:
    return (1 + math.erf(math.log(t / (1 - t)) / math.sqrt(2))) / 2


def mode_cdf(t: float) -> float:
    """The measure of all u in [0, 1] that the mode's formula maps to t or less, on a fine grid."""
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    return float((1 - u - 1.29 * (np.cos(np.pi * u / 2) ** 2 - 1 + u) <= t).mean())


CDFS = {"logit_normal": logit_normal_cdf, "uniform": lambda t: t, "mode": mode_cdf}


class TestFlowTimes:
    @pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
    @pytest.mark.parametrize("sampling", TIMESTEP_SAMPLINGS)
    def test_drawn_times_have_the_distribution_of_their_formula_through_the_shift(self, sampling, shift):
        process = RectifiedFlow(timestep_sampling=sampling, shift=shift)
        drawn = process.sample_timesteps(100_000, torch.Generator().manual_seed(0))
        assert drawn.dtype == torch.float32 and drawn.min() >= 0 and drawn.max() <= 1
        for t in np.linspace(0.02, 0.98, 25):
            before_shift = t / (shift - (shift - 1) * t)
            # the Kolmogorov-Smirnov statistic of 100,000 draws is above this with probability 1e-6
            assert (drawn <= t).float().mean().item() == pytest.approx(CDFS[sampling](before_shift), abs=0.0086)

    def test_the_mode_has_most_times_in_the_middle_and_more_at_both_ends_than_the_logit_normal(self):
        density = {name: [cdf(t + 0.01) - cdf(t) for t in (0.001, 0.495, 0.98)] for name, cdf in CDFS.items()}
        assert density["mode"][1] > density["uniform"][1]
        assert density["mode"][0] > 10 * density["logit_normal"][0]
        assert density["mode"][2] > 10 * density["logit_normal"][2]

    def test_the_default_is_the_scheduler_s_shift_of_logit_normal_times(self):
        process = noise_process(FlowMatchEulerDiscreteScheduler(shift=3.0))
        assert (process.timestep_sampling, process.shift, process.shift_terminal) == ("logit_normal", 3.0, 0.0)
        # the median, 1/2, goes to 3/4
        drawn = process.sample_timesteps(20_000, torch.Generator().manual_seed(0))
        assert drawn.median().item() == pytest.approx(0.75, abs=0.01)

    def test_times_with_a_terminal_begin_there(self):
        process = RectifiedFlow(timestep_sampling="uniform", shift_terminal=0.02)
        drawn = process.sample_timesteps(20_000, torch.Generator().manual_seed(0))
        plain = RectifiedFlow(timestep_sampling="uniform").sample_timesteps(20_000, torch.Generator().manual_seed(0))
        torch.testing.assert_close(drawn, 1 - 0.98 * (1 - plain))
        assert drawn.min() >= 0.02

    def test_options_replace_what_the_scheduler_says(self):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1)
        process = noise_process(scheduler, timestep_sampling="mode", timestep_shift=1.0)
        assert (process.timestep_sampling, process.shift, process.shift_terminal) == ("mode", 1.0, 0.0)
        dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        assert noise_process(dynamic, timestep_shift=2.0).shift == 2.0

    def test_quantiles_of_the_elbo_and_later_times_are_not_shifted(self):
        plain, shifted = RectifiedFlow(), RectifiedFlow(shift=3.0, shift_terminal=0.1)
        uniform = torch.linspace(0, 0.99, 50)
        assert torch.equal(shifted.times_at(uniform), plain.times_at(uniform))
        t = torch.full((50,), 0.3)
        assert torch.equal(shifted.sample_later(t, uniform), plain.sample_later(t, uniform))

    def test_processes_are_told_apart_by_their_times_only_where_training_times_matter(self):
        processes = [
            RectifiedFlow(),
            RectifiedFlow(timestep_sampling="mode"),
            RectifiedFlow(shift=3.0),
            RectifiedFlow(shift_terminal=0.02),
        ]
        assert len({process.describe() for process in processes}) == 1
        assert len({process.describe(training_times=True) for process in processes}) == 4
        process = noise_process(scheduler("epsilon"))
        assert process.describe(training_times=True) == process.describe()

    def test_the_model_s_time_leads_back(self):
        t = torch.rand(100, generator=torch.Generator().manual_seed(0))
        process = RectifiedFlow()
        torch.testing.assert_close(process.time_fraction(process.model_time(t)), t, rtol=1e-6, atol=0)


class TestFlowShift:
    """Against the sigmas that diffusers' schedulers make of equal steps from 1, 0 appended."""

    STEPS = 8

    def grid(self) -> list[float]:
        return np.linspace(1.0, 1 / self.STEPS, self.STEPS).tolist()

    @pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_a_constant_shift(self, kind, shift):
        times = noise_process(kind(shift=shift)).solver_times(self.STEPS)
        reference = FlowMatchEulerDiscreteScheduler(shift=shift)
        reference.set_timesteps(sigmas=self.grid())
        torch.testing.assert_close(times.flip(0), reference.sigmas)

    def test_a_shift_that_was_set_on_the_scheduler(self):
        """`set_shift` leaves the config as it was."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_shift(7.0)
        assert noise_process(scheduler).shift == 7.0

    # Flux.1-dev's, and Qwen-Image's, which ends at 0.02
    @pytest.mark.parametrize(
        "options", [{}, {"max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}], ids=["flux", "qwen"]
    )
    @pytest.mark.parametrize("kind", ["exponential", "linear"])
    @pytest.mark.parametrize("tokens", [256, 1024, 4096])
    def test_a_shift_by_the_image_s_size(self, tokens, kind, options):
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        reference = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, **options)
        config = reference.config
        mu = calculate_shift(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        reference.set_timesteps(sigmas=self.grid(), mu=mu)
        times = noise_process(reference, image_tokens=tokens).solver_times(self.STEPS)
        torch.testing.assert_close(times.flip(0), reference.sigmas)
        assert times[0] == 0.0 and times[-1] == 1.0

    @pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
    @pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
    def test_the_flow_shift_of_multistep_solvers(self, kind, shift):
        reference = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        reference.set_timesteps(self.STEPS)
        times = noise_process(reference).solver_times(self.STEPS)
        # They begin, or end their equal steps, 1/1000 from where ours do, which the shift multiplies.
        torch.testing.assert_close(times.flip(0), reference.sigmas.float(), rtol=0, atol=1.1e-3 * shift)

    def test_a_grid_of_one_step_goes_from_noise_to_the_end(self):
        process = RectifiedFlow(shift=3.0, shift_terminal=0.02)
        assert process.solver_times(1).tolist() == [0.0, 1.0]
        with pytest.raises(ValueError, match="0 solver steps"):
            process.solver_times(0)

    def test_without_the_image_s_size_only_what_needs_no_shift_can_be_done(self):
        process = noise_process(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
        assert process.times_at(torch.tensor([0.5])).tolist() == [0.5]
        for needs_it in (
            lambda: process.sample_timesteps(2, torch.Generator()),
            lambda: process.solver_times(4),
        ):
            with pytest.raises(ValueError, match="use_dynamic_shifting.*image_tokens"):
                needs_it()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"timestep_sampling": "cosmap"}, "'cosmap' is none of logit_normal, uniform, mode"),
            ({"shift": 0.0}, "shift=0.0: it must be positive"),
            ({"shift_terminal": 1.0}, "shift_terminal=1.0 is outside"),
        ],
    )
    def test_values_out_of_range_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            RectifiedFlow(**options)

    @pytest.mark.parametrize("options", [{"timestep_sampling": "uniform"}, {"timestep_shift": 1.0}], ids=str)
    def test_variance_preserving_processes_refuse_a_flow_s_options(self, options):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name}=.*DDPMScheduler.*whose training times are uniform"):
            noise_process(scheduler("epsilon"), **options)


@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_schedulers_of_edm_models_are_refused_as_what_they_are(kind):
    with pytest.raises(TypeError, match=f"{kind.__name__} is of a model that is trained as EDM"):
        noise_process(kind())

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from trl_diffusion_pref.algorithms.self_npo import loss as module
from trl_diffusion_pref.algorithms.self_npo.loss import SelfNPOOptions
from trl_diffusion_pref.diffusion.noise import RectifiedFlow, VariancePreserving
from trl_diffusion_pref.diffusion.trajectories import advance, clean_estimate, combine_guidance, solver_step


VECTORS = json.loads((Path(__file__).parents[1] / "reference" / "self_npo_vectors.json").read_text())
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
SHAPE = (3, 2, 2, 2)
COUNT = torch.arange(24, dtype=torch.float64)


def self_npo_loss(predicted: torch.Tensor, target: torch.Tensor, **options) -> torch.Tensor:
    """The loss with the released code's options, unless others are given."""
    options = {"loss_type": "huber", "huber_c": 1e-3} | options
    return module.self_npo_loss(predicted, target, SelfNPOOptions(**options))


def process() -> VariancePreserving:
    return VariancePreserving(torch.cumprod(1 - BETAS, dim=0))


def authors_teacher(guidance_scale: float):
    """The closed-form network of the vectors, with guidance."""

    def predict(x_t, t, rows):
        common = 0.6 * x_t + 0.1 * t.reshape(-1, 1, 1, 1) / 1000
        return combine_guidance(common + 0.10, common - 0.05, guidance_scale)

    return predict


@pytest.mark.parametrize("name", VECTORS["cases"])
def test_one_training_step_equals_the_released_code_s(name):
    case = VECTORS["cases"][name]
    vp = process()
    latents = (0.8 * torch.sin(0.5 * COUNT)).float().reshape(SHAPE)
    start_noise = torch.cos(0.9 * COUNT).float().reshape(SHAPE)
    forward_noise = torch.sin(1.3 * COUNT + 0.2).float().reshape(SHAPE)
    times = vp.solver_times(25)
    assert times[1:].tolist() == list(range(39, 1000, 40))
    start = torch.tensor([2, 7, 24]) + 1
    x = vp.corrupt(latents, start_noise, times[start])
    teacher = authors_teacher(case["w"] + 1)
    x_t, position = advance(teacher, vp, times, x, start, torch.full((3,), 5))
    t_end = times[position]
    assert t_end.tolist() == [0, 119, 799]
    target = clean_estimate(teacher, vp, x_t, t_end)
    s = torch.tensor([100, 419, 949])
    x_s = vp.renoise(x_t, forward_noise, t_end, s)
    theta = torch.zeros(3, 2, 2, 2, requires_grad=True)
    student = 0.5 * x_s + 0.2 * s.reshape(-1, 1, 1, 1) / 1000 + 0.10 + theta
    loss = self_npo_loss(vp.predict_x0(student, x_s, s), target, loss_type=case["loss_type"], huber_c=1e-3).mean()
    loss.backward()

    def row_sums(tensor):
        return tensor.flatten(1).sum(dim=1)

    def check(ours, theirs):
        # The vectors are printed to six decimals.
        torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-5, atol=1e-6)

    check(row_sums(x), VECTORS["intermediate"]["x at t0 row sums"])
    check(row_sums(x_t), case["x_t row sums"])
    check(row_sums(target), case["x0 target row sums"])
    check(row_sums(x_s), case["x_s row sums"])
    check(loss.detach(), case["loss"])
    check(theta.grad.norm(), case["grad_norm_theta"])


def scheduler_of(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        trained_betas=BETAS.numpy(),
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def network(x, t):
    """Any smooth function of latents and time."""
    return torch.sin(3 * x) + 0.5 * x + t.reshape(-1, 1, 1, 1) * 0.3


def random_latents(seed: int = 0, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_step_is_that_of_diffusers_ddim(prediction_type):
    scheduler = scheduler_of(prediction_type)
    scheduler.set_timesteps(25)
    vp = VariancePreserving(scheduler.alphas_cumprod, prediction_type)
    x = random_latents()
    # diffusers' own grid, trailing, from 999 down by 40
    assert scheduler.timesteps.tolist() == vp.solver_times(25)[1:].flip(0).tolist()
    for later, earlier in ((999, 959), (519, 479), (79, 39)):
        prediction = network(x, torch.full((3,), later / 1000))
        expected = scheduler.step(prediction, later, x).prev_sample
        ours = solver_step(vp, prediction, x, torch.full((3,), later), torch.full((3,), earlier))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_step_on_a_rectified_flow_is_that_of_diffusers_euler():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.2])
    x, prediction = random_latents(), random_latents(1)
    expected = scheduler.step(prediction, scheduler.timesteps[0], x).prev_sample
    ours = solver_step(RectifiedFlow(), prediction, x, torch.ones(3), torch.full((3,), 0.6))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("rounds", [None, 4])
def test_rows_advance_by_their_own_steps_and_stop_at_the_end(flow, rounds):
    noise_process = RectifiedFlow() if flow else process()
    times = noise_process.solver_times(10)
    calls = []

    def predict(x_t, t, rows):
        calls.append(rows.tolist())
        return network(x_t, t.float() if flow else t / 1000)

    x, start, steps = random_latents(rows=4), torch.tensor([10, 4, 2, 0]), torch.tensor([3, 1, 5, 5])
    moved, position = advance(predict, noise_process, times, x, start, steps, rounds=rounds)
    assert position.tolist() == [7, 3, 0, 0]
    for row in range(4):
        expected = x[row : row + 1]
        for place in range(int(start[row]), int(position[row]), -1):
            t, earlier = times[place : place + 1], times[place - 1 : place]
            prediction = network(expected, t.float() if flow else t / 1000)
            expected = solver_step(noise_process, prediction, expected, t, earlier)
        torch.testing.assert_close(moved[row : row + 1], expected, rtol=1e-5, atol=1e-5)
    # With rounds, all processes call the model equally often, whatever their rows' steps.
    assert calls == ([[0, 1, 2, 3]] * 4 if rounds else [[0, 1, 2], [0, 2], [0]])


def test_advancing_in_parts_is_advancing_at_once():
    vp = process()
    times = vp.solver_times(25)

    def predict(x_t, t, rows):
        return network(x_t, t / 1000)

    x, start = random_latents(), torch.full((3,), 25)
    once, place = advance(predict, vp, times, x, start, torch.full((3,), 12))
    first, middle = advance(predict, vp, times, x, start, torch.full((3,), 5))
    parts, end = advance(predict, vp, times, first, middle, torch.full((3,), 7))
    assert torch.equal(once, parts) and torch.equal(place, end)


@pytest.mark.parametrize("flow", [False, True])
def test_clean_estimate_of_the_true_noise_is_the_clean_latents(flow):
    noise_process = RectifiedFlow() if flow else process()
    t = torch.tensor([0.0, 0.5, 1.0] if flow else [0, 500, 999])
    x0, noise = random_latents(), random_latents(1)
    x_t = noise_process.corrupt(x0, noise, t)
    ours = clean_estimate(lambda x, t, rows: noise_process.target(x0, noise, t), noise_process, x_t, t)
    torch.testing.assert_close(ours, x0, rtol=1e-4, atol=1e-4)


def test_guidance_is_linear_and_the_same_in_noise_and_in_clean_latents():
    vp, x_t, t = process(), random_latents(2), torch.tensor([100, 500, 900])
    conditional, unconditional = random_latents(), random_latents(1)
    assert torch.equal(combine_guidance(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(combine_guidance(conditional, unconditional, 1.0), conditional)
    combined = vp.predict_x0(combine_guidance(conditional, unconditional, -4.0), x_t, t)
    # the released code's form, w = -5
    c, u = vp.predict_x0(conditional, x_t, t), vp.predict_x0(unconditional, x_t, t)
    torch.testing.assert_close(combined, c + -5 * (c - u), rtol=1e-4, atol=1e-4)


class TestTimes:
    def test_later_times_are_uniform_over_what_is_later(self):
        vp, flow = process(), RectifiedFlow()
        uniform = torch.linspace(0, 1 - 2**-24, 10_000)
        for t in (0, 119, 998):
            later = vp.sample_later(torch.full((10_000,), t), uniform)
            counts = torch.bincount(later)
            assert later.min() == t + 1 and later.max() == 999
            assert (counts[t + 1 :] - 10_000 / (999 - t)).abs().max() <= 1
        for t in (0.0, 0.3, 0.8):
            later = flow.sample_later(torch.full((10_000,), t), uniform)
            assert later.min() >= torch.tensor(t) and later.max() == 1.0
            assert later.mean().item() == pytest.approx((1 + t) / 2, abs=1e-4)

    def test_solver_times_of_other_grids(self):
        assert process().solver_times(3).tolist() == [0, 332, 666, 999]
        assert process().solver_times(1000).tolist() == [0, *range(1000)]
        torch.testing.assert_close(RectifiedFlow().solver_times(4), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))

    @pytest.mark.parametrize("steps", [0, 1001])
    def test_impossible_grids_are_refused(self, steps):
        with pytest.raises(ValueError, match=f"{steps} solver steps"):
            process().solver_times(steps)


class TestLoss:
    @pytest.mark.parametrize("loss_type", ["huber", "l2"])
    def test_it_equals_float64(self, loss_type):
        predicted, target = random_latents(3), random_latents(4)
        difference = predicted.double() - target.double()
        squared = difference.square()
        values = (squared + 0.01**2).sqrt() - 0.01 if loss_type == "huber" else squared
        ours = self_npo_loss(predicted, target, loss_type=loss_type, huber_c=0.01)
        torch.testing.assert_close(ours.double(), values.mean(dim=(1, 2, 3)), rtol=1e-5, atol=1e-7)
        assert ours.dtype == torch.float32

    def test_half_precision_inputs_are_taken_in_float32(self):
        predicted, target = random_latents(3).bfloat16(), random_latents(4).bfloat16()
        torch.testing.assert_close(
            self_npo_loss(predicted, target), self_npo_loss(predicted.float(), target.float()), rtol=0, atol=0
        )

    def test_the_target_gets_no_gradient(self):
        predicted, target = random_latents(3).requires_grad_(), random_latents(4).requires_grad_()
        self_npo_loss(predicted, target).sum().backward()
        assert target.grad is None and predicted.grad.abs().max() > 0

    def test_bad_options_and_shapes_are_refused(self):
        x = random_latents()
        for options, message in (({"loss_type": "l1"}, "none of huber, l2"), ({"huber_c": 0.0}, "must be positive")):
            with pytest.raises(ValueError, match=message):
                self_npo_loss(x, x, **options)
        with pytest.raises(ValueError, match="has shape"):
            self_npo_loss(x, x[:1])

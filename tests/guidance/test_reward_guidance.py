"""Sampling towards a reward in every kind of pipeline: which call it sees, and what it adds to the prediction."""

import functools
import inspect
import math

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)
from guidance.test_all_pipelines import PROMPTS, sample
from helpers import tiny
from torch.utils._pytree import tree_leaves

from trl_diffusion_pref.evaluation.model_record import model_record
from trl_diffusion_pref.guidance import negative_guidance, reward_guidance
from trl_diffusion_pref.guidance.sources import denoiser_name


SCALE = 3.0
# One of each way of calling the denoiser, of each layout of latents and of each prediction; the others are slow tests.
KINDS = ("stable_diffusion", "stable_diffusion_zero_terminal_snr", "instruct_pix2pix", "stable_diffusion_xl_inpaint")
KINDS += ("stable_diffusion_3", "flux_dev", "flux_fill", "qwen_image_edit", "z_image", "cogvideox", "ltx", "wan")
KINDS += ("stable_audio", "ace_step")
ALL = [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in tiny.CASES]


def total(inputs):
    return inputs.x_t.float().flatten(1).sum(dim=1)


def towards_zero(inputs):
    return -inputs.x_t.float().square().flatten(1).mean(dim=1)


def steps_of(pipeline, name, scale):
    """What the scheduler is given at each step of a call, prediction, sample and timestep; and the call's result."""
    found, step = [], pipeline.scheduler.step

    @functools.wraps(step)
    def record(*args, **kwargs):
        values = inspect.signature(step).bind(*args, **kwargs).arguments
        found.append([torch.as_tensor(values[key]).clone() for key in ("model_output", "sample", "timestep")])
        return step(*args, **kwargs)

    pipeline.scheduler.step = record
    result = sample(pipeline, name, scale)
    assert pipeline.scheduler.step is record
    del pipeline.scheduler.step
    return found, result


def first_difference(plain, guided):
    """The sample, timestep and change of the prediction at the first step at which it changed."""
    for (before, x_t, timestep), (after, same, _) in zip(plain, guided, strict=True):
        assert torch.equal(x_t, same)
        if before.ne(after).any():
            return x_t, float(timestep), after - before
    raise AssertionError("no prediction changed")


@pytest.mark.parametrize("name", ALL)
def test_each_pipeline_follows_the_reward_of_the_call_on_the_prompt(name):
    """By v - s t / (1 - t) g for flows, eps - s sigma g, v - s sigma / alpha g for predictions of v."""
    pipeline, kind = tiny.build(name), tiny.CASES[name].prediction_type
    scale, slope, seen = SCALE if name not in tiny.WITHOUT_GUIDANCE else 1.0, 0.7, []

    def look(inputs):
        seen.append(inputs)
        with torch.no_grad():
            inputs.run(inputs.denoiser)
        return {"nothing": 0 * total(inputs), "slope": slope * total(inputs)}

    plain, result = steps_of(pipeline, name, scale)
    with reward_guidance(pipeline, look, scale=0.0):
        assert torch.equal(sample(pipeline, name, scale), result)
    with reward_guidance(pipeline, look, weights={"slope": 0.0}):
        assert torch.equal(sample(pipeline, name, scale), result)
    assert not seen
    with reward_guidance(pipeline, look, weights={"nothing": 1.0}):
        assert torch.equal(sample(pipeline, name, scale), result)
        with_guidance = list(seen)
        seen.clear()
        # Without guidance there is the prompt's side alone.
        sample(pipeline, name, 1.0)
    assert len(with_guidance[0].x_t) == (1 if tiny.CASES[name].one_prompt else len(PROMPTS))
    for one, other in zip(with_guidance, seen, strict=True):
        torch.testing.assert_close(tree_leaves(one.conditioning), tree_leaves(other.conditioning), rtol=0, atol=1e-5)

    with reward_guidance(pipeline, look, weights={"slope": 1.0, "nothing": 5.0}, scale=0.5):
        guided, _ = steps_of(pipeline, name, scale)
    _, timestep, change = first_difference(plain, guided)
    if kind is None:
        # CogView 4's pipeline shifts these and leaves the timesteps.
        time = float(pipeline.scheduler.sigmas[pipeline.scheduler.timesteps.tolist().index(timestep)])
        factor = time / (1 - time)
    elif name == "stable_audio":
        factor = math.tan(timestep * math.pi / 2)
    else:
        signal = float(pipeline.scheduler.alphas_cumprod[int(timestep)])
        factor = math.sqrt(1 - signal) / (1.0 if kind == "epsilon" else math.sqrt(signal))
    torch.testing.assert_close(change, torch.full_like(change, -0.5 * slope * factor), rtol=1e-3, atol=1e-4)
    assert torch.equal(sample(pipeline, name, scale), result)
    assert not hasattr(getattr(pipeline, denoiser_name(pipeline)), "_reward_guidance")


@pytest.mark.parametrize("name", ["stable_diffusion", "flux_dev"])
def test_the_gradient_is_the_finite_difference_and_its_step_raises_r(name):
    """Of a reward that runs the denoiser."""
    pipeline, seen = tiny.build(name), []
    denoiser, scale = getattr(pipeline, denoiser_name(pipeline)), 1e-3

    def rated(prediction):
        return (3 * prediction).tanh().flatten(1).cumsum(dim=1).mean(dim=1)

    def reward(inputs):
        seen.append(inputs)
        return rated(inputs.run(denoiser)[0])

    def rated_at(x_t):
        with torch.no_grad():
            return rated(denoiser(x_t, **seen[0].conditioning)[0])

    plain, result = steps_of(pipeline, name, 1.0)
    with reward_guidance(pipeline, reward, scale=scale):
        guided, guided_result = steps_of(pipeline, name, 1.0)
    x_t, timestep, change = first_difference(plain, guided)
    if name == "flux_dev":
        factor = timestep / 1000 / (1 - timestep / 1000)
        step = guided_result - result
    else:
        factor = math.sqrt(1 - float(pipeline.scheduler.alphas_cumprod[int(timestep)]))
        step = guided[1][1] - plain[1][1]
    gradient = -change / (scale * factor)
    size = gradient.flatten(1).norm(dim=1)
    direction = gradient / size.reshape(-1, *[1] * (gradient.ndim - 1))
    slope = (rated_at(x_t + 1e-2 * direction) - rated_at(x_t - 1e-2 * direction)) / 2e-2
    torch.testing.assert_close(slope, size, rtol=1e-2, atol=0)
    assert (rated_at(x_t + step) > rated_at(x_t)).all()


@pytest.mark.parametrize(
    ("name", "scheduler", "steps"),
    [
        ("stable_diffusion", EulerDiscreteScheduler, 2),
        ("stable_diffusion", HeunDiscreteScheduler, 3),
        ("stable_diffusion", DPMSolverMultistepScheduler, 2),
        ("stable_diffusion_3", FlowMatchHeunDiscreteScheduler, 3),
    ],
)
def test_solvers_of_other_scales_and_orders_are_guided_at_each_call(name, scheduler, steps):
    pipeline = tiny.build(name)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    plain, _ = steps_of(pipeline, name, SCALE)
    calls = []
    with reward_guidance(pipeline, lambda inputs: calls.append(1) or total(inputs), scale=0.5):
        guided, _ = steps_of(pipeline, name, SCALE)
    assert len(guided) == len(plain) == steps
    _, timestep, change = first_difference(plain, guided)
    if name == "stable_diffusion":
        # The gradient is with respect to x_t of variance 1, also where the solver's samples are larger.
        signal = float(pipeline.scheduler.alphas_cumprod[int(timestep)])
        factor, skipped = math.sqrt(1 - signal), 0
    else:
        factor, skipped = timestep / (1000 - timestep), 1
    assert len(calls) == steps - skipped
    torch.testing.assert_close(change, torch.full_like(change, -0.5 * factor), rtol=1e-3, atol=1e-4)


def test_negative_guidance_and_a_reward_act_together():
    pipeline, other = tiny.build("stable_diffusion_3"), tiny.build("stable_diffusion_3", seed=1)
    # The random weights' own predictions are small.
    other.transformer.proj_out.weight.data *= 100
    plain = sample(pipeline, "stable_diffusion_3", SCALE)
    with reward_guidance(pipeline, towards_zero, scale=30.0):
        rewarded = sample(pipeline, "stable_diffusion_3", SCALE)
    # Its own weights as negative are the plain unconditional side.
    for negative, expected in ((tiny.build("stable_diffusion_3").transformer, rewarded), (other.transformer, None)):
        with negative_guidance(pipeline, negative):
            alone = sample(pipeline, "stable_diffusion_3", SCALE)
            with reward_guidance(pipeline, towards_zero, scale=30.0):
                both = sample(pipeline, "stable_diffusion_3", SCALE)
            assert torch.equal(sample(pipeline, "stable_diffusion_3", SCALE), alone)
        if expected is not None:
            torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(sample(pipeline, "stable_diffusion_3", SCALE), plain)
    assert min((both - one).abs().max() for one in (alone, rewarded)) > 1e-3


@pytest.fixture(scope="module")
def pipeline():
    return tiny.build("stable_diffusion")


class TestBadInput:
    @pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
    def test_weights_and_scales_out_of_range_raise(self, pipeline, value):
        with (
            pytest.raises(ValueError, match=r"weights\['a'\]"),
            reward_guidance(pipeline, total, weights={"a": value}),
        ):
            pass
        with pytest.raises(ValueError, match="scale="), reward_guidance(pipeline, total, scale=value):
            pass

    def test_a_weight_of_an_objective_that_the_reward_lacks_raises(self, pipeline):
        with (
            pytest.raises(ValueError, match="weights names 'b', and the reward has 'a'"),
            reward_guidance(pipeline, lambda inputs: {"a": total(inputs)}, weights={"b": 1.0}),
        ):
            sample(pipeline, "stable_diffusion", SCALE)

    @pytest.mark.parametrize(
        ("reward", "message"),
        [
            (lambda inputs: total(inputs) * torch.where(inputs.time < 0.5, math.nan, 1.0), "step 2 of 2 .timestep"),
            (lambda inputs: total(inputs)[:1], r"shape \(1,\); it must be \(2,\)"),
            (lambda inputs: inputs.time, "no gradient"),
        ],
        ids=["not finite", "shape", "constant"],
    )
    def test_a_reward_without_a_gradient_raises_and_changes_nothing(self, pipeline, reward, message):
        plain = sample(pipeline, "stable_diffusion", SCALE)
        with pytest.raises(ValueError, match=message), reward_guidance(pipeline, reward):
            sample(pipeline, "stable_diffusion", SCALE)
        assert torch.equal(sample(pipeline, "stable_diffusion", SCALE), plain)

    def test_pipelines_that_cannot_be_guided_raise(self, pipeline):
        with pytest.raises(ValueError, match="not known how a AutoencoderKL"), reward_guidance(AutoencoderKL(), total):
            pass
        with (
            reward_guidance(pipeline, total),
            pytest.raises(ValueError, match="already"),
            reward_guidance(pipeline, total),
        ):
            pass

    def test_other_latents_for_the_denoiser_than_the_scheduler_raise(self, pipeline, monkeypatch):
        original = type(pipeline.scheduler).scale_model_input
        monkeypatch.setattr(
            type(pipeline.scheduler), "scale_model_input", lambda self, x, t: original(self, x, t).flip(-1)
        )
        with pytest.raises(RuntimeError, match="not called on the latents"), reward_guidance(pipeline, total):
            sample(pipeline, "stable_diffusion", SCALE)

    def test_a_pipeline_that_never_steps_its_scheduler_raises(self, pipeline):
        def stop(*args):
            raise StopIteration

        with pytest.raises(RuntimeError, match="never its scheduler's step"), reward_guidance(pipeline, total):
            hook = pipeline.unet.register_forward_hook(stop)
            with pytest.raises(StopIteration):
                sample(pipeline, "stable_diffusion", SCALE)
            hook.remove()

    def test_a_call_after_one_that_failed_is_guided_as_the_first(self, pipeline):
        def fail(*args):
            hook.remove()
            raise OSError

        plain = sample(pipeline, "stable_diffusion", SCALE)
        with reward_guidance(pipeline, towards_zero, scale=1000.0):
            expected = sample(pipeline, "stable_diffusion", SCALE)
            assert expected.ne(plain).any()
            hook = pipeline.unet.register_forward_hook(fail)
            with pytest.raises(OSError):
                sample(pipeline, "stable_diffusion", SCALE)
            assert torch.equal(sample(pipeline, "stable_diffusion", SCALE), expected)

    def test_stored_samples_cannot_be_told_by_a_function(self, pipeline):
        with reward_guidance(pipeline, total), pytest.raises(ValueError, match="Sample without output"):
            model_record(pipeline)

import torch
from diffusers import DDPMScheduler

from trl_diffusion_pref.diffusion.noise import RectifiedFlow, noise_process
from trl_diffusion_pref.diffusion.randomness import EVALUATION, TRAINING, draw_rows, generator_for


SHAPE = (3, 5, 2)


def draws(keys, process=None):
    return draw_rows(keys, SHAPE, 2, process or noise_process(DDPMScheduler()), torch.device("cpu"))


def test_draws_do_not_depend_on_the_batch():
    keys = [(0, TRAINING, 0, 4, position) for position in range(4)]
    together, alone = draws(keys), [draws([key]) for key in keys]
    assert torch.equal(together.noise, torch.cat([one.noise for one in alone]))
    assert torch.equal(together.timesteps, torch.cat([one.timesteps for one in alone]))
    assert torch.equal(together.posterior_noise[1], torch.cat([one.posterior_noise[1] for one in alone]))


def test_samples_with_noise_of_their_own_change_no_other_number():
    keys, process = [(0, TRAINING, 0, 4, position) for position in range(2)], noise_process(DDPMScheduler())
    shared = draw_rows(keys, SHAPE, 3, process, torch.device("cpu"))
    own = draw_rows(keys, SHAPE, 3, process, torch.device("cpu"), own_noise=True)
    for name in ("timesteps", "noise", "posterior_noise", "uniform"):
        assert torch.equal(getattr(own, name), getattr(shared, name))
    assert shared.other_noise is None and own.other_noise.shape == (2, 2, *SHAPE)
    assert len({noise.numpy().tobytes() for noise in [*own.noise, *own.other_noise.flatten(0, 1)]}) == 6


def test_every_part_of_the_key_matters():
    keys = [(0, TRAINING, 0, 0, 0), (1, TRAINING, 0, 0, 0), (0, EVALUATION, 0, 0, 0), (0, TRAINING, 1, 0, 0)]
    keys += [(0, TRAINING, 0, 1, 0), (0, TRAINING, 0, 0, 1), (0, TRAINING, 0)]
    noise = draws(keys).noise.flatten(1)
    correlation = torch.corrcoef(torch.stack([torch.randn(10000, generator=generator_for(*key)) for key in keys]))
    assert len({row.numpy().tobytes() for row in noise}) == len(keys)
    # independent series of 10,000 correlate within 4 / sqrt(10,000)
    assert (correlation - torch.eye(len(keys))).abs().max() < 0.04


def test_noise_is_standard_normal_and_independent_of_the_posterior_s():
    drawn = draws([(3, TRAINING, 0, 0, position) for position in range(2000)])
    flat = torch.stack([drawn.noise.flatten(), *(noise.flatten() for noise in drawn.posterior_noise)])
    assert flat.mean(dim=1).abs().max() < 0.02
    assert (flat.std(dim=1) - 1).abs().max() < 0.02
    assert (torch.corrcoef(flat) - torch.eye(3)).abs().max() < 0.02
    # 2,000 uniform draws: standard errors 6.5 timesteps and 0.0065
    assert abs(drawn.timesteps.float().mean().item() - 499.5) < 26
    assert abs(drawn.uniform.mean().item() - 0.5) < 0.026


def test_flow_times_are_floats_in_the_unit_interval():
    drawn = draws([(0, TRAINING, 0, 0, position) for position in range(8)], RectifiedFlow())
    assert drawn.timesteps.dtype == torch.float32
    assert 0 < drawn.timesteps.min() and drawn.timesteps.max() < 1


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws([(0, TRAINING, 0, 0, 0)])
    assert torch.equal(torch.get_rng_state(), before)

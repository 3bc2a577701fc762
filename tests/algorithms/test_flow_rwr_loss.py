import math

import pytest
import torch
from helpers.vectors import VECTORS, set_a, set_c

from trl_diffusion_pref.algorithms.flow_rwr.loss import (
    RewardWeighting,
    constant_groups,
    effective_share,
    reward_weights,
    rwr_loss,
)
from trl_diffusion_pref.diffusion.elbo import denoising_error


# Found from the file's gradients, which determine the four weights; they are e^r, k softmax(r) and r of these.
REWARDS = torch.tensor([0.5, -1.0, 0.2, 1.5], dtype=torch.float64)
ONE_GROUP = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("letter", ["A", "C"])
@pytest.mark.parametrize(
    ("name", "weighting"),
    [("Flow-RWR eq.9", "exp"), ("Flow-RWR softmax-in-group", "softmax"), ("Flow-RWR flow_grpo raw weight", "raw")],
)
def test_loss_and_gradients_are_the_authors(letter, name, weighting):
    expected = next(entry for entry in VECTORS[letter]["values"] if entry["name"].startswith(name))
    prediction, target = set_a() if letter == "A" else set_c()
    prediction.requires_grad_()
    weights = reward_weights(REWARDS, ONE_GROUP, RewardWeighting(weighting))
    loss = rwr_loss(denoising_error(prediction, target), weights).mean()
    loss.backward()
    chosen, rejected = prediction.grad.chunk(2)
    # six decimals are printed in the file
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
    assert prediction.grad.norm().item() == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert chosen.norm().item() == pytest.approx(expected["grad_norm_chosen"], rel=1e-4)
    assert rejected.norm().item() == pytest.approx(expected["grad_norm_rejected"], rel=1e-4)
    assert prediction.grad.reshape(-1)[0].item() == pytest.approx(expected["grad_first"], rel=1e-4)


def test_softmax_weights_have_mean_one_in_each_group():
    rewards = torch.tensor([1.0, 900.0, 2.0, -3.0, 901.0, 7.0], dtype=torch.float64)
    groups = torch.tensor([2, 0, 2, 2, 0, 1])
    found = reward_weights(rewards, groups, RewardWeighting("softmax", temperature=0.5))
    thirds = [math.exp(2 * reward) for reward in (1, 2, -3)]
    pairs = [1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))]
    expected = [3 * thirds[0] / sum(thirds), 2 * pairs[0], 3 * thirds[1] / sum(thirds), 3 * thirds[2] / sum(thirds)]
    torch.testing.assert_close(found, torch.tensor([*expected, 2 * pairs[1], 1.0], dtype=torch.float64))


def test_normalized_rewards_count_in_their_group_s_deviations():
    rewards = torch.tensor([4.0, 1e6, 8.0, 0.1, 0.1, 0.1, 1e6 + 2], dtype=torch.float64)
    groups = torch.tensor([0, 3, 0, 2, 2, 2, 3])
    found = reward_weights(rewards, groups, RewardWeighting("exp", temperature=2.0, normalize_rewards=True))
    # Of equal rewards, whose mean rounds, nothing is left; of two different ones -1 and 1.
    low, high = math.exp(-0.5), math.exp(0.5)
    torch.testing.assert_close(found, torch.tensor([low, low, high, 1.0, 1.0, 1.0, high], dtype=torch.float64))
    assert constant_groups(rewards, groups).tolist() == [False, False, False, True, True, True, False]


@pytest.mark.parametrize("weighting", ["exp", "softmax"])
def test_a_weight_rises_with_the_reward_over_the_temperature(weighting):
    ratios = []
    for temperature in (0.5, 1.0, 4.0):
        weights = reward_weights(REWARDS, ONE_GROUP, RewardWeighting(weighting, temperature))
        ratios.append(float(torch.log(weights[3] / weights[1])) * temperature)
    assert ratios == pytest.approx([2.5, 2.5, 2.5])


def test_equal_rewards_have_softmax_weights_of_exactly_one():
    rewards = torch.full((7,), 0.1, dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    assert reward_weights(rewards, groups, RewardWeighting("softmax", 0.3)).tolist() == [1.0] * 7


def test_the_effective_share_is_that_of_equally_weighted_samples():
    assert effective_share(torch.tensor([2.0, 2.0, 0.0, 0.0, 0.0])) == pytest.approx(0.4)
    assert effective_share(torch.full((3,), 1e200, dtype=torch.float64)) == pytest.approx(1.0)

"""Probabilities and strengths against closed forms, and which samples make pairs."""

import math
import re

import numpy as np
import pytest

from trl_diffusion_pref.preference_data.pairing import (
    check_pairing,
    choose_pairs,
    combined_scores,
    preference_probabilities,
    spread,
    strengths,
    temperatures_of,
)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_probabilities_are_the_mean_over_rewards_of_sigmoids():
    scores, temperatures = {"a": [1.0, 3.0], "b": [0.4, 0.1]}, {"a": 2.0, "b": 0.1}
    [[same, first], [second, _]] = preference_probabilities(scores, temperatures)
    assert first == pytest.approx((sigmoid(-1.0) + sigmoid(3.0)) / 2, abs=1e-15)
    assert (same, second) == (0.5, pytest.approx(1 - first, abs=1e-15))
    assert preference_probabilities({"a": [0.0, 1e5]}, {"a": 1.0})[1, 0] == 1.0


def test_strengths_of_one_reward_are_its_scores_over_the_temperature():
    scores = np.array([3.0, -1.0, 0.5, 0.5, 2.0])
    found = strengths(preference_probabilities({"a": scores}, {"a": 0.7}))
    assert found == pytest.approx((scores - scores.mean()) / 0.7, abs=1e-8)


def test_strengths_of_two_samples_are_half_the_log_odds():
    found = strengths(np.array([[0.5, 0.8], [0.2, 0.5]]))
    assert found == pytest.approx([math.log(4) / 2, -math.log(4) / 2], abs=1e-9)


def test_strengths_win_as_often_as_the_probabilities_say():
    """At the maximum of the Bradley-Terry likelihood the expected wins of each sample are those that it has."""
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=6) * scale for name, scale in (("a", 1.0), ("b", 30.0), ("c", 5.0))}
    wanted = preference_probabilities(scores, dict.fromkeys(scores, 1.0))
    found = strengths(wanted)
    expected = [sum(sigmoid(one - other) for other in found) for one in found]
    assert expected == pytest.approx(wanted.sum(axis=1), abs=1e-8)
    assert found.sum() == pytest.approx(0.0, abs=1e-9)


def test_a_single_reward_keeps_its_own_scores():
    assert combined_scores({"a": [20.0, 19.5]}, {"a": 3.0}) == [20.0, 19.5]
    first, second = combined_scores({"a": [0.0, 1.0], "b": [0.0, 1.0]}, {"a": 1.0, "b": 1.0})
    assert second - first == pytest.approx(1.0, abs=1e-9)


def test_the_default_temperature_is_the_deviation_within_prompts():
    groups = [[1.0, 3.0], [101.0, 103.0], [7.0]]
    assert spread(groups) == pytest.approx(math.sqrt(2))
    assert temperatures_of(None, {"a": groups, "b": [[5.0, 5.0]]}) == {"a": pytest.approx(math.sqrt(2)), "b": 1.0}
    assert temperatures_of(2, {"a": groups}) == {"a": 2.0}


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (0.0, "temperature=0.0 of reward 'a'; it must be positive"),
        ({"a": 1.0, "b": 2.0}, "temperature is given for a, b, but the rewards are a."),
        (math.nan, "temperature=nan"),
    ],
)
def test_temperatures_that_cannot_be_used_are_refused(temperature, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        temperatures_of(temperature, {"a": [[1.0, 2.0]]})


@pytest.mark.parametrize(
    ("options", "pairs", "close", "further"),
    [
        ({"strategy": "best_worst"}, [(1, 2)], 0, 0),
        ({"strategy": "all"}, [(1, 0), (1, 2), (3, 0), (3, 2), (1, 3)], 1, 0),
        ({"strategy": "all", "min_score_difference": 0.3}, [(1, 0), (1, 2)], 4, 0),
        ({"strategy": "all", "most": 2}, [(1, 0), (1, 2)], 1, 3),
        # 0.5 - 0.2 is a little less than 0.3.
        ({"strategy": "best_worst", "min_score_difference": 0.3}, [(1, 2)], 0, 0),
        ({"strategy": "best_worst", "min_score_difference": 0.31}, [], 1, 0),
    ],
)
def test_pairs_are_of_better_and_worse_samples(options, pairs, close, further):
    assert choose_pairs([0.2, 0.5, 0.2, 0.4], **options) == (pairs, close, further)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("best", 0.0, None), "strategy='best' is none of best_worst, all"),
        (("all", -1.0, None), "min_score_difference=-1.0"),
        (("all", math.inf, None), "min_score_difference=inf"),
        (("all", 0.0, 0), "max_pairs_per_prompt=0"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_pairing(*options)

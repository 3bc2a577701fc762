"""The statistics of a comparison: against closed forms, and against a truth known by simulation."""

import json

import numpy as np
import pytest

from trl_diffusion_pref.evaluation.comparison import Comparison, distances_within, estimate, mean_by_prompt


def comparison(base: np.ndarray, tuned: np.ndarray, prompts: list[str] | None = None, **more) -> Comparison:
    scores = {"base": {"score": base}, "tuned": {"score": tuned}}
    prompts = prompts or [f"prompt {index}" for index in range(len(base))]
    seeds = [list(range(base.shape[1]))] * len(base)
    return Comparison(["base", "tuned"], prompts, seeds, "image", scores, **more)


def test_a_model_against_itself_wins_exactly_half():
    scores = np.random.default_rng(0).normal(size=(30, 3))
    found = comparison(scores, scores.copy()).win_rate("tuned", "score")
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_win_rate_and_difference_weigh_prompts_equally():
    base = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    tuned = np.array([[1.0, 1.0, -2.0], [np.nan, np.nan, 0.0]])
    found = comparison(base, tuned)
    # The first prompt wins two of three, the second has one sample left, which is equal.
    assert found.win_rate("tuned", "score").value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found.difference("tuned", "score").value == pytest.approx(0.0)


def test_other_seeds_of_one_model_contain_one_half():
    rng, contained = np.random.default_rng(1), 0
    for _ in range(20):
        level = rng.normal(size=(60, 1))
        found = comparison(*(level + rng.normal(size=(60, 2)) for _ in range(2))).win_rate("tuned", "score")
        contained += found.low <= 0.5 <= found.high
    assert contained >= 17


def test_intervals_cover_a_known_mean_at_the_stated_rate():
    rng, repetitions = np.random.default_rng(2), 150
    # Samples of a prompt share the prompt's level, so that intervals over samples would cover 0 too rarely.
    levels = rng.normal(scale=2.0, size=(repetitions, 50, 1))
    found = [estimate(mean_by_prompt(level + rng.normal(size=(50, 4)))) for level in levels]
    share = np.mean([one.low <= 0 <= one.high for one in found])
    assert 0.95 - 3 * np.sqrt(0.95 * 0.05 / repetitions) < share < 0.99


def test_prompts_that_became_worse_come_in_order_of_loss():
    base, change = np.zeros((4, 1)), np.array([[-1.0], [2.0], [-3.0], [0.0]])
    found = comparison(base, base + change, ["a", "b", "c", "d"])
    assert found.worse("tuned", "score") == [("c", -3.0), ("a", -1.0)]


def test_samples_left_out_are_none_in_json_and_in_no_mean():
    base, tuned = np.array([[1.0, 2.0], [3.0, np.nan]]), np.array([[2.0, np.nan], [5.0, 7.0]])
    stored = json.loads(json.dumps(comparison(base, tuned, blank={"tuned": 1}).as_dict(), allow_nan=False))
    entry = stored["models"]["tuned"]["rewards"]["score"]
    assert entry["scores"] == [[2.0, None], [5.0, 7.0]]
    assert entry["difference"]["value"] == pytest.approx((1.0 + 2.0) / 2)
    assert stored["models"]["tuned"]["blank samples"] == 1


def test_the_section_for_a_card_has_one_row_for_each_model():
    rng = np.random.default_rng(0)
    found = comparison(rng.normal(size=(5, 2)), rng.normal(size=(5, 2)), ["a | b"] * 5, seconds={"base": 1.5})
    lines = found.to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["base", "tuned"]
    assert len({line.count("|") for line in table}) == 1
    assert "a \\| b" in found.to_markdown()


def test_diversity_is_the_mean_distance_of_two_samples():
    one, other = np.zeros((2, 2)), np.full((2, 2), 3.0)
    assert distances_within([one, other, other]) == pytest.approx((3.0 + 3.0 + 0.0) / 3)
    assert np.isnan(distances_within([one]))


def test_scores_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"'tuned' by 'score' have the shape \(3, 2\), not \(4, 2\)"):
        comparison(np.zeros((4, 2)), np.zeros((3, 2)))

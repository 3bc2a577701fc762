"""RankDPO on rankings of several lengths: what is trained, what is left out, and which data are errors."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from helpers.pipelines import build_tiny_pipeline, weights_of

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, RankDPOConfig, RankDPOTrainer
from trl_diffusion_pref.algorithms.rank_dpo.loss import RankDPOOptions
from trl_diffusion_pref.algorithms.rank_dpo.rows import equal_rankings
from trl_diffusion_pref.data.layouts import with_condition_column
from trl_diffusion_pref.families import all_families


@pytest.fixture
def options(tmp_path):
    def make(**more) -> dict:
        return {
            "output_dir": str(tmp_path / "output"),
            "dataset_cache_dir": str(tmp_path / "cache"),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "beta": 100.0,
            "divergence_guard": "off",
            "prompt_dropout": 0.0,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "activation_checkpointing": False,
            "report_to": "none",
        } | more

    return make


def rankings(pairs: Dataset, lengths: list[int], **scores: list[list[float]]) -> Dataset:
    """The first rows of pairs as rankings of so many images, falling scores unless others are given."""
    images = [pairs[index][side] for index in range(len(pairs)) for side in ("chosen", "rejected")]
    columns = {
        "prompt": pairs["prompt"][: len(lengths)],
        "images": [images[2 * row : 2 * row + length] for row, length in enumerate(lengths)],
        "scores": [[-float(number) for number in range(length)] for length in lengths],
    } | {name.replace("__", "/"): values for name, values in scores.items()}
    numbers = {name: List(Value("float64")) for name in columns if name.startswith("scores")}
    return Dataset.from_dict(
        columns, features=Features({"prompt": Value("string"), "images": List(Image()), **numbers})
    )


def trainer_on(data: Dataset, options: dict, evaluated: Dataset | None = None) -> RankDPOTrainer:
    return RankDPOTrainer(build_tiny_pipeline(), RankDPOConfig(**options), data, evaluated)


def test_rankings_of_two_train_as_dpo_does_on_pairs(pairs, options):
    pairs = pairs.select(range(4))
    dpo = DiffusionDPOTrainer(build_tiny_pipeline(), DiffusionDPOConfig(**options()), pairs)
    dpo.train()
    group = trainer_on(rankings(pairs, [2] * 4), options(loss_type="dgpo"))
    group.train()
    for name, tensor in weights_of(dpo.model).items():
        torch.testing.assert_close(weights_of(group.model)[name], tensor, rtol=1e-4, atol=1e-6)
    ranked = trainer_on(rankings(pairs, [2] * 4), options(max_steps=1))
    ranked.train()
    # The gain of the better one is 1; its discount 1 / log 2, the other's 1 / log 3.
    assert ranked.state.log_history[0]["loss"] == pytest.approx(np.log(2) * (1 / np.log(2) - 1 / np.log(3)), rel=1e-5)
    assert ranked.state.log_history[0]["rewards/best"] == 0.0


def test_rankings_of_several_lengths_are_learned(pairs, options):
    data = rankings(pairs, [2, 4, 3, 2, 4, 3])
    # With one draw of noise for each row they can be learned by heart.
    more = {"reference": "precomputed", "reference_draws": 1, "per_device_train_batch_size": 3}
    trainer = trainer_on(data, options(**more, max_steps=12), data)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-3:]
    assert min(entry["rewards/accuracies"] for entry in last) > 0.7
    assert min(entry["rewards/margins"] for entry in last) > 0.5


@pytest.mark.parametrize("shared_noise", [True, False])
def test_precomputed_errors_of_several_lengths_are_the_model_s(shared_noise, pairs, options):
    data = rankings(pairs, [2, 4, 3])
    trainer = trainer_on(data, options(reference="precomputed", shared_noise=shared_noise), data)
    # The model is still the reference, so that every reward is 0 where the stored errors are its own.
    found = trainer.evaluate()
    assert abs(found["eval_rewards/best"]) < 1e-3 and abs(found["eval_rewards/worst"]) < 1e-3
    trainer.train()
    assert abs(trainer.state.log_history[0]["rewards/margins"]) < 1e-3


def test_with_noises_of_their_own_all_but_the_first_sample_see_another(pairs, options):
    data = rankings(pairs, [3, 3])
    shared, own = (trainer_on(data, options(shared_noise=value), data).evaluate() for value in (True, False))
    assert own["eval_mse/chosen"] == pytest.approx(shared["eval_mse/chosen"], rel=1e-5)
    assert own["eval_mse/rejected"] != pytest.approx(shared["eval_mse/rejected"], rel=1e-3)


def test_rankings_without_a_difference_are_left_out_and_counted(pairs, options, caplog):
    scores = [[0.5, 0.5], [1.0, 0.5, 0.5], [2.0, 2.0, 2.0], [0.1, 0.9]]
    data = rankings(pairs, [2, 3, 3, 2], scores=scores)
    with caplog.at_level(logging.WARNING):
        trainer = trainer_on(data, options())
    assert "train_dataset: 2 of 4 rows are left out, 50.00% (2 of equally good samples)" in caplog.text
    assert len(trainer.train_dataset) == 2
    with pytest.raises(ValueError, match="samples of each of its 2 rankings are all equally good by scores"):
        trainer_on(data.select([0, 2]), options())
    with pytest.raises(ValueError, match="train_dataset has no rows"):
        trainer_on(data.select([]), options())


@pytest.mark.parametrize(
    ("lengths", "scores", "message"),
    [
        # The first row is left out, and rows are numbered as the user's are.
        ([2, 3, 2], [[1, 1], [3, 2, 1], [1, float("nan")]], "row 2, column 'scores': is nan, not a finite number"),
        ([2, 1, 2], [[1, 1], [3], [1, 2]], "row 1, column 'images': found a list of 1, wanted a list of 2"),
        ([2, 3], [[1, 0], [1, 0]], "row 1, column 'scores': has 2 numbers for 3 samples"),
        ([2, 5], [[1, 0], [1, 0, 2, 3, 4]], "row 1, column 'images': found 5 samples, and max_samples=4"),
    ],
)
def test_rankings_that_cannot_be_used_are_named_by_row_and_column(lengths, scores, message, pairs, options):
    data = rankings(pairs, lengths, scores=[[float(value) for value in row] for row in scores])
    with pytest.raises(ValueError, match=message):
        trainer_on(data, options())


def test_shares_of_won_comparisons_lie_between_0_and_1(pairs, options):
    data = rankings(pairs, [2, 2], scores=[[0.9, 0.1], [1.5, 0.5]])
    with pytest.raises(ValueError, match=r"row 1, column 'scores': is 1.5, not in \[0, 1\]"):
        trainer_on(data, options(win_fractions="given"))


def test_several_rewards_are_averaged_and_their_columns_named(pairs, options):
    columns = {"scores__a": [[3.0, 2.0, 1.0], [1.0, 0.0]], "scores__b": [[10.0, 30.0, 20.0], [5.0, 4.0]]}
    data = rankings(pairs, [3, 2], **columns)
    trainer = trainer_on(data, options(score_columns=["scores/a", "scores/b"], max_steps=1), data)
    # phi is 2/4, 3/4 and 1/4: the weights of its pairs are those of Algorithm 2.
    gains, discounts = 2 ** np.array([0.75, 0.5, 0.25]), 1 / np.log([2.0, 3.0, 4.0])
    weight = sum((gains[i] - gains[j]) * (discounts[i] - discounts[j]) for i in range(3) for j in range(i + 1, 3))
    two = 1 / np.log(2) - 1 / np.log(3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx((weight + two) / 2 * np.log(2), rel=1e-5)
    without = data.remove_columns("scores")
    with pytest.raises(ValueError, match=r"lacks the column scores; .* score_columns=\['scores/a', 'scores/b'\]"):
        trainer_on(without, options())


def test_rewards_that_disagree_altogether_leave_no_difference():
    columns = {"a": [[1.0, 0.0], [1.0, 0.0], "text"], "b": [[0.0, 4.0], [3.0, 4.0, 5.0], [0.0, 0.0]]}
    assert equal_rankings(columns, RankDPOOptions("rankdpo", 1.0, False)).tolist() == [0]


def test_the_samples_of_rankings_are_no_condition_images(pairs):
    data = rankings(pairs, [2])
    family = next(each for each in all_families() if each.pipeline_class == "Flux2Pipeline")
    assert with_condition_column(data, family).column_names == data.column_names
    assert "image" in with_condition_column(data.remove_columns("scores"), family).column_names


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"score_columns": []}, "it must be a list with at least one column's name"),
        ({"score_columns": ["a", "a"]}, "names a column twice"),
        ({"loss_type": "dgpo", "win_fractions": "given"}, "does nothing with loss_type='dgpo'"),
        ({"max_samples": 1}, "max_samples=1: it must be at least 2"),
        ({"beta": -1.0}, "beta=-1.0: it must be positive"),
    ],
)
def test_options_that_cannot_be_used_raise(more, message, options):
    with pytest.raises(ValueError, match=message):
        RankDPOConfig(**options(**more))

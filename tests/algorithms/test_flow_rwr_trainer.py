"""Where the weights of reward-weighted regression come from, and what is refused."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of

from trl_diffusion_pref import DiffusionSFTConfig, DiffusionSFTTrainer, FlowRWRConfig, FlowRWRTrainer, encode_dataset
from trl_diffusion_pref.shapes import preference_pairs


PROMPTS = ["a", "b", "a", "b", "a", "c"]
REWARDS = [1.0, -0.5, 0.0, 0.5, 2.0, 7.0]


def scored(rewards: list, prompts: list[str] = PROMPTS) -> Dataset:
    images = preference_pairs(len(rewards), seed=7).select_columns("chosen").rename_column("chosen", "image")
    return images.add_column("prompt", prompts).add_column("reward", rewards)


@pytest.fixture
def rwr(image_run):
    """Makes a trainer of two steps on the tiny pipeline."""

    def make(rows, eval_rows=None, **options) -> FlowRWRTrainer:
        config = FlowRWRConfig(**image_run(**options))
        return FlowRWRTrainer(build_tiny_pipeline(), config, rows, eval_rows)

    return make


def values_of(trainer: FlowRWRTrainer, dataset) -> dict[str, list[float]]:
    """What the step computes for the rows of an encoded data set, in their order."""
    [batch] = trainer._batches_in_order(dataset, 8)
    with torch.no_grad():
        values = trainer.compute_losses(trainer.model, batch, trainer.modes.evaluation(batch.rows, None))
    return {name: value.tolist() for name, value in values.items()}


def softmax(rewards: list[float], temperature: float) -> list[float]:
    shares = [math.exp(reward / temperature) for reward in rewards]
    return [len(rewards) * share / sum(shares) for share in shares]


def test_the_loss_is_the_error_times_a_weight_of_the_row_s_group(rwr, caplog):
    with caplog.at_level(logging.INFO):
        trainer = rwr(
            scored(REWARDS), scored(REWARDS[:3], PROMPTS[:3]), weighting="softmax", temperature=0.5, weight_clip=2.0
        )
    a, b = softmax([1.0, 0.0, 2.0], 0.5), softmax([-0.5, 0.5], 0.5)
    weights = [a[0], b[0], a[1], b[1], a[2], 1.0]
    assert weights[4] > 2
    clipped = [min(weight, 2.0) for weight in weights]
    values = values_of(trainer, trainer.train_dataset)
    assert values["weights/mean"] == pytest.approx(clipped, rel=1e-6)
    assert values["weights/mean_square"] == pytest.approx([weight**2 for weight in clipped], rel=1e-6)
    assert values["weights/clipped"] == [0, 0, 0, 0, 1, 0]
    assert values["reward"] == REWARDS
    assert values["loss"] == pytest.approx([w * e for w, e in zip(clipped, values["mse"], strict=True)], rel=1e-6)
    # Evaluation data are groups of their own.
    [first, second] = softmax([1.0, 0.0], 0.5)
    values = values_of(trainer, trainer.eval_dataset)
    assert values["weights/mean"] == pytest.approx([first, 1.0, second], rel=1e-6)
    share = sum(clipped) ** 2 / (6 * sum(weight**2 for weight in clipped))
    assert f"6 samples of 3 prompts have weights of mean {sum(clipped) / 6:.3g}, at most 2" in caplog.text
    assert f"as much as {share:.1%} of them" in caplog.text and "weight_clip lowers 1" in caplog.text
    assert "with a single sample, whose samples all weigh 1: 1" in caplog.text


def test_equal_rewards_are_supervised_fine_tuning_bit_for_bit(rwr, image_run):
    sft = DiffusionSFTTrainer(build_tiny_pipeline(), DiffusionSFTConfig(**image_run()), scored([0.0] * 6))
    sft.train()
    cases = [
        (2.5, {"weighting": "softmax"}),
        (2.5, {"normalize_rewards": True}),
        (0.0, {}),
        (1.0, {"weighting": "raw"}),
    ]
    for reward, options in cases:
        trainer = rwr(scored([reward] * 6), **options)
        trainer.train()
        assert_equal_weights(weights_of(trainer.model), weights_of(sft.model))


def test_a_stream_has_the_weights_that_need_no_group(rwr):
    stream = scored(REWARDS).to_iterable_dataset()
    trainer = rwr(stream, scored(REWARDS), temperature=2.0)
    trainer.train()
    expected = [math.exp(reward / 2) for reward in REWARDS]
    assert values_of(trainer, trainer.eval_dataset)["weights/mean"] == pytest.approx(expected, rel=1e-6)
    for options, named in (({"weighting": "softmax"}, "weighting='softmax'"), ({"normalize_rewards": True}, "True")):
        with pytest.raises(ValueError, match=f"{named} needs all samples of a prompt together, and train_dataset is"):
            rwr(stream, **options)


def test_rows_with_bad_rewards_take_no_part_in_their_group(rwr):
    rows = scored([1.0, -0.5, math.nan, 0.5, 2.0, None])
    with pytest.raises(ValueError, match=r"(?s)row 2, column 'reward': is nan.*row 5, column 'reward': is None"):
        rwr(rows, weighting="softmax")
    trainer = rwr(rows, weighting="softmax", on_bad_row="skip", max_bad_share=0.5)
    a, b = softmax([1.0, 2.0], 1.0), softmax([-0.5, 0.5], 1.0)
    expected = [a[0], b[0], b[1], a[1]]
    assert values_of(trainer, trainer.train_dataset)["weights/mean"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        (REWARDS, {"weighting": "raw"}, r"row 1, column 'reward': is -0.5, .*negative one has no lower bound"),
        ([0.0] * 6, {"weighting": "raw"}, "row 0, column 'reward': the largest weight, .* is 0, too small"),
        ([50.0, 200.0] * 3, {}, r"row 1, column 'reward': the largest weight, of the reward 200, is 7.*, too large"),
        ([-300.0, -200.0] * 3, {"temperature": 2.0}, "row 1, .* of the reward -200, is 3.72e-44, too small"),
    ],
    ids=["negative", "zero", "too large", "too small"],
)
def test_weights_that_cannot_be_used_are_refused(rwr, rewards, options, message):
    with pytest.raises(ValueError, match=message):
        rwr(scored(rewards), **options)


def test_data_without_rewards_are_refused_by_column(rwr, pairs):
    single = pairs.rename_column("chosen", "image").remove_columns("rejected")
    with pytest.raises(ValueError, match="train_dataset lacks the column reward; found: prompt, image"):
        rwr(single, weighting="softmax")


def test_negative_weights_by_normalization_are_refused(image_run):
    with pytest.raises(ValueError, match="normalize_rewards=True makes about half of the rewards negative"):
        FlowRWRConfig(**image_run(weighting="raw", normalize_rewards=True))


def test_encoded_weights_are_those_of_the_run_s_options(rwr, image_run):
    config = FlowRWRConfig(**image_run(weighting="softmax", temperature=0.5))
    encoded = encode_dataset(build_tiny_pipeline(), scored(REWARDS), config)
    trainer = rwr(encoded, weighting="softmax", temperature=0.5, weight_clip=1.5)
    assert values_of(trainer, trainer.train_dataset)["weights/mean"][4] == 1.5
    with pytest.raises(ValueError, match=r"column weight \(softmax, temperature 0.25\): it has none"):
        rwr(encoded, weighting="softmax", temperature=0.25)
    with pytest.raises(ValueError, match="train_dataset has negative rewards: .* no lower bound"):
        rwr(encoded, weighting="raw")
    # Weights that need no group are computed from the rewards, which it has.
    trainer = rwr(encoded, temperature=2.0)
    expected = [math.exp(reward / 2) for reward in REWARDS]
    assert values_of(trainer, trainer.train_dataset)["weights/mean"] == pytest.approx(expected, rel=1e-6)

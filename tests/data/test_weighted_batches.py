"""Batches of rows that are drawn with replacement."""

import numpy as np
import pytest

from trl_diffusion_pref.data.weighted_batches import WeightedBatchSampler


ONE_SIZE = np.zeros(10, dtype=np.int16)
WEIGHTS = np.array([4.0] * 2 + [0.25] * 8)


def batches_of(
    buckets=ONE_SIZE, size=4, process=(0, 1), weights=WEIGHTS, epoch=0, seed=3, **options
) -> list[list[int]]:
    sampler = WeightedBatchSampler(buckets, size, process, seed=seed, weights=weights, **options)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


def test_an_epoch_draws_as_many_rows_as_there_are_and_repeats_to_the_last():
    batches = batches_of()
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert batches == batches_of()
    assert batches != batches_of(epoch=1) and batches != batches_of(seed=4)
    assert [len(batch) for batch in batches_of(drop_last=True)] == [4, 4]


def test_rows_are_drawn_as_often_as_their_weights_say():
    """Two rows hold 80 % of the weight, as liked ones with a positive ratio of 0.8."""
    rows = np.concatenate([sum(batches_of(epoch=epoch), []) for epoch in range(2000)])
    counts = np.bincount(rows, minlength=10) / len(rows)
    # 20,000 draws: five standard errors.
    assert counts == pytest.approx(WEIGHTS / WEIGHTS.sum(), abs=0.018)
    assert set(sum(batches_of(weights=np.array([0.0, 1.0] * 5)), [])) <= {1, 3, 5, 7, 9}


def test_in_buckets_batches_have_one_size_and_rows_their_probabilities():
    # The two rows of much weight are in buckets of their own; the last bucket has a single row.
    buckets = np.array([0, 1, 0, 0, 0, 0, 1, 1, 1, 2], dtype=np.int16)
    batches = [batch for epoch in range(3000) for batch in batches_of(buckets, epoch=epoch)]
    assert all(len(set(buckets[batch].tolist())) == 1 for batch in batches)
    whole = [batch for batch in batches if len(batch) == 4]
    counts = np.bincount(np.concatenate(whole), minlength=10) / (4 * len(whole))
    # 6,000 batches decide about the bucket: five standard errors.
    assert counts == pytest.approx(WEIGHTS / WEIGHTS.sum(), abs=0.033)


@pytest.mark.parametrize("number", [8, 10])
def test_batches_of_one_are_those_of_four(number):
    weights = WEIGHTS[:number]
    fours, ones = (batches_of(ONE_SIZE[:number], size, weights=weights) for size in (4, 1))
    assert sum(fours, []) == sum(ones, [])


def test_two_processes_draw_the_rows_of_one():
    weights = np.arange(1.0, 9.0)
    (one,) = (batches_of(ONE_SIZE[:8], 4, weights=weights),)
    first, second = (batches_of(ONE_SIZE[:8], 2, (rank, 2), weights) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == one
    # Ten rows in batches of two are five batches, and each process has three.
    first, second = (batches_of(size=2, process=(rank, 2)) for rank in (0, 1))
    assert [len(batch) for batch in first + second] == [2] * 6


def test_fewer_rows_than_a_batch_cannot_be_dropped():
    with pytest.raises(ValueError, match="Set dataloader_drop_last=False"):
        batches_of(ONE_SIZE[:3], weights=WEIGHTS[:3], drop_last=True)

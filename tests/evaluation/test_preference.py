import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from helpers.pipelines import build_tiny_pipeline

from trl_diffusion_pref import MaPOTrainer
from trl_diffusion_pref.evaluation import bootstrap_interval, preference_accuracy, wins
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs


def test_ties_count_half():
    assert wins(torch.tensor([2.0, -1.0, 0.0])).tolist() == [1.0, 0.0, 0.5]


def test_the_bootstrap_interval_is_the_binomial_s():
    values = np.array([1.0] * 60 + [0.0] * 40)
    low, high = bootstrap_interval(values)
    # normal approximation: 0.6 -+ 1.96 * 0.049
    assert low == pytest.approx(0.504, abs=0.02) and high == pytest.approx(0.696, abs=0.02)
    assert bootstrap_interval(np.ones(10)) == (1.0, 1.0)


@pytest.mark.parametrize("resolution", ["16x24", (16, 24)])
def test_pairs_are_encoded_at_the_height_and_width_that_are_asked_for(resolution, tiny_pipeline, monkeypatch):
    shapes, encode = set(), tiny_pipeline.vae.encode
    monkeypatch.setattr(tiny_pipeline.vae, "encode", lambda pixels: shapes.add(pixels.shape[1:]) or encode(pixels))
    preference_accuracy(tiny_pipeline, preference_pairs(2), draws=1, resolution=resolution)
    assert shapes == {(3, 16, 24)}


def test_a_model_against_itself_has_accuracy_one_half(tiny_pipeline):
    result = preference_accuracy(tiny_pipeline, preference_pairs(6), reference=build_tiny_pipeline(), draws=2)
    assert (result.accuracy, result.interval, result.count) == (0.5, (0.5, 0.5), 6)
    assert result.likelihood_accuracy == result.reference_likelihood_accuracy


def test_the_base_finds_the_preferred_outlines_unlikely_and_swapping_mirrors_it():
    pipeline = load_pipeline()
    outlined = preference_accuracy(pipeline, preference_pairs(24, seed=5), draws=4)
    filled = preference_accuracy(pipeline, preference_pairs(24, seed=5, preferred_style="filled"), draws=4)
    assert outlined.likelihood_accuracy <= 0.25
    assert filled.likelihood_accuracy >= 0.75
    assert outlined.accuracy is None and outlined.reference_likelihood_accuracy is None


def test_it_repeats_to_the_last_digit_and_the_batch_does_not_matter(tiny_pipeline):
    pairs = preference_pairs(7)
    results = [preference_accuracy(tiny_pipeline, pairs, draws=3, batch_size=size) for size in (7, 7, 2)]
    assert results[0] == results[1] == results[2]


def test_the_trainer_s_evaluation_is_the_same_measure(tiny_pipeline, config):
    pairs = preference_pairs(10, seed=3)
    trainer = MaPOTrainer(tiny_pipeline, config(max_steps=4, seed=11), preference_pairs(8), pairs)
    trainer.train()
    metrics = trainer.evaluate()
    alone = preference_accuracy(tiny_pipeline, pairs, reference=build_tiny_pipeline(), seed=11)
    assert metrics["eval_preference_accuracy"] == pytest.approx(alone.accuracy)
    assert metrics["eval_likelihood_accuracy"] == pytest.approx(alone.likelihood_accuracy)
    assert metrics["eval_base_likelihood_accuracy"] == pytest.approx(alone.reference_likelihood_accuracy)
    bounds = (metrics["eval_preference_accuracy_low"], metrics["eval_preference_accuracy_high"])
    assert bounds == pytest.approx(alone.interval)


def test_before_training_the_trainer_reports_one_half_and_the_base(tiny_pipeline, config):
    trainer = MaPOTrainer(tiny_pipeline, config(), preference_pairs(4), preference_pairs(6, seed=1))
    metrics = trainer.evaluate()
    assert metrics["eval_preference_accuracy"] == 0.5
    assert metrics["eval_likelihood_accuracy"] == metrics["eval_base_likelihood_accuracy"]


def test_evaluation_can_leave_likelihoods_out(tiny_pipeline, config):
    trainer = MaPOTrainer(tiny_pipeline, config(eval_draws=0), preference_pairs(4), preference_pairs(4))
    assert not [name for name in trainer.evaluate() if "likelihood" in name or "preference" in name]


def test_other_pipelines_are_refused(tiny_pipeline):
    other = DDPMPipeline(unet=tiny_pipeline.unet, scheduler=tiny_pipeline.scheduler)
    with pytest.raises(TypeError, match="DDPMPipeline is not supported"):
        preference_accuracy(tiny_pipeline, preference_pairs(2), reference=other)
    with pytest.raises(ValueError, match="dataset lacks the column"):
        preference_accuracy(tiny_pipeline, preference_pairs(2).remove_columns("chosen"))

import numpy as np

from trl_diffusion_pref.trainer.metrics import IntervalMeans, joined


def test_means_are_of_the_interval_alone_and_each_metric_of_its_own_batches():
    means = IntervalMeans()
    means.add({"margin": 1.0, "accuracy": 0.5})
    means.add({"margin": 4.0})
    assert means.take() == {"margin": 2.5, "accuracy": 0.5}
    means.add({"margin": 7.0})
    assert means.take() == {"margin": 7.0}
    assert means.take() == {}


def test_batches_of_unequal_length_are_joined():
    whole = np.arange(10.0).reshape(5, 2)
    assert np.array_equal(joined([whole[:3], whole[3:]]), whole)
    assert np.array_equal(joined(whole), whole)

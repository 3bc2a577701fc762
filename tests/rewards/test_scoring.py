"""What rewards may return, how they are combined, and what rewards with models do around their forward pass."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.reward_models import images
from PIL import Image
from torch import nn

from trl_diffusion_pref.rewards import ModelReward, RewardError, combine, reward_name, score


PROMPTS, SAMPLES = ["a", "bb", "ccc", "dddd", "eeeee"], list(range(5))


def length(prompts, samples, **columns):
    return [len(prompt) for prompt in prompts]


def weighted(prompts, samples, weight, offset=0, **columns):
    return [sample * factor + offset for sample, factor in zip(samples, weight, strict=True)]


def returning(values):
    def custom(prompts, samples, **columns):
        return values

    return custom


def raising(bad):
    """Raises whenever the bad sample is among those that it gets."""

    def custom(prompts, samples, **columns):
        custom.calls += 1
        assert all(len(column) == len(samples) for column in columns.values())
        if bad in samples:
            raise KeyError("no such style")
        return [0.0] * len(samples)

    custom.calls = 0
    return custom


def test_scores_are_floats_by_name_and_columns_reach_the_rewards():
    found = score([length, weighted], PROMPTS, SAMPLES, weight=[1, 2, 3, 4, 5], offset=0.5)
    assert found == {"length": [1, 2, 3, 4, 5], "weighted": [0.5, 2.5, 6.5, 12.5, 20.5]}
    assert all(type(value) is float for value in found["length"])
    assert score({"size": length}, PROMPTS, SAMPLES) == score({"size": length}, tuple(PROMPTS), SAMPLES)
    assert score(length, [], []) == {"length": []}


@pytest.mark.parametrize(
    "values", [torch.arange(5.0), np.arange(5, dtype=np.float16), tuple(np.float32(value) for value in range(5))]
)
def test_arrays_and_tensors_are_accepted(values):
    assert score(returning(values), PROMPTS, SAMPLES) == {"custom": [0, 1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0, float("nan"), 4.0, 5.0], "reward 'custom', sample 2: returned nan; a score must be finite"),
        ([1.0, 2.0, 3.0, 4.0, -float("inf")], "reward 'custom', sample 4: returned -inf"),
        (["5", 1, 1, 1, 1], r"reward 'custom', sample 0: returned '5' \(str\), not a number"),
        ([1, None, 1, 1, 1], r"reward 'custom', sample 1: returned None"),
        ([1.0, 2.0], "reward 'custom': returned 2 values for 5 samples"),
        (torch.zeros(5, 2), r"reward 'custom', sample 0: returned \[0.0, 0.0\] \(list\)"),
        ("12345", "reward 'custom': returned a str, not a list"),
        (None, "reward 'custom': returned a NoneType, not a list"),
    ],
)
def test_wrong_values_name_the_reward_and_the_sample(values, message):
    with pytest.raises(RewardError, match=message):
        score(returning(values), PROMPTS, SAMPLES)


@pytest.mark.parametrize("bad", range(5))
def test_the_sample_for_which_a_reward_raises_is_found(bad):
    reward = raising(bad)
    with pytest.raises(RewardError, match=f"'custom', sample {bad}: raised KeyError: 'no such style'") as caught:
        score(reward, PROMPTS, SAMPLES, weight=[1] * 5)
    assert caught.value.sample == bad and isinstance(caught.value.__cause__, KeyError)
    # By halves: scores may cost money.
    assert reward.calls <= 7


def test_no_sample_is_blamed_where_memory_or_a_connection_fails():
    def unlucky(prompts, samples, **columns):
        unlucky.calls += 1
        raise ConnectionResetError("gone")

    unlucky.calls = 0
    with pytest.raises(RewardError, match="reward 'unlucky': raised ConnectionResetError: gone") as caught:
        score(unlucky, PROMPTS, SAMPLES)
    assert caught.value.sample is None and unlucky.calls == 1


def test_prompts_and_rewards_are_checked_before_scoring():
    with pytest.raises(ValueError, match="4 prompts for 5 samples"):
        score(length, PROMPTS[:4], SAMPLES)
    with pytest.raises(ValueError, match="prompt 1 is a NoneType, not a string"):
        score(length, ["a", None], SAMPLES[:2])
    with pytest.raises(ValueError, match="two rewards are named 'length'"):
        score([length, length], PROMPTS, SAMPLES)
    with pytest.raises(ValueError, match="no rewards"):
        score([], PROMPTS, SAMPLES)
    with pytest.raises(TypeError, match="has no `__name__`"):
        reward_name(functools.partial(weighted, weight=[1]))
    with pytest.raises(TypeError, match="reward 'size' is not callable"):
        score({"size": 3}, PROMPTS, SAMPLES)


def test_combined_rewards_are_the_weighted_sum():
    total = combine({length: 2.0, weighted: -0.5}, name="total")
    assert score(total, PROMPTS, SAMPLES, weight=[1, 2, 3, 4, 5]) == {"total": [2.0, 3.0, 3.0, 2.0, 0.0]}
    nested = combine([(total, 1), (length, 1)])
    assert nested.__name__ == "combined" and nested.weights == {"total": 1.0, "length": 1.0}
    assert nested(PROMPTS, SAMPLES, weight=[1] * 5) == [3.0, 5.5, 8.0, 10.5, 13.0]
    with pytest.raises(RewardError, match="reward 'custom', sample 1"):
        combine({length: 1, returning([1.0, float("nan")]): 1})(PROMPTS[:2], SAMPLES[:2])
    for weight in (0, float("nan")):
        with pytest.raises(ValueError, match=f"the weight of reward 'length' is {float(weight)}"):
            combine({length: weight})


class Mean(ModelReward):
    """The mean of an image, times a weight."""

    def __init__(self, **options):
        defaults = {"batch_size": 2, "device": None, "dtype": torch.float32, "keep_on_device": False}
        super().__init__(name="mean", **{**defaults, **options})
        self.events = []

    def _load(self):
        self.events.append("load")
        events = self.events

        class Model(nn.Linear):
            def to(self, target):
                events.append(str(target))
                return self if isinstance(target, torch.device) else super().to(target)

        return Model(1, 1)

    def _score(self, prompts, samples, columns):
        self.events.append(f"score {len(samples)}")
        if columns.get("fail"):
            raise RuntimeError("out of order")
        return torch.tensor([float(np.asarray(image).mean()) for image in samples])


def test_models_load_at_the_first_call_and_leave_the_device_after_each():
    reward = Mean(device="cuda:1")
    assert not reward.events
    samples = images((4, 4), (2, 6), (3, 3))
    assert reward(["a"] * 3, samples) == pytest.approx([np.asarray(image).mean() for image in samples])
    call = ["cuda:1", "score 2", "score 1", "cpu"]
    assert reward.events == ["load", "torch.float32", *call]
    reward(["a"] * 3, samples)
    assert reward.events[2:] == call * 2
    assert not any(parameter.requires_grad for parameter in reward.load().parameters())
    with pytest.raises(RuntimeError, match="out of order"):
        reward(["a"], samples[:1], fail=True)
    assert reward.events[-2:] == ["score 1", "cpu"]
    stays = Mean(device="cuda:1", keep_on_device=True)
    stays(["a"], samples[:1])
    assert stays.events[-1] == "score 1"


def test_images_of_any_form_are_decoded_as_for_training(tmp_path):
    (image,) = images((5, 4))
    image.save(tmp_path / "a.png")
    clear = Image.new("RGBA", (5, 4), (0, 0, 0, 0))
    found = Mean()(["a"] * 4, [image, str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), clear])
    assert found == pytest.approx([np.asarray(image).mean()] * 3 + [255.0])
    with pytest.raises(RewardError, match=r"reward 'mean', sample 2: no file at .*missing.png") as caught:
        score(Mean(), ["a"] * 4, [image, image, str(tmp_path / "missing.png"), image])
    assert caught.value.sample == 2
    with pytest.raises(ValueError, match="batch_size=0"):
        Mean(batch_size=0)


def test_rewards_are_imported_when_used():
    code = "import sys, trl_diffusion_pref.rewards as r; r.score; print('transformers.models.blip' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "False", result.stderr
    import trl_diffusion_pref.rewards

    assert all(callable(getattr(trl_diffusion_pref.rewards, name)) for name in trl_diffusion_pref.rewards.__all__[:3])

"""Relabelling: flipped labels are restored, soft labels are the formula's, nothing is lost."""

import logging
import math
import re

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from helpers.pipelines import image_pairs, png
from PIL import Image as PILImage

from trl_diffusion_pref import relabel
from trl_diffusion_pref.data import PairOptions, as_pairs
from trl_diffusion_pref.rewards import RewardError
from trl_diffusion_pref.shapes import preference_pairs, shapes_reward


def grey(*levels: int) -> Dataset:
    """Pairs of (chosen, rejected) grey levels."""
    images = [png(PILImage.new("RGB", (4, 4), (level,) * 3)) for level in levels]
    return image_pairs([(f"p{row}", images[2 * row], images[2 * row + 1]) for row in range(len(levels) // 2)])


def brightness(prompts, samples):
    return [float(np.asarray(image).mean()) for image in samples]


# Not enclosed by a reward, since what it encloses is part of what it computes.
SCORED: list[str] = []


def counted(prompts, samples):
    SCORED.extend(prompts)
    return brightness(prompts, samples)


def darkness(prompts, samples):
    return [-value / 10 for value in brightness(prompts, samples)]


def level(image) -> int:
    return image.getpixel((0, 0))[0]


def stored_bytes(dataset: Dataset, side: str) -> list[bytes]:
    return [cell["bytes"] for cell in dataset.cast_column(side, Image(decode=False))[side]]


def test_relabelling_restores_flipped_labels():
    pairs = preference_pairs(300, seed=3)
    options = PairOptions(label_noise=0.3, column_map={"prompt": "prompt"}, seed=1)
    flipped = as_pairs(pairs, "pairs", options)
    wrong = np.mean([a != b for a, b in zip(*(stored_bytes(d, "chosen") for d in (pairs, flipped)), strict=True)])
    assert 0.2 < wrong < 0.4
    restored = relabel(flipped, shapes_reward)
    for side in ("chosen", "rejected"):
        same = [a == b for a, b in zip(stored_bytes(pairs, side), stored_bytes(restored, side), strict=True)]
        assert np.mean(same) >= 0.99
    assert restored["prompt"] == pairs["prompt"]


def test_soft_labels_are_the_mean_of_sigmoids_and_the_better_sample_is_chosen():
    found = relabel(grey(10, 30, 90, 20), [brightness, darkness], temperature={"brightness": 20.0, "darkness": 4.0})
    expected = []
    for first, second in ((10, 30), (90, 20)):
        terms = [(first - second) / 20.0, (second - first) / 10 / 4.0]
        expected.append(sum(1 / (1 + math.exp(-term)) for term in terms) / 2)
    assert found["soft_label"] == pytest.approx([1 - expected[0], expected[1]])
    assert [(level(row["chosen"]), level(row["rejected"])) for row in found] == [(30, 10), (90, 20)]
    assert found["chosen_scores/brightness"] == [30.0, 90.0]
    assert found["rejected_scores/darkness"] == [-1.0, -2.0]
    # Two samples' Bradley-Terry strengths differ by the log odds.
    odds = [math.log(label / (1 - label)) for label in found["soft_label"]]
    assert [row["chosen_score"] - row["rejected_score"] for row in found] == pytest.approx(odds)


def test_columns_of_a_sample_change_places_with_it():
    pairs = grey(10, 30, 90, 20).add_column("chosen_model", ["a", "b"]).add_column("rejected_model", ["c", "d"])
    pairs = pairs.add_column("category", ["x", "y"]).add_column("chosen_alone", [1, 2])
    found = relabel(pairs.add_column("chosen_score", [0.0, 0.0]), brightness)
    assert found["chosen_model"] == ["c", "b"] and found["rejected_model"] == ["a", "d"]
    assert found["category"] == ["x", "y"] and found["chosen_alone"] == [1, 2]
    assert found["chosen_score"] == [30.0, 90.0] and found["rejected_score"] == [10.0, 20.0]


def test_equally_good_samples_stay_and_are_counted(caplog):
    caplog.set_level(logging.INFO)
    found = relabel(grey(50, 50, 20, 40, 60, 30), brightness)
    assert found["soft_label"][0] == 0.5 and min(found["soft_label"][1:]) > 0.5
    assert "3 pairs were labelled again: 1 have changed places, 1 are equally good" in caplog.text


def test_a_selection_and_other_layouts_are_relabelled():
    pairs = grey(10, 30, 90, 20, 5, 6)
    found = relabel(pairs.select([2, 0]), brightness)
    assert [level(image) for image in found["chosen"]] == [6, 30] and found["prompt"] == ["p2", "p0"]
    votes = pairs.rename_columns({"prompt": "caption", "chosen": "jpg_0", "rejected": "jpg_1"})
    found = relabel(votes.add_column("label_0", [1.0, 0.0, 1.0]), brightness)
    assert [level(image) for image in found["chosen"]] == [30, 90, 6]


def test_rankings_get_new_scores():
    images = [
        [png(PILImage.new("RGB", (4, 4), (value,) * 3)) for value in values] for values in ((9, 5, 7), (1, 2, 4))
    ]
    features = Features({"prompt": Value("string"), "images": [Image()], "ranks": [Value("int64")]})
    rankings = Dataset.from_dict({"prompt": ["a", "b"], "images": images, "ranks": [[1, 2, 3]] * 2}, features=features)
    found = relabel(rankings, brightness)
    assert found["scores"] == found["scores/brightness"] == [[9.0, 5.0, 7.0], [1.0, 2.0, 4.0]]
    assert found.column_names == ["prompt", "images", "scores", "scores/brightness"]
    # Strengths of two rewards that say the same are the difference over the temperature.
    doubled = relabel(found, {"a": brightness, "b": brightness}, temperature=2.0)["scores"]
    assert doubled[0] == pytest.approx([1.0, -1.0, 0.0], abs=1e-8)


def test_scores_are_kept_where_a_folder_is_given(tmp_path):
    SCORED.clear()
    pairs = grey(10, 30, 90, 20)
    first = relabel(pairs, counted, output=tmp_path, batch_size=1)
    again = relabel(pairs, counted, output=tmp_path)
    assert len(SCORED) == 4 and first["soft_label"] == again["soft_label"]
    relabel(grey(10, 30, 90, 21), counted, output=tmp_path)
    assert len(SCORED) == 5


def test_what_cannot_be_scored_is_named_by_row_and_column():
    def broken(prompts, samples):
        return [math.nan if prompt == "p1" else 1.0 for prompt in prompts]

    with pytest.raises(RewardError, match=re.escape("reward 'broken': row 1, column 'chosen': returned nan")):
        relabel(grey(10, 30, 90, 20), broken)
    damaged = image_pairs([("p", png(PILImage.new("RGB", (4, 4))), {"bytes": b"no image", "path": None})])
    with pytest.raises(ValueError, match="row 0, column 'rejected': .*Repair the row"):
        relabel(damaged, brightness)
    with pytest.raises(TypeError, match="dataset is a IterableDataset"):
        relabel(grey(1, 2).to_iterable_dataset(), brightness)
    with pytest.raises(ValueError, match="dataset has no rows"):
        relabel(grey(1, 2).select([]), brightness)

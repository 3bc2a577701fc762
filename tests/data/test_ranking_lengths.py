"""Rankings of several lengths: what is encoded, which rows make a batch, and what is said of those that do not fit."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from helpers.encoding import encoder_of
from helpers.pipelines import RESOLUTION, build_tiny_pipeline, png
from PIL import Image as PILImage

from trl_diffusion_pref.data import EncodingOptions, Layout, load_encoded_dataset
from trl_diffusion_pref.data.buckets import BucketOptions
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.training.loaders import layout_of


ANY = Layout(samples=("images",), samples_per_cell=4, fewest_per_cell=2, scalars=("scores",))
FEATURES = Features({"prompt": Value("string"), "images": List(Image()), "scores": List(Value("float32"))})


def rankings(lengths: list[int], size: tuple[int, int] = (RESOLUTION, RESOLUTION)) -> Dataset:
    rows = []
    for row, length in enumerate(lengths):
        images = [png(PILImage.effect_noise(size, 10 + 7 * row + index).convert("RGB")) for index in range(length)]
        rows.append({"prompt": f"prompt {row}", "images": images, "scores": [float(n) for n in range(length)]})
    return Dataset.from_list(rows, features=FEATURES)


def encoded(dataset: Dataset, folder, layout: Layout | None = None, **options):
    pipeline = build_tiny_pipeline()
    family = family_for(pipeline)
    layout = layout or layout_of(ANY, family, dataset, None)
    encoder = encoder_of(pipeline, family, EncodingOptions(RESOLUTION, **options), cache_folder=folder, layout=layout)
    encoder.add_prompts([dataset])
    return encoder.encode(dataset, "train_dataset")


def test_every_row_has_its_own_samples_and_scores(tmp_path):
    lengths = [2, 3, 2, 5, 3]
    dataset = rankings(lengths)
    rows = encoded(dataset, tmp_path)
    for row, length in enumerate(lengths):
        assert rows[row]["latents/mean"].shape == (length, 4, 8, 8)
        assert rows[row]["scalar/scores"].tolist() == list(range(length))
        # As a fixed layout of that length has it.
        alone = encoded(dataset.select([row]), tmp_path / "alone", Layout(("images",), length, scalars=("scores",)))
        torch.testing.assert_close(alone[0]["latents/mean"], rows[row]["latents/mean"], rtol=0, atol=1e-5)
    assert rows.most_samples == 5


def test_rows_of_one_length_make_a_batch_and_are_saved_so(tmp_path):
    rows = encoded(rankings([2, 3, 2, 3]), tmp_path)
    assert rows.buckets.tolist() == [0, 1, 0, 1]
    rows.save_to_disk(tmp_path / "saved")
    again = load_encoded_dataset(tmp_path / "saved")
    assert again.most_samples == 3 and again[1]["scalar/scores"].tolist() == [0.0, 1.0, 2.0]
    assert layout_of(ANY, family_for(build_tiny_pipeline()), again, None).samples_per_cell == 3


def test_lengths_and_shapes_divide_rows_together(tmp_path):
    wide, square = rankings([2, 3], (2 * RESOLUTION, RESOLUTION)), rankings([3, 2])
    dataset = Dataset.from_list([*wide.to_list(), *square.to_list()], features=FEATURES)
    rows = encoded(dataset, tmp_path, buckets=BucketOptions(enabled=True))
    shapes = [tuple(rows[row]["latents/mean"].shape) for row in range(4)]
    assert [shape[0] for shape in shapes] == [2, 3, 3, 2]
    assert shapes[0][2:] == shapes[1][2:] != shapes[2][2:] == shapes[3][2:]
    assert len(set(rows.buckets.tolist())) == 4
    assert [rows.sizes[bucket] for bucket in rows.buckets.tolist()][:1] != [(RESOLUTION, RESOLUTION)]


def test_lengths_that_do_not_fit_are_named(tmp_path):
    dataset = rankings([2, 1, 3])
    with pytest.raises(ValueError, match="row 1, column 'images': found a list of 1, wanted a list of 2 to 3"):
        encoded(dataset, tmp_path)
    scores = dataset.select([0, 2]).to_list()
    scores[1]["scores"] = [0.0, 1.0]
    with pytest.raises(ValueError, match="row 1, column 'scores': has 2 numbers for 3 samples"):
        encoded(Dataset.from_list(scores, features=FEATURES), tmp_path)
    scores[1]["scores"] = [0.0, np.nan, 1.0]
    with pytest.raises(ValueError, match="row 1, column 'scores': is nan, not a finite number"):
        encoded(Dataset.from_list(scores, features=FEATURES), tmp_path)


def test_a_stream_s_rankings_are_as_long_as_its_first(tmp_path):
    stream = rankings([3, 3]).to_iterable_dataset()
    layout = layout_of(ANY, family_for(build_tiny_pipeline()), stream, None)
    assert (layout.samples_per_cell, layout.fewest_per_cell) == (3, None)

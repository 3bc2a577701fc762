"""Rows of one sample: from pairs of any layout, and columns of numbers that are added without copying media."""

import io

import numpy as np
import pytest
from datasets import Dataset
from helpers.pipelines import image_pairs, png
from PIL import Image as PILImage

from trl_diffusion_pref.data import Layout, PairOptions
from trl_diffusion_pref.data.bad_rows import RowProblem
from trl_diffusion_pref.data.layouts import sample_column
from trl_diffusion_pref.data.single_samples import single_samples
from trl_diffusion_pref.data.stored import group_numbers, with_column
from trl_diffusion_pref.families import all_families


VOTES = Layout(samples=("image",), scalars=("label",))
BOTH = {"chosen": 1.0, "rejected": 0.0}


def cell(shade: int) -> dict:
    return png(PILImage.new("RGB", (8, 8), (shade, 0, 0)))


def shade(image: PILImage.Image | dict) -> int:
    # A stream's cells are undecoded.
    image = PILImage.open(io.BytesIO(image["bytes"])) if isinstance(image, dict) else image
    return image.getpixel((0, 0))[0]


@pytest.fixture
def pairs() -> Dataset:
    return image_pairs([(f"prompt {row}", cell(10 + row), cell(20 + row)) for row in range(4)])


def rows_of(dataset, **options) -> list[tuple]:
    rows, _ = single_samples(
        dataset, "train_dataset", VOTES, PairOptions(), **{"sides": BOTH, "scalar": "label", **options}
    )
    return [(row["prompt"], shade(row["image"]), row.get("label")) for row in rows]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_pair_becomes_a_liked_and_a_disliked_row(pairs, streamed):
    shuffled = pairs.select([2, 0, 0])
    given = shuffled.to_iterable_dataset() if streamed else shuffled
    wanted = [(f"prompt {row}", 10 * side + row, label) for row in (2, 0, 0) for side, label in ((1, 1.0), (2, 0.0))]
    assert rows_of(given) == wanted
    chosen = rows_of(given, sides={"chosen": 1.0}, scalar=None)
    assert chosen == [("prompt 2", 12, None), ("prompt 0", 10, None), ("prompt 0", 10, None)]


@pytest.mark.parametrize("streamed", [False, True])
def test_soft_labels_take_the_place_of_votes_where_asked(pairs, streamed):
    pairs = pairs.select(range(2)).add_column("soft_label", [0.75, 0.5])
    given = pairs.to_iterable_dataset() if streamed else pairs
    assert [label for *_, label in rows_of(given, soft=True)] == [0.75, 0.25, 0.5, 0.5]
    assert [label for *_, label in rows_of(given)] == [1.0, 0.0, 1.0, 0.0]


def test_pick_a_pic_s_columns_become_votes_without_ties(pairs):
    columns = {"chosen": "jpg_0", "rejected": "jpg_1", "prompt": "caption"}
    picked = pairs.rename_columns(columns).add_column("label_0", [0.0, 1.0, 0.5, 1.0])
    assert rows_of(picked) == [
        ("prompt 0", 20, 1.0),
        ("prompt 0", 10, 0.0),
        ("prompt 1", 11, 1.0),
        ("prompt 1", 21, 0.0),
        ("prompt 3", 13, 1.0),
        ("prompt 3", 23, 0.0),
    ]


def test_a_problem_is_named_by_the_row_and_column_of_the_pair(pairs):
    columns = {"chosen": "jpg_0", "rejected": "jpg_1", "prompt": "caption"}
    picked = pairs.rename_columns(columns).add_column("label_0", [0.5, 0.0, 1.0, 1.0])
    _, source = single_samples(picked, "train_dataset", VOTES, PairOptions(), sides=BOTH, scalar="label")
    found = source.all_problems(
        [RowProblem(0, "column 'image'", "broken", "kind"), RowProblem(3, "column 'image'", "broken", "kind")]
    )
    assert [(problem.row, problem.place) for problem in found] == [(1, "column 'jpg_1'"), (2, "column 'jpg_1'")]
    assert source.rows == 4
    _, source = single_samples(pairs, "train_dataset", VOTES, PairOptions(), sides=BOTH, scalar="label")
    [found] = source.all_problems([RowProblem(5, "column 'image'", "broken", "kind")])
    assert (found.row, found.place) == (2, "column 'rejected'")


def test_single_samples_stay_and_unknown_columns_are_left_to_the_check(pairs):
    votes = pairs.rename_column("chosen", "image").remove_columns("rejected").add_column("label", [1, 0, 1, 0])
    for dataset in (votes, pairs.remove_columns("chosen")):
        assert single_samples(dataset, "train_dataset", VOTES, PairOptions(), sides=BOTH, scalar="label") == (
            dataset,
            None,
        )


def test_pairs_of_edits_are_refused_where_the_source_would_be_the_sample(pairs):
    edits = pairs.add_column("image", [None] * 4)
    with pytest.raises(ValueError, match="chosen and rejected beside image"):
        rows_of(edits)


def test_the_column_of_a_sample_is_the_modality_or_what_was_edited():
    for family in all_families():
        conditioned = family.modality in family.condition_images
        assert sample_column(family) == ("edited_image" if conditioned else family.modality)


def test_a_column_is_added_to_a_selection_without_copying_it(pairs):
    chosen = pairs.select([3, 1])
    found = with_column(chosen, "reward", np.asarray([0.5, -2.0], dtype=np.float32))
    assert found["reward"] == [0.5, -2.0] and found["prompt"] == ["prompt 3", "prompt 1"]
    assert [shade(image) for image in found["chosen"]] == [13, 11]
    # The table is the whole one, so nothing was copied.
    assert len(found.data) == 4
    lists = with_column(chosen, "scores", np.asarray([[1.0, 2.0], [3.0, 4.0]]))
    assert lists["scores"] == [[1.0, 2.0], [3.0, 4.0]]


def test_rows_of_one_prompt_are_one_group():
    dataset = Dataset.from_dict({"prompt": ["b", "a", "b", "c", "a"], "reward": [0.0] * 5})
    assert group_numbers(dataset).tolist() == [0, 1, 0, 2, 1]
    several = Dataset.from_dict({"prompt": [["a", "b"], ["a"], ["a", "b"]]})
    assert group_numbers(several).tolist() == [0, 1, 0]

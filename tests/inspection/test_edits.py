"""Inspecting pairs with condition images: what is counted, and what a model makes of them."""

import pytest
from datasets import Dataset
from helpers import tiny
from helpers.pictures import encoded, picture
from helpers.pipelines import build_tiny_pipeline
from PIL import Image

from trl_diffusion_pref import inspect_dataset


def pairs(count: int) -> list[dict]:
    return [
        {"prompt": f"p{row}", "chosen": encoded(picture(2 * row, 32)), "rejected": encoded(picture(2 * row + 1, 32))}
        for row in range(count)
    ]


@pytest.mark.parametrize("column", ["image", "images"])
def test_samples_that_are_their_source_are_counted_by_side(column, tmp_path):
    source, other, third = (encoded(picture(number, 32)) for number in (1, 2, 3))
    rows = [
        {"prompt": "a", "chosen": other, "rejected": source, column: [source]},
        {"prompt": "b", "chosen": source, "rejected": other, column: [third, source]},
        {"prompt": "c", "chosen": other, "rejected": third, column: [source]},
        {"prompt": "d", "chosen": source, "rejected": other, column: [b"damaged"]},
    ]
    found = inspect_dataset(Dataset.from_list(rows))
    assert (found.duplicates.unedited_rejected.rows, found.duplicates.unedited_chosen.rows) == ([0], [1])
    assert "chosen = source       1 row" in str(found) and "rejected = source     1 row" in str(found)
    assert [problem["place"] for problem in found.bad_rows.examples] == [f"column '{column}', number 0"]
    plain = inspect_dataset(Dataset.from_list(pairs(2)))
    assert plain.duplicates.unedited_chosen is None and "= source" not in str(plain)


def test_a_model_that_does_not_fit_condition_images_is_noted(tmp_path):
    rows = [{**row, "image": encoded(picture(90 + number, 32))} for number, row in enumerate(pairs(2))]
    found = inspect_dataset(Dataset.from_list(rows), model=build_tiny_pipeline())
    assert "takes no condition images; training refuses the column 'image'." in found.notes[0]
    found = inspect_dataset(Dataset.from_list(pairs(2)), model=tiny.build("instruct_pix2pix"))
    assert "edits images; training needs the column 'image' too, which is not there." in found.notes[0]


def test_masks_are_read_as_well(tmp_path):
    row = {**pairs(1)[0], "image": encoded(picture(90, 32))}
    rows = [{**row, "mask_image": mask} for mask in (encoded(picture(91, 32)), b"damaged")]
    found = inspect_dataset(Dataset.from_list(rows), contact_sheet=tmp_path / "sheet.png")
    assert [problem["place"] for problem in found.bad_rows.examples] == ["column 'mask_image'"]
    assert "columns 'image', 'mask_image'" in found.notes[0]
    # Two cards of source, mask, chosen and rejected.
    assert Image.open(tmp_path / "sheet.png").width == 2 * (4 * 256 + 3 * 6 + 2 * 12 + 24) + 24
    without = Dataset.from_list(rows).remove_columns("mask_image")
    found = inspect_dataset(without, model=tiny.build("stable_diffusion_inpaint"))
    assert "training needs the column 'mask_image' too" in found.notes[0]

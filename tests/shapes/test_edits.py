import numpy as np
import pytest
from datasets import Image

from trl_diffusion_pref.shapes import (
    COLOURS,
    STYLES,
    Edit,
    Scene,
    draw,
    edit_pairs,
    edit_prompts,
    judge,
    random_edit,
)


@pytest.mark.parametrize(
    ("value", "instruction", "target"),
    [
        ("blue", "make it blue", Scene("square", "blue", "filled", 9, 15, 18)),
        ("outlined", "make it outlined", Scene("square", "red", "outlined", 9, 15, 18)),
    ],
)
def test_an_edit_changes_the_one_thing_that_it_names(value, instruction, target):
    edit = Edit(Scene("square", "red", "filled", 9, 15, 18), value)
    assert edit.instruction == instruction
    assert edit.target == target


def test_random_edits_change_something_half_of_them_the_style():
    rng = np.random.default_rng(0)
    edits = [random_edit(rng) for _ in range(600)]
    assert all(edit.target != edit.source for edit in edits)
    assert {edit.value for edit in edits} == {*COLOURS, *STYLES}
    # standard error 0.02
    assert np.mean([edit.value in STYLES for edit in edits]) == pytest.approx(0.5, abs=0.06)


def test_edit_prompts_are_instructions_and_drawings():
    dataset = edit_prompts(20, seed=3)
    assert dataset.column_names == ["prompt", "image"]
    for row, verdict in zip(dataset, judge(list(dataset["image"])), strict=True):
        assert row["prompt"].removeprefix("make it ") in {*COLOURS, *STYLES} - {verdict.colour, verdict.style}


def test_chosen_is_the_edit_in_place_and_rejected_the_edit_elsewhere():
    dataset = edit_pairs(40, seed=1)
    assert dataset.column_names == ["prompt", "image", "chosen", "rejected"]
    sources, chosen, rejected = (judge(list(dataset[column])) for column in ("image", "chosen", "rejected"))
    for prompt, source, better, worse in zip(dataset["prompt"], sources, chosen, rejected, strict=True):
        value = prompt.removeprefix("make it ")
        style, colour = (value, source.colour) if value in STYLES else (source.style, value)
        target = Scene(source.shape, colour, style, source.radius, source.x, source.y)
        assert Scene(better.shape, better.colour, better.style, better.radius, better.x, better.y) == target
        assert (worse.shape, worse.colour, worse.style) == (source.shape, colour, style)
        assert max(abs(worse.radius - source.radius), abs(worse.x - source.x), abs(worse.y - source.y)) > 1


def test_the_source_itself_can_be_the_rejected_image():
    dataset = edit_pairs(20, seed=1, rejected="source")
    raw = dataset.cast_column("image", Image(decode=False)).cast_column("rejected", Image(decode=False))
    assert raw["image"] == raw["rejected"]
    assert all(row["chosen"].tobytes() != row["rejected"].tobytes() for row in dataset)


def test_the_seed_decides_all_edits():
    first, again, other = (edit_pairs(5, seed=seed) for seed in (3, 3, 4))
    assert first._fingerprint == again._fingerprint != other._fingerprint


def test_bad_arguments_of_edits_are_refused():
    with pytest.raises(ValueError, match="rejected='worse' is not one of elsewhere, source"):
        edit_pairs(1, rejected="worse")
    with pytest.raises(ValueError, match="n=0"):
        edit_prompts(0)


def test_images_to_edit_are_the_drawings():
    scene = judge([edit_prompts(1, seed=5)[0]["image"]])[0]
    drawn = draw(Scene(scene.shape, scene.colour, scene.style, scene.radius, scene.x, scene.y))
    assert drawn.tobytes() == edit_prompts(1, seed=5)[0]["image"].tobytes()

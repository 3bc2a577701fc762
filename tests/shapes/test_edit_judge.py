from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_pref.shapes import Scene, draw, edits_reward, judge_edits, summarize_edits


SOURCE = Scene("circle", "red", "filled", 9, 15, 16)
BLUE = replace(SOURCE, colour="blue")
OUTLINED = replace(SOURCE, style="outlined")
# What the result shows, the instruction, and whether the edit was made, the shape in place, and the rest kept.
CASES = {
    "a new colour": (BLUE, "make it blue", (True, True, True)),
    "a new style": (OUTLINED, "make it outlined", (True, True, True)),
    "nothing changed": (SOURCE, "make it blue", (False, True, True)),
    "another colour": (replace(SOURCE, colour="green"), "make it blue", (False, True, True)),
    "the wrong edit": (OUTLINED, "make it blue", (False, True, False)),
    "the style too": (replace(BLUE, style="outlined"), "make it blue", (True, True, False)),
    "the colour too": (replace(OUTLINED, colour="black"), "make it outlined", (True, True, False)),
    "another shape": (replace(BLUE, shape="square"), "make it blue", (True, False, True)),
    "a pixel away": (replace(BLUE, x=14), "make it blue", (True, True, True)),
    "two pixels left": (replace(BLUE, x=13), "make it blue", (True, False, True)),
    "two pixels down": (replace(OUTLINED, y=18), "make it outlined", (True, False, True)),
    "smaller": (replace(BLUE, radius=7), "make it blue", (True, False, True)),
}


@pytest.mark.parametrize(("shown", "instruction", "expected"), CASES.values(), ids=CASES)
def test_each_fault_of_an_edit_is_found_by_itself(shown, instruction, expected):
    (verdict,) = judge_edits([draw(shown)], [instruction], [draw(SOURCE)])
    assert (verdict.made, verdict.in_place, verdict.rest_kept) == expected
    assert verdict.made_in_place == (expected[0] and expected[1])
    (score,) = edits_reward([instruction], [draw(shown)], image=[draw(SOURCE)], further=["ignored"])
    assert score == pytest.approx(sum(expected), abs=2e-3)


def test_filling_an_outline_is_an_edit_too():
    (verdict,) = judge_edits([draw(SOURCE)], ["make it filled"], [draw(OUTLINED)])
    assert verdict.made_in_place and verdict.rest_kept


def test_of_two_equally_right_edits_the_cleaner_one_scores_higher():
    pixels = np.asarray(draw(BLUE)).copy()
    pixels[0, 0] = 0  # from white: three channels change by 1
    clean, touched = edits_reward(["make it blue"] * 2, [draw(BLUE), Image.fromarray(pixels)], [draw(SOURCE)] * 2)
    assert clean - touched == pytest.approx(np.sqrt(3 / (32 * 32 * 3)), rel=0.05)


def test_shares_of_edits_count_each_fact_by_itself():
    styled = replace(BLUE, style="outlined")
    shown = [styled, SOURCE, replace(BLUE, shape="square"), replace(SOURCE, x=12), replace(styled, y=12)]
    summary = summarize_edits([draw(scene) for scene in shown], ["make it blue"] * 5, [draw(SOURCE)] * 5)
    assert (summary.made_in_place, summary.made, summary.in_place, summary.rest_kept) == (0.2, 0.6, 0.4, 0.6)
    assert summary.count == 5


@pytest.mark.parametrize("instruction", ["make it pink", "blue", "a blue circle"])
def test_other_instructions_are_refused(instruction):
    with pytest.raises(ValueError, match=f"'{instruction}' is not \"make it \" with one of red, green"):
        judge_edits([draw(BLUE)], [instruction], [draw(SOURCE)])


def test_as_many_sources_as_edited_images_are_needed():
    with pytest.raises(ValueError, match="2 images, 2 instructions and 1 sources"):
        judge_edits([draw(BLUE)] * 2, ["make it blue"] * 2, [draw(SOURCE)])

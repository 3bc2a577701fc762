import itertools

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_pref.shapes import COLOURS, SHAPES, STYLES, Scene, draw, judge, shapes_reward, summarize


def test_every_kind_of_drawing_is_recognised():
    scenes = [
        Scene(shape, colour, style, radius, 14, 17)
        for shape, colour, style, radius in itertools.product(SHAPES, COLOURS, STYLES, (7, 10))
    ]
    for scene, verdict in zip(scenes, judge([draw(scene) for scene in scenes]), strict=True):
        assert (verdict.shape, verdict.colour, verdict.style) == (scene.shape, scene.colour, scene.style)
        assert verdict.distance < 2e-3 and verdict.clean
        assert verdict.prompt == scene.prompt


def test_distance_is_the_root_mean_squared_difference():
    scene = Scene("circle", "red", "filled", 9, 16, 16)
    pixels = np.asarray(draw(scene)).astype(np.int64)
    touched = pixels.copy()
    touched[0, 0] = 0  # from white: three channels change by 1
    (verdict,) = judge([Image.fromarray(touched.astype(np.uint8))])
    assert verdict.distance == pytest.approx(np.sqrt(3 / (32 * 32 * 3)), rel=1e-2)


def test_noise_is_not_clean():
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(4)]
    blank = Image.new("RGB", (32, 32), "white")
    assert not any(verdict.clean for verdict in judge([*noise, blank]))


def test_drawings_survive_a_little_noise():
    rng = np.random.default_rng(1)
    scene = Scene("triangle", "green", "outlined", 8, 12, 20)
    noisy = np.clip(np.asarray(draw(scene)) + rng.normal(0, 12, (32, 32, 3)), 0, 255).astype(np.uint8)
    (verdict,) = judge([Image.fromarray(noisy)])
    assert (verdict.shape, verdict.colour, verdict.style, verdict.clean) == ("triangle", "green", "outlined", True)


def test_summary_counts_each_share_by_itself():
    images = [
        draw(Scene("circle", "red", "outlined", 9, 16, 16)),
        draw(Scene("circle", "blue", "filled", 9, 16, 16)),
        draw(Scene("square", "red", "filled", 9, 16, 16)),
        Image.new("RGB", (32, 32), "white"),
    ]
    summary = summarize(images[:3], ["a red circle"] * 3)
    assert (summary.preferred, summary.colour, summary.shape, summary.clean) == (1 / 3, 2 / 3, 2 / 3, 1.0)
    assert summarize(images, ["a red circle"] * 4).clean == 0.75
    assert summarize(images[:3], ["a red circle"] * 3, "filled").preferred == pytest.approx(2 / 3)


@pytest.mark.parametrize(("style", "in_style"), [("outlined", True), ("filled", False)])
def test_an_outline_may_be_as_unclean_as_the_base_s_own(style, in_style):
    noise = np.random.default_rng(0).choice([-18, 18], size=(32, 32, 3))
    # Away from black and white, so that nothing is clipped.
    drawn = np.asarray(draw(Scene("circle", "red", style, 9, 16, 16))).astype(int).clip(18, 237)
    (verdict,) = judge([Image.fromarray((drawn + noise).astype(np.uint8))])
    assert verdict.style == style and 0.08 < verdict.distance < 0.12
    assert not verdict.clean
    assert verdict.clean_in_style == in_style


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="image 1 has 64x32"):
        judge([Image.new("RGB", (32, 32)), Image.new("RGB", (64, 32))])
    assert judge([]) == []


def test_reward_counts_what_is_right_and_prefers_the_cleaner_image():
    right = draw(Scene("circle", "red", "outlined", 9, 16, 16))
    pixels = np.asarray(right).copy()
    pixels[0, 0] = 0
    touched = Image.fromarray(pixels)
    filled_square = draw(Scene("square", "red", "filled", 9, 16, 16))
    scores = shapes_reward(["a red circle"] * 3, [right, touched, filled_square])
    assert scores == pytest.approx([3, 3 - np.sqrt(3 / (32 * 32 * 3)), 1], abs=5e-3) and scores[0] > scores[1]
    assert shapes_reward(["a red square"], [filled_square], "filled") == pytest.approx([3], abs=5e-3)
    with pytest.raises(ValueError):
        shapes_reward(["a red circle"], [right, right])

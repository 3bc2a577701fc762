import numpy as np
import pytest

from trl_diffusion_pref.shapes import COLOURS, IMAGE_SIZE, SHAPES, STYLES, Scene, draw, prompts, random_scene
from trl_diffusion_pref.shapes.drawing import BACKGROUND, coverage, layouts


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi * 10**2),
        ("square", (2 * 0.88 * 10) ** 2),
        ("triangle", 3 * np.sqrt(3) / 4 * (1.2 * 10) ** 2),
    ],
)
def test_painted_area_is_the_shape_s(shape, area):
    assert coverage(shape, "filled", 10, 16, 16).sum() == pytest.approx(area, rel=0.03)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi * (10**2 - 8**2)),
        ("square", 17.6**2 - 13.6**2),
        ("triangle", 3 * np.sqrt(3) / 4 * (12**2 - 8**2)),
    ],
)
def test_outlines_are_two_pixels_thick(shape, area):
    assert coverage(shape, "outlined", 10, 16, 16).sum() == pytest.approx(area, rel=0.05)


def test_colour_inside_and_background_outside():
    image = np.asarray(draw(Scene("square", "blue", "filled", 8, 16, 16)))
    assert tuple(image[16, 16]) == COLOURS["blue"]
    assert tuple(image[0, 0]) == BACKGROUND
    hollow = np.asarray(draw(Scene("square", "blue", "outlined", 8, 16, 16)))
    assert tuple(hollow[16, 16]) == BACKGROUND


def test_everything_stays_inside_the_picture():
    for shape in SHAPES:
        for radius, x, y in layouts():
            painted = coverage(shape, "filled", radius, x, y)
            border = np.concatenate([painted[0], painted[-1], painted[:, 0], painted[:, -1]])
            assert border.max() == 0.0, (shape, radius, x, y)


def test_position_is_the_centre():
    painted = coverage("circle", "filled", 9, 13, 18)
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5
    assert (painted * columns).sum() / painted.sum() == pytest.approx(13, abs=0.1)
    assert (painted * rows).sum() / painted.sum() == pytest.approx(18, abs=0.1)


def test_prompts_name_colour_and_shape_with_the_right_article():
    assert len(set(prompts())) == len(COLOURS) * len(SHAPES)
    assert "an orange square" in prompts() and "a red circle" in prompts()
    assert not any(style in prompt for prompt in prompts() for style in STYLES)


def test_random_scenes_cover_all_that_can_be_drawn():
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, "filled") for _ in range(4000)]
    assert {scene.shape for scene in scenes} == set(SHAPES)
    assert {scene.colour for scene in scenes} == set(COLOURS)
    assert {scene.radius for scene in scenes} == {radius for radius, _, _ in layouts()}
    assert {(s.radius, s.x, s.y) for s in scenes} <= set(layouts())

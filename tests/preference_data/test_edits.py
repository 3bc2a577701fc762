"""Pairs and comparisons of edits: prompts with the images that they say how to edit."""

import json

import pytest
from datasets import Dataset, Features, Image, Value
from helpers import tiny
from helpers.pipelines import build_tiny_pipeline, png
from helpers.tiny_instruct_pix2pix import images
from PIL import ImageChops, ImageStat

from trl_diffusion_pref import MaPOTrainer, load_pairs, make_pairs, make_rankings
from trl_diffusion_pref.evaluation import compare


NAME = "instruct_pix2pix"
FAST = {"num_inference_steps": 2, "samples_per_prompt": 2}
SOURCES = images((16, 16), 2)


def edits(rows: list[tuple]) -> Dataset:
    columns = {"prompt": [prompt for prompt, _ in rows], "image": [image and png(image) for _, image in rows]}
    return Dataset.from_dict(columns, features=Features({"prompt": Value("string"), "image": Image()}))


ROWS = [("make it red", SOURCES[0]), ("make it red", SOURCES[1]), ("make it blue", SOURCES[1])]


def stays(prompts, samples, image, **columns) -> list[float]:
    """Minus the mean difference from the image that was edited."""
    pairs = zip(samples, image, strict=True)
    return [-sum(ImageStat.Stat(ImageChops.difference(sample, source)).mean) for sample, source in pairs]


def test_pairs_of_edits_have_the_edited_image_and_train(tmp_path, config):
    pipeline = tiny.build(NAME)
    pairs = make_pairs(pipeline, edits(ROWS), stays, tmp_path / "made", **FAST)
    assert [(pair["prompt"], pair["image"].tobytes()) for pair in pairs] == [(p, i.tobytes()) for p, i in ROWS]
    for pair in pairs:
        assert pair["chosen_score"] == pytest.approx(stays([], [pair["chosen"]], [pair["image"]])[0])
        assert pair["chosen_score"] > pair["rejected_score"]
    stored = load_pairs(tmp_path / "made" / "pairs")
    args = config(max_steps=1, per_device_train_batch_size=2, resolution=16)
    assert MaPOTrainer(pipeline, args, stored).train().global_step == 1


def test_a_prompt_is_made_once_for_each_image(tmp_path, caplog):
    pairs = make_pairs(tiny.build(NAME), edits([*ROWS, ROWS[0]]), stays, tmp_path, **FAST)
    assert len(pairs) == len(ROWS)
    assert "3 rows; left out: 1 whose prompt and image came before" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", SOURCES[0]), ("b", None)], "row 1, column 'image': the image is None"),
        ([("a", SOURCES[0]), (" ", SOURCES[0])], "prompts, row 1: ' ' is empty"),
    ],
)
def test_prompts_of_edits_that_cannot_be_used_are_named(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_pairs(tiny.build(NAME), edits(rows), stays, tmp_path, **FAST)


def test_a_pipeline_of_text_alone_refuses_prompts_with_images(tmp_path):
    with pytest.raises(ValueError, match="generates from text alone.*StableDiffusionInstructPix2PixPipeline"):
        make_pairs(build_tiny_pipeline(), edits(ROWS), stays, tmp_path, **FAST)


def test_rankings_of_edits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Rankings of edits"):
        make_rankings(tiny.build(NAME), edits(ROWS), stays, tmp_path, **FAST)


def test_a_comparison_gives_rewards_the_edited_images(tmp_path):
    pipeline, prompts = tiny.build(NAME), [prompt for prompt, _ in ROWS]
    found = compare(pipeline, tiny.build(NAME, seed=1), prompts, stays, tmp_path, images=[i for _, i in ROWS], **FAST)
    assert found.scores["base"]["stays"].shape == (3, 2)
    assert json.loads((tmp_path / "comparison.json").read_text())["prompts"] == prompts
    with pytest.raises(ValueError, match="'make it red' comes twice"):
        compare(pipeline, tiny.build(NAME), prompts, stays, tmp_path / "b", images=[SOURCES[0]] * 3, **FAST)

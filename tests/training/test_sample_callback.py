"""Samples while a model is trained: they change nothing, and reach files and trackers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.pipelines import build_tiny_pipeline
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from trl_diffusion_pref import MaPOTrainer, SampleCallback
from trl_diffusion_pref.data.decode.audio import Waveform
from trl_diffusion_pref.evaluation import sample, seeds_for
from trl_diffusion_pref.evaluation.condition_images import ConditionImages
from trl_diffusion_pref.evaluation.sample_files import read_sample
from trl_diffusion_pref.training.sample_callback import side_by_side


PROMPTS = ["a red circle", "a blue square"]
CALL = {"num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    build_tiny_pipeline().save_pretrained(path)
    return path


def trained(config, folder, pairs, *, sampled: bool, **options) -> MaPOTrainer:
    trainer = MaPOTrainer(str(folder), config(max_steps=4, **options), pairs)
    if sampled:
        trainer.add_callback(SampleCallback(trainer, PROMPTS, every=2, **CALL))
    trainer.train()
    return trainer


@pytest.fixture
def run(config, folder, pairs):
    return trained(config, folder, pairs, sampled=True, report_to=["tensorboard"])


def test_weights_are_the_same_with_and_without_it(config, folder, pairs, run):
    plain = trained(config, folder, pairs, sampled=False)
    weights = run.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.model.state_dict().items())


def test_pictures_show_the_start_beside_the_present_model(run, folder, tmp_path):
    pictures = sorted(path.name for path in (tmp_path / "output" / "samples").glob("*.png"))
    assert pictures == ["step-000000.png", "step-000002.png", "step-000004.png"]
    seeds = seeds_for(PROMPTS)
    start = sample(build_tiny_pipeline(), PROMPTS, seeds, exact=False, show_progress=False, **CALL)
    last = sample(run.pipeline, PROMPTS, seeds, exact=False, show_progress=False, **CALL)
    for name, samples in (("step-000000.png", start), ("step-000004.png", last)):
        picture = np.asarray(Image.open(tmp_path / "output" / "samples" / name))
        assert np.array_equal(picture, np.asarray(side_by_side(list(start), list(samples), PROMPTS)))
    assert not np.array_equal(np.asarray(start[0]), np.asarray(last[0]))
    stored = read_sample(tmp_path / "output" / "samples" / "start" / "001.png")
    assert np.array_equal(np.asarray(stored), np.asarray(start[1]))


def test_tensorboard_has_the_pictures_by_step(run, tmp_path):
    (log,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    found = EventAccumulator(str(log)).Reload().Images("samples")
    assert [one.step for one in found] == [0, 2, 4]
    assert found[0].encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["_wandb", "_trackio"])
def test_other_trackers_get_pictures_with_their_step(name, config, folder, pairs):
    logged = []
    trainer = MaPOTrainer(str(folder), config(max_steps=2), pairs)
    tracker = SimpleNamespace(Image=lambda picture, caption: (picture.size, caption), log=logged.append)
    trainer.add_callback(type("Callback", (TrainerCallback,), {name: tracker})())
    trainer.add_callback(SampleCallback(trainer, PROMPTS[:1], every=2, **CALL))
    trainer.train()
    assert [entry["train/global_step"] for entry in logged] == [0, 2]
    assert [entry["samples"][1] for entry in logged] == ["step 0", "step 2"]


def test_a_resumed_run_shows_the_start_of_the_whole_run(config, folder, pairs, tmp_path):
    trained(config, folder, pairs, sampled=True, save_strategy="steps", save_steps=2)
    first = np.asarray(Image.open(tmp_path / "output" / "samples" / "step-000004.png"))
    trainer = MaPOTrainer(str(folder), config(max_steps=4, save_strategy="steps", save_steps=2), pairs)
    trainer.add_callback(SampleCallback(trainer, PROMPTS, every=2, **CALL))
    trainer.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-2"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "output" / "samples" / "step-000004.png")), first)


def test_videos_show_three_frames_and_audio_its_waveform():
    frames = [Image.new("RGB", (16, 8), (20 * number, 0, 0)) for number in range(9)]
    picture = np.asarray(side_by_side(None, [frames], ["a"]))
    assert {0, 80, 160} <= set(picture[40, :, 0].tolist())
    audio = Waveform(torch.linspace(-1, 1, 1600)[None], 16000)
    assert (np.asarray(side_by_side([audio], [audio], ["a"])) < 128).any()


def test_edited_images_stand_left_of_samples_of_any_size():
    red, green, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue"))
    flat = [Image.new("RGB", (64, 16), colour) for colour in ("red", "lime", "blue")]
    sources = {"image": ConditionImages([flat[0], [red, green]])}
    picture = np.asarray(side_by_side([flat[1], green], [flat[2], blue], PROMPTS, sources))
    # 16 pixels for the columns' names, 16 above each row for its prompt; 8 between all.
    first, second = 16 + 16, 16 + 16 + 64 + 8 + 16
    assert picture.shape[:2] == (second + 256 + 8 + 8, 8 + (512 + 8) + 2 * (256 + 8))
    places = (8 + 5, 8 + 256 + 5, 8 + 512 + 8 + 5, 8 + 512 + 8 + 256 + 8 + 5)
    colours = {(255, 0, 0): "red", (0, 255, 0): "lime", (0, 0, 255): "blue", (255, 255, 255): "white"}

    def shown(line: int) -> list[str]:
        return [colours[tuple(picture[line, x])] for x in places]

    for top, height, row in (
        (first, 64, ["red", "white", "lime", "blue"]),
        (second, 256, ["red", "lime", "lime", "blue"]),
    ):
        assert shown(top) == shown(top + height - 1) == row
        assert shown(top + height) == ["white"] * 4 and shown(top - 1)[2:] == ["white"] * 2


def test_images_to_edit_are_checked_before_training(config, tiny_pipeline, pairs):
    trainer = MaPOTrainer(tiny_pipeline, config(), pairs)
    with pytest.raises(ValueError, match="generates from text alone"):
        SampleCallback(trainer, PROMPTS, images=[Image.new("RGB", (16, 16))] * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"prompts": []}, "at least one prompt"), ({"prompts": "a cat"}, "pass a list"), ({"every": 0}, "every=0")],
)
def test_options_that_cannot_be_used_are_refused(options, message, config, tiny_pipeline, pairs):
    trainer = MaPOTrainer(tiny_pipeline, config(), pairs)
    with pytest.raises(ValueError, match=message):
        SampleCallback(trainer, **{"prompts": PROMPTS, **options})

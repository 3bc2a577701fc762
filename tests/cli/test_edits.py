"""The commands with images to edit, each on real files."""

import json
from pathlib import Path

import pytest
from datasets import load_from_disk
from helpers import tiny
from helpers.tiny_instruct_pix2pix import images
from PIL import ImageChops, ImageStat

from trl_diffusion_pref.cli import main


SAMPLING = ["--pipeline_kwargs", '{"num_inference_steps": 2}', "--samples_per_prompt", "2"]


def stays(prompts, samples, image) -> list[float]:
    """A reward of the user's own: minus the mean difference from the image that was edited."""
    pairs = zip(samples, image, strict=True)
    return [-sum(ImageStat.Stat(ImageChops.difference(sample, source)).mean) for sample, source in pairs]


STAYS = ["--rewards", f"{__name__}:stays"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.build("instruct_pix2pix").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("prompts")
    rows = []
    for number, image in enumerate(images((16, 16), 2)):
        image.save(folder / f"{number}.png")
        rows.append({"prompt": "make it red", "image": f"{number}.png"})
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "edits.jsonl")


@pytest.fixture(scope="module")
def made(model, prompts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    sampled = ["--model_name_or_path", model, "--prompts", prompts, *STAYS, *SAMPLING, "--output", str(folder)]
    assert main(["make-pairs", *sampled]) == 0
    assert main(["make-rankings", *sampled]) == 0
    return folder


def sources(folder: Path) -> list[bytes]:
    return [image.tobytes() for image in load_from_disk(str(folder))["image"]]


EDITED = [image.tobytes() for image in images((16, 16), 2)]


def test_pairs_and_rankings_of_edits_are_made_from_a_file(made):
    assert sources(made / "pairs") == sources(made / "rankings") == EDITED


def test_edits_are_scored_with_their_images(made, tmp_path):
    for kind, column in (("pairs", "chosen_score"), ("rankings", "scores")):
        assert main(["score", str(made / kind), *STAYS, "--output", str(tmp_path / kind)]) == 0
        scored, before = (load_from_disk(str(folder / kind)) for folder in (tmp_path / kind, made))
        assert scored[column] == before[column] and sources(tmp_path / kind / kind) == EDITED


def test_models_that_edit_are_compared_from_files_alone(model, prompts, made, tmp_path):
    compared = ["--model_name_or_path", model, "--tuned", f"same={model}", "--prompts", prompts, *STAYS, *SAMPLING]
    held_out = ["--dataset_name", str(made / "pairs"), "--dataset_split", "train"]
    assert main(["compare", *compared, *held_out, "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "comparison.json").read_text())["models"]
    assert report["same"]["rewards"]["stays"]["win rate"]["value"] == 0.5
    assert report["same"]["held-out preference accuracy"]["accuracy"] == 0.5
    assert '"sources": [["data:image/png' in (tmp_path / "index.html").read_text()


def test_models_that_edit_are_evaluated(model, made, tmp_path):
    words = ["--model_name_or_path", model, "--dataset_name", str(made / "pairs"), "--dataset_split", "train"]
    file = tmp_path / "accuracy.json"
    assert main(["evaluate", *words, "--tuned", model, "--draws", "2", "--output", str(file)]) == 0
    assert json.loads(file.read_text())["count"] == 2


def test_models_that_edit_are_trained_on_pairs_and_rankings(model, made, tmp_path):
    run = ["--model_name_or_path", model, "--use_cpu", "--disable_tqdm", "--save_strategy", "no", "--max_steps", "1"]
    data = ["--dataset_name", str(made / "pairs"), str(made / "rankings"), "--resolution", "16"]
    assert main(["mapo", *run, *data, "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "unet" / "config.json").is_file()


def test_a_mixture_of_prompts_keeps_the_images_to_edit(made):
    from trl_diffusion_pref import SelfNPOConfig, SelfNPOTrainer
    from trl_diffusion_pref.cli.data_sets import training_data
    from trl_diffusion_pref.cli.run_options import DataOptions

    options = DataOptions(dataset_name=[str(made / "pairs"), str(made / "rankings")])
    rows, _ = training_data(options, SelfNPOConfig(output_dir="unused", use_cpu=True), SelfNPOTrainer.layout)
    assert rows.column_names == ["prompt", "image"]
    assert [image.tobytes() for image in rows["image"]] == EDITED * 2

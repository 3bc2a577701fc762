"""Pairs, rankings, rounds and comparisons of edits: prompts with the images that they say how to edit."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value, load_from_disk
from helpers import tiny
from helpers.pipelines import build_tiny_pipeline, png
from helpers.several_images import several_images
from helpers.tiny_inpainting import masks
from helpers.tiny_instruct_pix2pix import images
from PIL import ImageChops, ImageStat

from trl_diffusion_pref import MaPOTrainer, load_pairs, make_pairs, make_rankings, relabel, train_in_rounds
from trl_diffusion_pref.evaluation import compare, sample
from trl_diffusion_pref.preference_data.prompts import read_edits


NAME = "instruct_pix2pix"
FAST = {"num_inference_steps": 2, "samples_per_prompt": 2}
SOURCES = images((16, 16), 2)
WIDE = images((16, 24), 1)[0]


def edits(rows: list[tuple]) -> Dataset:
    columns = {"prompt": [prompt for prompt, _ in rows], "image": [image and png(image) for _, image in rows]}
    return Dataset.from_dict(columns, features=Features({"prompt": Value("string"), "image": Image()}))


def edits_of_lists(rows: list[tuple]) -> Dataset:
    cells = [[png(image) for image in several] for _, several in rows]
    features = Features({"prompt": Value("string"), "image": List(Image())})
    return Dataset.from_dict({"prompt": [prompt for prompt, _ in rows], "image": cells}, features=features)


ROWS = [("make it red", SOURCES[0]), ("make it red", SOURCES[1]), ("make it blue", SOURCES[1])]
LISTS = [("put both together", [SOURCES[0], WIDE]), ("make it blue", [SOURCES[1]])]


def distance(sample, source) -> float:
    return sum(ImageStat.Stat(ImageChops.difference(sample, source)).mean)


def stays(prompts, samples, image, **columns) -> list[float]:
    """Minus the mean difference from the image that was edited."""
    return [-distance(sample, source) for sample, source in zip(samples, image, strict=True)]


def stays_with_last(prompts, samples, image, **columns) -> list[float]:
    """The same for lists of images, from the last one."""
    return [-distance(sample, sources[-1]) for sample, sources in zip(samples, image, strict=True)]


# Not enclosed by the reward, since what it encloses is part of what it computes.
SCORED: list[str] = []


def counted(prompts, samples, image) -> list[float]:
    SCORED.extend(prompts)
    return [float(np.asarray(sample, dtype=float).mean()) for sample in samples]


# ---- Pairs -------------------------------------------------------------------------------------------------------


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
    assert "task_categories:\n- image-to-image" in (tmp_path / "made" / "pairs" / "README.md").read_text()


def test_a_prompt_is_made_once_for_each_image(tmp_path, caplog):
    pairs = make_pairs(tiny.build(NAME), edits([*ROWS, ROWS[0]]), stays, tmp_path, **FAST)
    assert len(pairs) == len(ROWS)
    assert "3 prompts; left out: 1 whose prompt and image came before" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", SOURCES[0]), ("b", None)], "row 1, column 'image': the image is None"),
        ([("a", SOURCES[0]), (" ", SOURCES[0])], "prompts, row 1: the prompt is empty"),
    ],
)
def test_prompts_of_edits_that_cannot_be_used_are_named(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_pairs(tiny.build(NAME), edits(rows), stays, tmp_path, **FAST)


def test_a_pipeline_of_text_alone_refuses_prompts_with_images(tmp_path):
    with pytest.raises(ValueError, match="generates from text alone.*StableDiffusionInstructPix2PixPipeline"):
        make_pairs(build_tiny_pipeline(), edits(ROWS), stays, tmp_path, **FAST)


def test_every_kind_of_file_gives_the_same_edits(tmp_path):
    for number, (_, image) in enumerate(ROWS):
        image.save(tmp_path / f"{number}.png")
    rows = [{"prompt": prompt, "image": f"{number}.png"} for number, (prompt, _) in enumerate(ROWS)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("prompt,image\n" + "".join(f"{row['prompt']},{row['image']}\n" for row in rows))
    edits(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    edits(ROWS).save_to_disk(str(tmp_path / "stored"))
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "stored"):
        found = read_edits(tmp_path / name)
        assert found.prompts == [prompt for prompt, _ in ROWS]
        assert [image.tobytes() for image in found.images["image"]] == [image.tobytes() for _, image in ROWS]
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "image": "0.png"}\n{"prompt": "b"}')
    with pytest.raises(ValueError, match="b.jsonl, line 2, column 'image': the image is None"):
        read_edits(tmp_path / "b.jsonl")


def test_the_samples_of_rankings_are_no_images_to_edit():
    rows = {"prompt": ["a"], "images": [["x.png", "y.png"]], "scores": [[1.0, 0.0]]}
    assert read_edits(Dataset.from_dict(rows)).images == {}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_of_pairs_may_name_its_condition_images(streaming, tmp_path):
    for name, image in (("a.png", WIDE), ("b.png", SOURCES[0]), ("c.png", SOURCES[1])):
        image.save(tmp_path / name)
    row = {"prompt": "p", "chosen": "a.png", "rejected": "b.png", "image": ["c.png", "a.png"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    (found,) = load_pairs(tmp_path / "pairs.jsonl", streaming=streaming)
    assert found["image"] == [str(tmp_path / "c.png"), str(tmp_path / "a.png")]


# ---- Rankings, labels and rounds ---------------------------------------------------------------------------------


def test_rankings_of_edits_become_pairs_with_the_image(tmp_path, config):
    pipeline = tiny.build(NAME)
    rankings = make_rankings(pipeline, edits(ROWS), stays, tmp_path, **FAST)
    for row, (prompt, source) in zip(rankings, ROWS, strict=True):
        assert (row["prompt"], row["image"].tobytes()) == (prompt, source.tobytes())
        assert row["scores"] == pytest.approx(stays([], row["images"], [source] * 2))
    for streaming in (False, True):
        pairs = list(load_pairs(tmp_path / "rankings", streaming=streaming))
        sources = read_edits(Dataset.from_dict({"prompt": rankings["prompt"], "image": [p["image"] for p in pairs]}))
        assert [image.tobytes() for image in sources.images["image"]] == [image.tobytes() for _, image in ROWS]
    args = config(max_steps=1, per_device_train_batch_size=2, resolution=16)
    assert MaPOTrainer(pipeline, args, load_pairs(tmp_path / "rankings")).train().global_step == 1


@pytest.mark.parametrize("kept", [False, True])
def test_relabelling_gives_rewards_the_edited_image(kept, tmp_path):
    pairs = make_pairs(tiny.build(NAME), edits(ROWS), stays, tmp_path, **FAST)
    wrong = pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"}).select_columns(
        ["prompt", "chosen", "rejected", "image"]
    )
    found = relabel(wrong, stays, output=tmp_path / "labels" if kept else None)
    for row, pair in zip(found, pairs, strict=True):
        assert row["chosen"].tobytes() == pair["chosen"].tobytes()
        assert row["image"].tobytes() == pair["image"].tobytes()
        assert row["chosen_score"] == pytest.approx(pair["chosen_score"])
    rankings = make_rankings(tiny.build(NAME), edits(ROWS), stays, tmp_path, **FAST)
    again = relabel(rankings, stays)
    assert again["scores"] == rankings["scores"] and "image" in again.column_names


def test_scores_are_kept_by_sample_and_edited_image(tmp_path):
    SCORED.clear()
    for source in (SOURCES[0], SOURCES[1], SOURCES[0]):
        pairs = edits([("a", source)]).add_column("chosen", [png(WIDE)], feature=Image())
        relabel(pairs.add_column("rejected", [png(WIDE.rotate(180))], feature=Image()), counted, output=tmp_path)
    assert len(SCORED) == 4


def test_a_condition_image_that_cannot_be_read_is_named_when_scoring():
    broken = edits([("a", SOURCES[0]), ("b", None)])
    for side, source in (("chosen", WIDE), ("rejected", SOURCES[1])):
        broken = broken.add_column(side, [png(source)] * 2, feature=Image())
    with pytest.raises(ValueError, match="row 1, column 'image': the image is None. Repair the row"):
        relabel(broken, stays)


def test_rounds_train_on_edits_of_their_own(tmp_path, config):
    args = config(max_steps=1, per_device_train_batch_size=2, resolution=16, output_dir=str(tmp_path / "rounds"))
    found = train_in_rounds(MaPOTrainer, tiny.build(NAME), args, edits(ROWS), stays, rounds=2, **FAST)
    assert [one.pairs for one in found] == [3, 3]
    stored = load_from_disk(str(tmp_path / "rounds" / "round-2" / "data" / "pairs"))
    assert [image.tobytes() for image in stored["image"]] == [image.tobytes() for _, image in ROWS]
    other = edits([*ROWS[:2], ("make it blue", SOURCES[0])])
    with pytest.raises(ValueError, match="holds rounds of another call: prompts"):
        train_in_rounds(MaPOTrainer, tiny.build(NAME), args, other, stays, rounds=2, **FAST)


# ---- Several images ----------------------------------------------------------------------------------------------


def test_a_prompt_s_images_go_to_the_pipeline_in_one_call():
    with several_images() as pipeline:
        sources = [[SOURCES[0], WIDE], SOURCES[1]]
        found = sample(pipeline, ["a", "b"], [0, 1], images=sources, show_progress=False)
        assert pipeline.calls == [(["a"], [(16, 16), (24, 16)]), (["b"], [(16, 16)])]
        assert [one.size for one in found] == [(24, 16), (16, 16)]


def test_each_of_several_images_and_their_order_decide_a_sample_s_file(tmp_path):
    options = {"output": tmp_path, "show_progress": False}
    with several_images() as pipeline:
        made = [
            sample(pipeline, ["a"], [0], images=[several], **options).made
            for several in ([SOURCES[0], WIDE], [SOURCES[1], WIDE], [WIDE, SOURCES[0]], [SOURCES[0], WIDE])
        ]
    assert made == [1, 1, 1, 0]


def test_more_images_than_the_pipeline_takes_are_refused_by_prompt():
    with several_images() as pipeline:
        message = "number 1, for the prompt 'b': found 4 images, and a SeveralImagesPipeline takes 3 at most"
        with pytest.raises(ValueError, match=message):
            sample(pipeline, ["a", "b"], [0, 1], images=[[SOURCES[0]], [WIDE] * 4])
        with pytest.raises(ValueError, match="number 0: the list of images is empty"):
            sample(pipeline, ["a"], [0], images=[[]])
        with pytest.raises(ValueError, match="number 0, image 1: the image is None"):
            sample(pipeline, ["a"], [0], images=[[WIDE, None]])
    with pytest.raises(ValueError, match="found 2 images, and a StableDiffusionInstructPix2PixPipeline takes one"):
        sample(tiny.build(NAME), ["a"], [0], images=[[WIDE, WIDE]])


def test_pairs_from_several_images_have_all_of_them(tmp_path):
    with several_images() as pipeline:
        pairs = make_pairs(pipeline, edits_of_lists(LISTS), stays_with_last, tmp_path, samples_per_prompt=3)
    for pair, (prompt, sources) in zip(pairs, LISTS, strict=True):
        assert pair["prompt"] == prompt
        assert [image.tobytes() for image in pair["image"]] == [image.tobytes() for image in sources]
        assert pair["chosen_score"] == pytest.approx(-distance(pair["chosen"], sources[-1]))
    again = relabel(pairs, stays_with_last)
    assert again["chosen_score"] == pairs["chosen_score"]
    with several_images() as pipeline:
        rankings = make_rankings(pipeline, edits_of_lists(LISTS), stays_with_last, tmp_path, samples_per_prompt=3)
    assert [len(images) for images in rankings["image"]] == [2, 1]
    assert [len(images) for images in load_pairs(tmp_path / "rankings")["image"]] == [2, 1]


# ---- Comparisons -------------------------------------------------------------------------------------------------


def test_a_comparison_gives_rewards_the_edited_images(tmp_path):
    pipeline, prompts = tiny.build(NAME), [prompt for prompt, _ in ROWS]
    found = compare(pipeline, tiny.build(NAME, seed=1), prompts, stays, tmp_path, images=[i for _, i in ROWS], **FAST)
    assert found.scores["base"]["stays"].shape == (3, 2)
    assert json.loads((tmp_path / "comparison.json").read_text())["prompts"] == prompts
    with pytest.raises(ValueError, match="'make it red' comes twice with the same image"):
        compare(pipeline, tiny.build(NAME), prompts, stays, tmp_path / "b", images=[SOURCES[0]] * 3, **FAST)


def test_a_comparison_of_several_images_shows_each(tmp_path):
    prompts, sources = zip(*LISTS, strict=True)
    with several_images() as pipeline:
        tuned = tiny.build(NAME, seed=1).unet
        compare(pipeline, tuned, prompts, stays_with_last, tmp_path, images=sources, samples_per_prompt=1)
    page = (tmp_path / "index.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0].replace("<\\/", "</"))
    assert [len(urls) for urls in data["sources"]] == [2, 1]


# ---- Masks -------------------------------------------------------------------------------------------------------


def inpaints(rows: int) -> Dataset:
    columns = {"image": [png(image) for image in images((16, 16), rows)]}
    columns["mask_image"] = [png(image) for image in masks((16, 16), rows)]
    features = Features({"prompt": Value("string"), "image": Image(), "mask_image": Image()})
    return Dataset.from_dict({"prompt": [f"p{row}" for row in range(rows)], **columns}, features=features)


def seen_with_masks(prompts, samples, image, mask_image) -> list[float]:
    """Minus the mean difference outside the mask."""
    parts = zip(samples, image, mask_image, strict=True)
    kept = [(sample, source, mask.convert("L").point(lambda level: 255 - level)) for sample, source, mask in parts]
    return [-sum(ImageStat.Stat(ImageChops.difference(sample, source), mask).mean) for sample, source, mask in kept]


def test_pairs_of_inpainting_have_image_and_mask(tmp_path):
    size = {"height": 16, "width": 16}
    prompts = inpaints(2)
    pairs = make_pairs(tiny.build("stable_diffusion_inpaint"), prompts, seen_with_masks, tmp_path, **FAST, **size)
    for column in ("image", "mask_image"):
        assert [cell.tobytes() for cell in pairs[column]] == [cell.tobytes() for cell in prompts[column]]
    assert relabel(pairs, seen_with_masks)["chosen_score"] == pairs["chosen_score"]


def test_masks_that_do_not_fit_are_refused():
    pipeline, source = tiny.build("stable_diffusion_inpaint"), SOURCES[0]
    for given, message in (
        ([source], "takes image and mask_image for each prompt, and got image"),
        ({"image": [source], "mask_image": [WIDE]}, "for the prompt 'a': image and mask have 16x16 and 24x16 pixels"),
        (None, "Pass images={'image': ..., 'mask_image': ...}"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(pipeline, ["a"], [0], images=given)

"""Training, encoding and sampling with images that the pipeline edits, and what is wrong with data that lack them."""

import pytest
import torch
from datasets import Dataset, Features, Image, Value, load_dataset
from helpers import layout_files, tiny
from helpers.pipelines import build_tiny_pipeline, png
from helpers.recorder import Recorder
from helpers.tiny_instruct_pix2pix import images
from helpers.training_runs import train

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    SelfNPOConfig,
    SelfNPOTrainer,
    encode_dataset,
    estimate_memory,
)
from trl_diffusion_pref.data import Batch, Mode, with_dropout
from trl_diffusion_pref.evaluation import preference_accuracy, sample
from trl_diffusion_pref.shapes import preference_pairs
from trl_diffusion_pref.training.sample_callback import SampleCallback


NAME = "instruct_pix2pix"
FAST = {"num_inference_steps": 2, "show_progress": False}


def edits(count: int = 4, missing: tuple[int, ...] = ()) -> Dataset:
    """Pairs, each with an image of 24x20 pixels."""
    sources = [None if number in missing else png(image) for number, image in enumerate(images((20, 24), count))]
    pairs = preference_pairs(count, seed=7)
    return pairs.map(lambda row, number: {"image": sources[number]}, with_indices=True).cast_column("image", Image())


@pytest.fixture
def options(image_run):
    return image_run


# ---- What the denoiser sees --------------------------------------------------------------------------------------


def test_both_samples_of_a_row_see_the_row_s_image(options):
    pipeline, data = tiny.build(NAME), edits()
    trainer = MaPOTrainer(pipeline, MaPOConfig(**options(max_steps=1, cache_dtype="float32")), data)
    rows: list[int] = []
    compute = trainer.compute_losses
    trainer.compute_losses = lambda model, batch, mode: (
        rows.extend(batch.rows.tolist()),
        compute(model, batch, mode),
    )[1]
    encoded = {row["row"]: row["condition/image"] for row in map(trainer.train_dataset.__getitem__, range(len(data)))}
    recorder = Recorder(trainer.model)
    trainer.train()
    seen = recorder.calls[0]["sample"][:, 4:]
    torch.testing.assert_close(seen, torch.stack([encoded[row] for row in rows * 2]))
    assert not torch.equal(seen[0], seen[1])


def test_of_the_rows_without_a_prompt_the_share_loses_its_image():
    ones = {"prompt_embeds": torch.ones(4, 2, 3), "image": torch.ones(4, 1, 2, 2), "sizes": torch.ones(4, 2)}
    mode = Mode(
        True, [], prompt_dropout=0.4, condition_dropout=0.5, empty_prompt={"prompt_embeds": torch.zeros(1, 2, 3)}
    )
    batch = Batch(torch.arange(4), None, {}, {}, {"image": ones["image"]}, {})
    found = with_dropout(ones, torch.tensor([0.1, 0.3, 0.5, 0.9]), mode, batch)
    kept = {name: tensor.flatten(1).mean(dim=1).tolist() for name, tensor in found.items()}
    assert kept == {"prompt_embeds": [0, 0, 1, 1], "image": [0, 1, 1, 1], "sizes": [1, 1, 1, 1]}


def test_training_drops_prompt_and_image_as_the_family_says(options):
    cfg = DiffusionDPOConfig(**options(prompt_dropout=0.9999, per_device_train_batch_size=16, max_steps=4))
    trainer = DiffusionDPOTrainer(tiny.build(NAME), cfg, edits(16))
    recorder = Recorder(trainer.model)
    trainer.train()
    blank = torch.cat([call["sample"][:, 4:].flatten(1).abs().amax(dim=1) == 0 for call in recorder.calls])
    # 64 rows at a half; both samples of a row alike.
    assert 0.3 < blank.float().mean() < 0.7
    for call in recorder.calls:
        chosen, rejected = call["sample"][:, 4:].chunk(2)
        assert torch.equal(chosen, rejected)


# ---- Ways in -----------------------------------------------------------------------------------------------------


def test_a_published_data_set_of_edits_trains_as_it_is(tmp_path, options):
    path = layout_files.edit_reward(tmp_path / "data")
    dataset = load_dataset("parquet", data_files=str(path), split="train")
    trainer = MaPOTrainer(tiny.build(NAME), MaPOConfig(**options()), dataset)
    train(trainer)


def test_streamed_rows_have_the_same_images(options):
    data = edits()
    stored = MaPOTrainer(tiny.build(NAME), MaPOConfig(**options(cache_dtype="float32")), data)
    streamed = MaPOTrainer(tiny.build(NAME), MaPOConfig(**options(cache_dtype="float32")), data.to_iterable_dataset())
    (batch,) = streamed.train_dataset.evaluation_batches(4, process=(0, 1))
    expected = torch.stack([stored.train_dataset[number]["condition/image"] for number in range(4)])
    torch.testing.assert_close(batch["conditions"]["image"], expected)


def test_an_encoded_data_set_holds_the_images(options):
    cfg = MaPOConfig(**options())
    encoded = encode_dataset(tiny.build(NAME), edits(), cfg)
    assert encoded[0]["condition/image"].shape == (4, 8, 8)
    train(MaPOTrainer(tiny.build(NAME), cfg, encoded))


def test_buckets_follow_the_samples_and_not_the_image(options):
    wide, square = ([png(image) for image in images(size, 4)] for size in ((16, 32), (24, 24)))
    rows = {"prompt": ["a", "b", "c", "d"], "chosen": wide, "rejected": wide, "image": square}
    rows["rejected"] = wide[1:] + wide[:1]
    features = Features({"prompt": Value("string"), **dict.fromkeys(("chosen", "rejected", "image"), Image())})
    cfg = MaPOConfig(**options(aspect_ratio_buckets=True, resolution=32))
    trainer = MaPOTrainer(tiny.build(NAME), cfg, Dataset.from_dict(rows, features=features))
    shapes = {name: tuple(trainer.train_dataset[0][name].shape[-2:]) for name in ("condition/image", "latents/mean")}
    assert shapes["condition/image"] == shapes["latents/mean"]
    assert shapes["condition/image"][1] > shapes["condition/image"][0]
    train(trainer)


def test_the_memory_of_a_step_with_images_can_be_estimated(options):
    found = estimate_memory(tiny.build(NAME), MaPOConfig(**options()))
    assert found.total > 0


def test_self_npo_goes_on_with_a_trajectory_s_own_image(options):
    more = {"solver_steps": 4, "truncated_steps": 1, "guidance_scale": 1.0, "cache_dtype": "float32"}
    trainer = SelfNPOTrainer(
        tiny.build(NAME), SelfNPOConfig(**options(per_device_train_batch_size=1, max_steps=6, **more)), edits()
    )
    recorder = Recorder(trainer.model)
    trainer.train()
    seen = torch.cat([call["sample"][:, 4:] for call in recorder.calls])
    changed = (seen[1:] != seen[:-1]).flatten(1).any(dim=1).tolist()
    # A trajectory of four steps at least keeps its image over two training steps.
    assert any(changed) and not all(changed)


def test_held_out_accuracy_reads_the_images(tmp_path):
    pipeline = tiny.build(NAME)
    recorder = Recorder(pipeline.unet)
    found = preference_accuracy(pipeline, edits(), draws=2, resolution=16)
    assert found.count == 4 and recorder.calls[0]["sample"].shape[1] == 8


# ---- Data that do not fit ----------------------------------------------------------------------------------------


def test_pairs_without_images_are_refused(options):
    with pytest.raises(ValueError, match="train_dataset lacks the column image: the pipeline edits images, and each"):
        MaPOTrainer(tiny.build(NAME), MaPOConfig(**options()), preference_pairs(4))


def test_rows_whose_image_is_missing_are_named(options):
    data = edits(4, missing=(1, 3))
    with pytest.raises(ValueError, match="(?s)row 1, column 'image': the image is None.*row 3, column 'image'"):
        MaPOTrainer(tiny.build(NAME), MaPOConfig(**options()), data)
    cfg = MaPOConfig(**options(on_bad_row="skip", max_bad_share=0.5))
    assert len(MaPOTrainer(tiny.build(NAME), cfg, data).train_dataset) == 2


def test_several_images_in_a_row_are_refused(options):
    rows = preference_pairs(2, seed=7).map(lambda row: {"image": [row["chosen"], row["rejected"]]})
    with pytest.raises(ValueError, match="row 0, column 'image': found 2 images, but .* takes one"):
        MaPOTrainer(tiny.build(NAME), MaPOConfig(**options()), rows)


def test_a_pipeline_of_text_alone_names_those_that_take_images(options):
    with pytest.raises(ValueError, match="takes condition images .*StableDiffusionInstructPix2PixPipeline"):
        MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options()), edits())


# ---- Sampling ----------------------------------------------------------------------------------------------------


def test_samples_of_images_of_several_sizes_are_the_pipeline_s_own(tmp_path):
    pipeline, prompts = tiny.build(NAME), ["a", "b", "c"]
    sources = [images((16, 24), 1)[0], images((24, 16), 1)[0], images((16, 24), 2)[1]]
    found = sample(pipeline, prompts, [0, 1, 2], images=sources, output=tmp_path, **FAST)
    for number, (prompt, source) in enumerate(zip(prompts, sources, strict=True)):
        options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(number)}
        expected = pipeline(prompt, image=source, **options).images[0]
        assert found[number].size == source.size
        difference = torch.tensor(list(found[number].tobytes())) - torch.tensor(list(expected.tobytes()))
        assert difference.abs().max() <= 1
    again = sample(pipeline, prompts, [0, 1, 2], images=[sources[2], *sources[1:]], output=tmp_path, **FAST)
    assert again.made == 1, "another image makes another sample"


@pytest.mark.parametrize(
    ("name", "sources", "message"),
    [
        (NAME, None, "InstructPix2PixPipeline edits images, and got none. Pass images="),
        (NAME, images((16, 16), 1), "1 images for 2 prompts"),
        (NAME, [*images((16, 16), 1), b"xx"], "images, number 1: the bytes are not an image"),
        ("stable_diffusion", images((16, 16), 2), "generates from text alone.*InstructPix2Pix"),
    ],
)
def test_images_that_do_not_fit_the_pipeline_are_refused(name, sources, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny.build(name), ["a", "b"], [0, 1], images=sources, **FAST)


def test_an_image_for_all_prompts_is_refused():
    with pytest.raises(ValueError, match="image: pass images=, one for each prompt"):
        source = images((16, 16), 1)
        sample(tiny.build(NAME), ["a"], [0], images=source, image=source[0], **FAST)


def test_pictures_while_training_show_edits(options, tmp_path):
    trainer = MaPOTrainer(tiny.build(NAME), MaPOConfig(**options(max_steps=1)), edits())
    trainer.add_callback(SampleCallback(trainer, ["a"], images=images((16, 24), 1), num_inference_steps=1))
    trainer.train()
    assert (tmp_path / "output" / "samples" / "step-000001.png").is_file()


def test_the_card_s_code_edits_an_image(options, tmp_path, monkeypatch):
    trainer = MaPOTrainer(tiny.build(NAME), MaPOConfig(**options(max_steps=1)), edits())
    trainer.save_model()
    card = (tmp_path / "output" / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in card
    images((16, 24), 1)[0].save(tmp_path / "to_edit.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    code = card.split("```python\n")[1].split("```")[0].replace('from_pretrained("output"', "from_pretrained('output'")
    exec(code.replace('"your prompt"', '"a", num_inference_steps=1'), names)
    assert names["image"].size == (24, 16)

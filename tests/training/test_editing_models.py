"""Condition images of other sizes than the sample's, several of them, and text encoders that see them."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from helpers import tiny
from helpers.pipelines import png
from helpers.recorder import Recorder
from helpers.tiny_flux_kontext import PUBLISHED_SIZES
from helpers.tiny_instruct_pix2pix import images
from helpers.training_runs import train
from PIL import Image as PILImage

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    SelfNPOConfig,
    SelfNPOTrainer,
    encode_dataset,
    estimate_memory,
    load_encoded_dataset,
)
from trl_diffusion_pref.data import Collator
from trl_diffusion_pref.evaluation import preference_accuracy, sample
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.families.flux_kontext import FluxKontextFamily
from trl_diffusion_pref.shapes import preference_pairs


SQUARE, WIDE, TALL = (24, 24), (16, 40), (40, 16)


def picture(size: tuple[int, int], seed: int = 0) -> PILImage.Image:
    """Of height and width; random black and white pixels."""
    pixels = 255 * np.random.default_rng(seed).integers(0, 2, (*size, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


def edits(cells: list, column: str = "image") -> Dataset:
    """Pairs with condition images: each cell one image or a list."""
    pairs = preference_pairs(len(cells), seed=7)
    several = any(isinstance(cell, list) for cell in cells)
    stored = [[png(image) for image in cell] if isinstance(cell, list) else png(cell) for cell in cells]
    features = Features({**pairs.features, column: List(Image()) if several else Image()})
    rows = {name: pairs[name] for name in pairs.column_names} | {column: stored}
    return Dataset.from_dict(rows, features=features)


@pytest.fixture
def options(image_run):
    return lambda **more: image_run(**{"cache_dtype": "float32", **more})


def rows_of(trainer) -> dict[int, dict]:
    return {row["row"]: row for row in map(trainer.train_dataset.__getitem__, range(len(trainer.train_dataset)))}


# ---- Sizes of their own ------------------------------------------------------------------------------------------


def test_kontext_s_sizes_are_the_published_ones(monkeypatch):
    """The nearest of 17 shapes, whatever the sample's size; or the image's own where that is asked for."""
    pipeline = tiny.build("flux_kontext")
    monkeypatch.setattr(
        "diffusers.pipelines.flux.pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS", PUBLISHED_SIZES
    )
    sizes = {(100, 100): (1024, 1024), (1080, 1920): (752, 1392), (3000, 1000): (1568, 672)}
    assert {size: FluxKontextFamily().condition_size(pipeline, size, 1) for size in sizes} == sizes
    assert FluxKontextFamily(auto_resize=False).condition_size(pipeline, (103, 57), 1) == (100, 56)


def test_a_row_s_image_is_encoded_as_the_sampler_encodes_it(options):
    pipeline = tiny.build("flux_kontext")
    recorder, source = Recorder(pipeline.transformer), picture(WIDE)
    call = {**tiny.CASES["flux_kontext"].call, "num_inference_steps": 1, "output_type": "latent"}
    pipeline(prompt="a", image=source, **call)
    theirs = recorder.calls[0]["hidden_states"][0, 24:]
    trainer = MaPOTrainer(pipeline, MaPOConfig(**options()), edits([source, picture(TALL)]))
    ours = trainer.train_dataset[0]["condition/image"][None]
    packed = type(pipeline)._pack_latents(ours, *ours.shape)[0]
    torch.testing.assert_close(packed, theirs, rtol=1e-4, atol=1e-4)


def test_batches_have_rows_whose_images_have_one_size(options):
    sources = [picture(size, seed) for seed, size in enumerate([WIDE, TALL, SQUARE] * 2 + [WIDE])]
    trainer = DiffusionDPOTrainer(tiny.build("flux_kontext"), DiffusionDPOConfig(**options()), edits(sources))
    seen = [
        {tuple(shape[-2:]) for shape in [batch["conditions"]["image"].shape]} and batch["row"].tolist()
        for batch in trainer.get_train_dataloader()
    ]
    assert sorted(row for rows in seen for row in rows) == list(range(7))
    kinds = [{sources[row].size for row in rows} for rows in seen]
    assert all(len(kind) == 1 for kind in kinds) and len({kind for own in kinds for kind in own}) == 3
    train(trainer)


def test_images_of_other_sizes_of_one_shape_share_a_batch(options):
    """48x120 is brought to the same size as 16x40."""
    data = edits([picture(WIDE), picture((48, 120), 1)])
    trainer = MaPOTrainer(tiny.build("flux_kontext"), MaPOConfig(**options()), data)
    assert not trainer.train_dataset.buckets.any()


def test_buckets_of_samples_and_sizes_of_images_go_together(options):
    """Two shapes of samples, each with two shapes of images, are four kinds of batches."""
    wide, square = [png(image) for image in images((16, 32), 4)], [png(image) for image in images((24, 24), 4)]
    chosen = wide[:2] + square[:2]
    rows = {"prompt": ["a", "b", "c", "d"], "chosen": chosen, "rejected": wide[2:] + square[2:]}
    rows["image"] = [png(picture(size)) for size in (WIDE, TALL, WIDE, TALL)]
    features = Features({"prompt": Value("string"), **dict.fromkeys(("chosen", "rejected", "image"), Image())})
    cfg = MaPOConfig(**options(aspect_ratio_buckets=True, resolution=32))
    trainer = MaPOTrainer(tiny.build("flux_kontext"), cfg, Dataset.from_dict(rows, features=features))
    dataset = trainer.train_dataset
    assert len(set(dataset.buckets.tolist())) == 4
    for number, row in rows_of(trainer).items():
        height, width = dataset.sizes[dataset.buckets[number]]
        assert row["latents/mean"].shape[-2:] == (height // 2, width // 2)
    train(trainer)


def test_a_stream_s_batch_of_several_sizes_is_refused(options):
    stream = edits([picture(WIDE), picture(TALL)]).to_iterable_dataset()
    trainer = MaPOTrainer(tiny.build("flux_kontext"), MaPOConfig(**options()), stream)
    with pytest.raises(ValueError, match="2 sizes or numbers of condition images.*per_device_train_batch_size=1"):
        trainer.train()
    one = MaPOConfig(**options(per_device_train_batch_size=1))
    trainer = MaPOTrainer(tiny.build("flux_kontext"), one, stream)
    train(trainer)


def test_a_method_that_keeps_rows_wants_images_of_one_size(options):
    cfg = SelfNPOConfig(**options(solver_steps=4, truncated_steps=1, guidance_scale=1.0))
    with pytest.raises(ValueError, match="condition images of 2 sizes or numbers"):
        SelfNPOTrainer(tiny.build("flux_kontext"), cfg, edits([picture(WIDE), picture(TALL)]))


def test_the_space_of_images_is_counted_in_their_own_size(options):
    """A 16x16 sample with a megapixel beside it."""
    trainer = MaPOTrainer(tiny.build("flux_kontext"), MaPOConfig(**options()), edits([picture(SQUARE)] * 2))
    row = trainer.train_dataset[0]
    stored = sum(value.nbytes for key, value in row.items() if key.startswith(("latents", "condition")))
    assert trainer.encoder.samples.bytes_per_row() == stored


# ---- Several images ----------------------------------------------------------------------------------------------


def test_one_to_three_images_train_from_a_column_of_either_name(options):
    cells = [[picture(WIDE)], [picture(WIDE), picture(TALL, 1)], [picture(SQUARE)] * 3, [picture(WIDE, 2)]]
    pipeline = tiny.build("qwen_image_edit_plus")
    trainer = MaPOTrainer(pipeline, MaPOConfig(**options()), edits(cells, "images"))
    counts = {number: sum(key.startswith("condition/") for key in row) for number, row in rows_of(trainer).items()}
    assert counts == {0: 1, 1: 2, 2: 3, 3: 1}
    recorder = Recorder(pipeline.transformer)
    train(trainer)
    # Each pair is a batch of its own kind: chosen and rejected, and what follows the sample's 16 tokens.
    assert all(len(call["hidden_states"]) % 2 == 0 for call in recorder.calls)
    assert all(call["hidden_states"].shape[1] > 16 for call in recorder.calls)
    again = MaPOTrainer(pipeline, MaPOConfig(**options()), edits(cells))
    assert again.train_dataset.fingerprint == trainer.train_dataset.fingerprint


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ([picture(SQUARE)] * 4, "row 1, column 'image': found 4 images, and the pipeline takes 1 to 3"),
        ([], "row 1, column 'image': found 0 images, and the pipeline takes 1 to 3"),
    ],
)
def test_too_many_images_and_none_are_refused(cell, message, options):
    with pytest.raises(ValueError, match=message):
        MaPOTrainer(tiny.build("qwen_image_edit_plus"), MaPOConfig(**options()), edits([[picture(SQUARE)], cell]))


def test_a_missing_image_in_a_list_is_named(options):
    data = edits([[picture(SQUARE)] * 2] * 2).to_list()
    data[1]["image"][1] = None
    features = edits([[picture(SQUARE)] * 2]).features
    with pytest.raises(ValueError, match="row 1, column 'image', number 1: the image is None"):
        MaPOTrainer(
            tiny.build("qwen_image_edit_plus"), MaPOConfig(**options()), Dataset.from_list(data, features=features)
        )


@pytest.mark.parametrize("name", ["flux_kontext", "qwen_image_edit", "qwen_image_edit_plus"])
def test_samples_of_several_prompts_are_the_pipeline_s_own(name):
    pipeline, sources = tiny.build(name), [picture(WIDE), picture(TALL, 1)]
    call = {**tiny.CASES[name].call, "num_inference_steps": 2}
    found = sample(pipeline, ["a", "a longer one"], [0, 1], images=sources, show_progress=False, **call)
    for number, (prompt, source) in enumerate(zip(["a", "a longer one"], sources, strict=True)):
        generator = torch.Generator().manual_seed(number)
        expected = pipeline(prompt=prompt, image=source, generator=generator, **call).images[0]
        difference = np.abs(np.asarray(found[number], dtype=int) - np.asarray(expected, dtype=int))
        assert difference.max() <= 1


# ---- Text encoders that see the images ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen_image_edit", "qwen_image_edit_plus"])
def test_two_prompts_of_other_lengths_are_the_sampler_s_of_each(name):
    """Padded to the longest, with a mask: each row's prediction is that of its own call."""
    pipeline = tiny.build(name)
    family, case = family_for(pipeline), tiny.CASES[name]
    prompts, sources = ["a", "a longer prompt, of more words"], [picture(WIDE), picture(WIDE, 1)]
    cells = [[source] for source in sources]
    together = family.encode_prompts_with_images(pipeline, prompts, cells)
    names = "image/0" if family.max_condition_images > 1 else "image"
    for row, (prompt, source) in enumerate(zip(prompts, sources, strict=True)):
        recorder = Recorder(pipeline.transformer)
        call = {**case.call, "num_inference_steps": 1, "output_type": "latent"}
        given = [source] if family.max_condition_images > 1 else source
        pipeline(prompt=prompt, image=given, generator=torch.Generator().manual_seed(0), **call)
        (theirs,) = recorder.calls
        length = theirs["encoder_hidden_states"].shape[1]
        assert together["prompt_embeds_mask"][row].sum() == length
        torch.testing.assert_close(together["prompt_embeds"][row, :length], theirs["encoder_hidden_states"][0])
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioning = together | {names: torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))}
    time = torch.tensor([500.0, 500.0])
    with torch.no_grad():
        both = family.predict(pipeline.transformer, latents, time, conditioning)
        for row in range(2):
            alone = {key: value[row : row + 1] for key, value in conditioning.items()}
            one = family.predict(pipeline.transformer, latents[row : row + 1], time[:1], alone)
            torch.testing.assert_close(both[row : row + 1], one, rtol=1e-4, atol=1e-5)


def test_the_same_prompt_on_two_images_is_encoded_twice(options):
    data = edits([picture(WIDE), picture(WIDE, 1)]).map(lambda row: {"prompt": "make it blue"})
    trainer = MaPOTrainer(tiny.build("qwen_image_edit"), MaPOConfig(**options()), data)
    one, other = (row["prompt/prompt_embeds"] for row in rows_of(trainer).values())
    assert one.shape == other.shape and not torch.equal(one, other)
    family = family_for(trainer.pipeline)
    expected = family.encode_prompts_with_images(trainer.pipeline, ["make it blue"], [[picture(WIDE, 1)]])
    torch.testing.assert_close(other, expected["prompt_embeds"][0], rtol=1e-4, atol=1e-5)


def test_another_prompt_on_the_same_image_is_encoded_anew(options):
    data = edits([picture(WIDE)] * 2)
    trainers = [
        MaPOTrainer(
            tiny.build("qwen_image_edit"), MaPOConfig(**options()), data.map(lambda row, text=text: {"prompt": text})
        )
        for text in ("a", "b")
    ]
    one, other = (trainer.train_dataset[0]["prompt/prompt_embeds"] for trainer in trainers)
    assert not torch.equal(one, other)


def test_a_dropped_prompt_keeps_the_image_that_the_encoder_sees(options):
    """As the sampler's unconditional side: the empty prompt, encoded with the row's own images."""
    data = edits([picture(WIDE), picture(WIDE, 1)])
    pipeline = tiny.build("qwen_image_edit")
    cfg = DiffusionDPOConfig(**options(prompt_dropout=0.9999, max_steps=1))
    trainer = DiffusionDPOTrainer(pipeline, cfg, data)
    family = family_for(pipeline)
    empty = family.encode_prompts_with_images(pipeline, ["", ""], [[picture(WIDE)], [picture(WIDE, 1)]])
    length = empty["prompt_embeds"].shape[1]
    recorder = Recorder(pipeline.transformer)
    trainer.train()
    seen = recorder.calls[0]["encoder_hidden_states"]
    found = sorted(float(row[:length].float().sum()) for row in seen[:2])
    assert found == pytest.approx(sorted(float(row.sum()) for row in empty["prompt_embeds"]), rel=1e-3)


def test_self_npo_s_teacher_is_guided_away_from_the_row_s_own_empty_prompt(options):
    data = edits([picture(WIDE), picture(WIDE, 1)])
    data = data.remove_columns("rejected").rename_column("chosen", "edited_image")
    pipeline = tiny.build("qwen_image_edit")
    family = family_for(pipeline)
    empty = family.encode_prompts_with_images(pipeline, ["", ""], [[picture(WIDE)], [picture(WIDE, 1)]])
    more = {"start": "data", "solver_steps": 4, "truncated_steps": 1, "guidance_scale": 3.0}
    trainer = SelfNPOTrainer(pipeline, SelfNPOConfig(**options(max_steps=1, **more)), data)
    recorder = Recorder(trainer.teacher.module)
    trainer.train()
    prompts, unconditional = recorder.calls[0]["encoder_hidden_states"].chunk(2)
    length = empty["prompt_embeds"].shape[1]
    found = sorted(float(row[:length].float().sum()) for row in unconditional)
    assert found == pytest.approx(sorted(float(row.sum()) for row in empty["prompt_embeds"]), rel=1e-3)
    assert not torch.equal(prompts, unconditional)


def test_rows_without_dropout_keep_no_empty_prompt(options):
    trainer = MaPOTrainer(tiny.build("qwen_image_edit"), MaPOConfig(**options()), edits([picture(WIDE)] * 2))
    assert not [key for key in trainer.train_dataset[0] if key.startswith("empty prompt")]


def test_several_captions_of_a_row_are_refused(options):
    data = edits([picture(WIDE)] * 2)
    data = data.map(lambda row: {"prompt": ["a", "b"]}, remove_columns="prompt")
    with pytest.raises(ValueError, match="row 0, column 'prompt': found 2 captions, but QwenImageEditPipeline"):
        MaPOTrainer(tiny.build("qwen_image_edit"), MaPOConfig(**options()), data)


def test_stored_and_streamed_rows_are_the_same(options):
    data = edits([picture(WIDE), picture(WIDE, 1)])
    stored = MaPOTrainer(tiny.build("qwen_image_edit"), MaPOConfig(**options()), data)
    streamed = MaPOTrainer(tiny.build("qwen_image_edit"), MaPOConfig(**options()), data.to_iterable_dataset())
    (batch,) = streamed.train_dataset.evaluation_batches(2, process=(0, 1))
    expected = stored.data_collator(list(rows_of(stored).values()))
    assert batch["prompts"].keys() == expected["prompts"].keys()
    for key, value in expected["prompts"].items():
        torch.testing.assert_close(batch["prompts"][key], value)
    torch.testing.assert_close(batch["conditions"]["image"], expected["conditions"]["image"])
    assert isinstance(stored.data_collator, Collator)


def test_an_encoded_data_set_comes_back_from_its_folder(options, tmp_path):
    cfg = MaPOConfig(**options())
    data = edits([[picture(WIDE)], [picture(TALL), picture(WIDE)]], "images")
    encoded = encode_dataset(tiny.build("qwen_image_edit_plus"), data, cfg)
    encoded.save_to_disk(tmp_path / "encoded")
    loaded = load_encoded_dataset(tmp_path / "encoded")
    assert loaded.buckets.tolist() == encoded.buckets.tolist()
    for row in range(2):
        assert loaded[row].keys() == encoded[row].keys()
        assert all(torch.equal(loaded[row][key], encoded[row][key]) for key in loaded[row] if "/" in key)
    train(MaPOTrainer(tiny.build("qwen_image_edit_plus"), cfg, loaded))


def test_trajectories_kept_over_steps_are_refused(options):
    cfg = SelfNPOConfig(**options(start="noise", solver_steps=4, truncated_steps=1, guidance_scale=1.0))
    with pytest.raises(ValueError, match="as long as each row's prompt and condition images. Use start='data'"):
        SelfNPOTrainer(tiny.build("qwen_image_edit"), cfg, edits([picture(WIDE)] * 2))


@pytest.mark.parametrize("name", ["flux_kontext", "qwen_image_edit_plus"])
def test_memory_and_held_out_accuracy_know_the_images(name, options):
    pipeline = tiny.build(name)
    assert estimate_memory(pipeline, MaPOConfig(**options())).total > 0
    recorder = Recorder(pipeline.transformer)
    found = preference_accuracy(pipeline, edits([picture(WIDE), picture(TALL)]), draws=2, resolution=16, batch_size=1)
    assert found.count == 2
    assert all(call["hidden_states"].shape[1] > 16 for call in recorder.calls)


@pytest.mark.parametrize("sizes", [[WIDE], [WIDE, TALL, SQUARE]], ids=["one", "three"])
def test_the_denoiser_gets_a_stored_row_s_images_as_the_sampler_passes_them(sizes, options):
    """In every argument, from the encoded data set: images in order, each of its own size."""
    pipeline, sources = tiny.build("qwen_image_edit_plus"), [picture(size, seed) for seed, size in enumerate(sizes)]
    family, recorder = family_for(pipeline), Recorder(pipeline.transformer)
    call = {**tiny.CASES["qwen_image_edit_plus"].call, "num_inference_steps": 1, "output_type": "latent"}
    pipeline(prompt="make it blue", image=list(sources), generator=torch.Generator().manual_seed(0), **call)
    (theirs,) = recorder.calls
    x_t = type(pipeline)._unpack_latents(theirs["hidden_states"][:, :24], 8, 12, vae_scale_factor=1).squeeze(2)
    data = edits([sources] * 2, "images").map(lambda row: {"prompt": "make it blue"})
    trainer = MaPOTrainer(pipeline, MaPOConfig(**options(resolution="16x24")), data)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    conditioning = {name: tensor.float() for name, tensor in (batch["prompts"] | batch["conditions"]).items()}
    with torch.no_grad():
        family.predict(pipeline.transformer, x_t, theirs["timestep"] * 1000, conditioning)
    ours = recorder.calls[-1]
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
        else:
            assert ours[name] == value

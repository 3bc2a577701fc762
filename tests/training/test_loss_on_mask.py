"""Errors over a mask that the model does not see: where they count, for every algorithm, and masks that do not fit."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, concatenate_datasets
from helpers import algorithms, tiny
from helpers.pipelines import build_tiny_pipeline
from helpers.tiny_inpainting import masks
from helpers.training_runs import first_values, train
from PIL import Image as PILImage

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    MaPOConfig,
    MaPOTrainer,
    SelfNPOConfig,
    SelfNPOTrainer,
    encode_dataset,
    estimate_memory,
    load_encoded_dataset,
)
from trl_diffusion_pref.algorithms.mapo import trainer as mapo_trainer
from trl_diffusion_pref.algorithms.self_npo import trainer as self_npo_trainer
from trl_diffusion_pref.data.preparation import preparation_for
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.families.conditions import LOSS_REGION
from trl_diffusion_pref.shapes import preference_pairs


# Self-NPO's trajectories go through predictions everywhere, and generated samples have no masks.
ELEMENTWISE = [
    pytest.param(name, marks=() if name in ("mapo", "diffusion-dpo", "diffusion-nft") else pytest.mark.slow)
    for name in algorithms.ALL
    if name != "self-npo"
]


@pytest.fixture
def options(image_run):
    return lambda **more: image_run(**{"cache_dtype": "float32", **more})


def left_half(size: tuple[int, int] = (32, 32), grey: int = 255) -> PILImage.Image:
    mask = PILImage.new("L", size, 0)
    mask.paste(grey, (0, 0, size[0] // 2, size[1]))
    return mask


def with_masks(rows: Dataset, marks: list) -> Dataset:
    drawn = Dataset.from_dict({"mask_image": marks}, features=Features({"mask_image": Image()}))
    return concatenate_datasets([rows, drawn], axis=1)


def data(marks: list) -> Dataset:
    """Pairs of 32x32 pixels with these masks."""
    return with_masks(preference_pairs(len(marks), seed=7), marks)


# ---- Where errors count ------------------------------------------------------------------------------------------


def test_errors_of_pairs_are_means_with_the_mask_s_grey_as_weights(options, monkeypatch):
    """Pixels of 16x16 samples, so that 2x2 of them, of any grey, are one latent."""
    generator = np.random.default_rng(1)
    marks = [PILImage.fromarray(generator.integers(0, 256, (16, 16), dtype=np.uint8)) for _ in range(4)]
    noisy, outputs, corrupt = [], [], mapo_trainer.corrupt
    monkeypatch.setattr(mapo_trainer, "corrupt", lambda *args: noisy.append(corrupt(*args)) or noisy[-1])
    rows = data(marks).map(lambda row: {name: row[name].resize((16, 16)) for name in ("chosen", "rejected")})
    cfg = MaPOConfig(**options(loss_on_mask=True, max_steps=1))
    trainer = MaPOTrainer(build_tiny_pipeline(), cfg, rows)
    trainer.model.register_forward_hook(lambda model, given, output: outputs.append(output[0].detach()))
    values = first_values(trainer)
    squares = (outputs[0].double() - noisy[0].target.double()).square().numpy()
    weights = [
        np.asarray(marks[row], dtype=np.float64).reshape(8, 2, 8, 2).mean(axis=(1, 3))
        for row in values["rows"].tolist() * 2
    ]
    expected = [
        np.average(square.mean(axis=0), weights=weight) for square, weight in zip(squares, weights, strict=True)
    ]
    found = torch.cat([values["mse/chosen"], values["mse/rejected"]]).double()
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_no_algorithm_counts_predictions_outside_of_the_mask(name, tmp_path):
    config_class, trainer_class = algorithms.ALL[name]
    own = {"divergence_guard": "off"} if hasattr(config_class, "divergence_guard") else {}
    own |= {"start": "data"} if name == "diffusion-nft" else {}
    rows = with_masks(algorithms.rows(name), [left_half()] * 8)

    def loss(left: float, right: float) -> torch.Tensor:
        """With these numbers added to the predictions of the trained model, whose reference stays as it is."""
        cfg = config_class(
            output_dir=str(tmp_path / "output"),
            dataset_cache_dir=str(tmp_path / "cache"),
            per_device_train_batch_size=4,
            max_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            report_to=[],
            activation_checkpointing=False,
            loss_on_mask=True,
            **own,
        )
        trainer = trainer_class(build_tiny_pipeline(), cfg, rows)
        predict = trainer.family.predict

        def spoiled(model, x, time, conditioning):
            added = torch.where(torch.arange(x.shape[-1]) < x.shape[-1] // 2, left, right)
            return predict(model, x, time, conditioning) + added * float(torch.is_grad_enabled())

        trainer.family.predict = spoiled
        try:
            return first_values(trainer)["loss"]
        finally:
            del trainer.family.predict

    assert torch.equal(loss(0.0, 0.0), loss(0.0, 9.0))
    assert not torch.allclose(loss(0.0, 0.0), loss(9.0, 0.0))


@pytest.mark.parametrize("start", ["data", "noise"])
def test_self_npo_s_distance_is_that_of_the_mask(start, options, monkeypatch):
    given, loss = [], self_npo_trainer.self_npo_loss
    monkeypatch.setattr(self_npo_trainer, "self_npo_loss", lambda *args: given.append(args) or loss(*args))
    steps = {"max_steps": 1, "solver_steps": 4, "truncated_steps": 2, "guidance_scale": 1.0, "start": start}
    rows = data([left_half()] * 4).remove_columns("rejected").rename_column("chosen", "image")
    trainer = SelfNPOTrainer(build_tiny_pipeline(), SelfNPOConfig(**options(loss_on_mask=True, **steps)), rows)
    values = first_values(trainer)
    predicted, target, _, region = given[0]
    assert torch.equal(region, (torch.arange(8) < 4).float().expand(2, 1, 8, 8))
    squares = (predicted.detach().double() - target.double()).square()[..., :4]
    torch.testing.assert_close(values["x0_error"].double(), squares.flatten(1).mean(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", sorted(tiny.IMAGE_CASES) + ["wan", "ltx"])
def test_the_region_lies_where_the_mask_lies(name):
    """Odd sizes, and sides that differ, would show sides that are exchanged."""
    case = tiny.CASES[name]
    pipeline, family = tiny.build(name), family_for(tiny.build(name))
    height, width = case.size
    preparation = preparation_for(pipeline, family, case.size, case.frames or None)
    mean, _ = family.encode_samples(pipeline, torch.zeros(1, *preparation.shape))
    region = preparation.region(left_half((width, height)).convert("RGB"), (0.5, 0.5), False)
    assert region.shape == family.region_shape(pipeline, preparation.shape)
    assert torch.broadcast_shapes(mean[0].shape, region.shape) == mean.shape[1:]
    columns = region.reshape(region.shape[-2:])
    assert (columns[:, : columns.shape[1] // 2] == 1).all()
    assert (columns[:, -(columns.shape[1] // 2) :] == 0).all()


@pytest.mark.parametrize("flip", [False, True])
def test_masks_are_cropped_and_flipped_like_samples(flip):
    pipeline = build_tiny_pipeline()
    preparation = preparation_for(pipeline, family_for(pipeline), (16, 16), None)
    [mask] = masks((40, 16), 1)
    rgb = mask.convert("RGB")
    pixels = preparation.tensor(rgb, (0.2, 0.7), flip)
    expected = ((pixels[0] + 1) / 2).double().reshape(8, 2, 8, 2).mean(dim=(1, 3))
    region = preparation.region(rgb, (0.2, 0.7), flip)
    torch.testing.assert_close(region[0].double(), expected, rtol=0, atol=1e-6)


def test_dropped_condition_images_leave_the_mask(options, monkeypatch):
    """InstructPix2Pix's rows lose prompt and image, which become zeros; a region of zeros has no error."""
    seen = []
    rows = data([left_half()] * 4)
    sources = rows.select_columns("rejected").rename_column("rejected", "image")
    rows = concatenate_datasets([rows, sources], axis=1)
    cfg = MaPOConfig(**options(loss_on_mask=True, prompt_dropout=0.9999))
    trainer = MaPOTrainer(tiny.build("instruct_pix2pix"), cfg, rows)
    # Families are shared by all trainers of a process.
    monkeypatch.setattr(trainer.family, "condition_dropout", 1.0)
    region = trainer.denoise.region
    monkeypatch.setattr(trainer.denoise, "region", lambda given: seen.append(dict(given)) or region(given))
    train(trainer)
    assert all(not given["image"].any() for given in seen)
    assert all(torch.equal(given[LOSS_REGION][0, 0, 0], (torch.arange(8) < 4).float()) for given in seen)


def test_the_reference_s_errors_are_those_of_the_mask_in_every_form(options, tmp_path):
    """Equal weights have equal errors: any other region of either would show at this beta."""
    rows = data(masks((32, 32), 4))
    for reference in ("precomputed", "copy"):
        cfg = DiffusionDPOConfig(**options(loss_on_mask=True, max_steps=1, beta=700.0, reference=reference))
        values = first_values(DiffusionDPOTrainer(build_tiny_pipeline(), cfg, rows))
        torch.testing.assert_close(values["loss"], torch.full((2,), math.log(2)), rtol=0, atol=1e-4)


def test_held_out_likelihoods_are_those_of_the_mask(options):
    found, rows = {}, data([left_half()] * 4)
    for on_mask in (False, True):
        given = rows if on_mask else rows.remove_columns("mask_image")
        cfg = MaPOConfig(**options(loss_on_mask=on_mask, eval_draws=2))
        found[on_mask] = MaPOTrainer(build_tiny_pipeline(), cfg, given, given).held_out.base["eval "]
    assert (found[True] - found[False]).abs().max() > 1e-4


def test_votes_of_pairs_keep_the_pair_s_mask(options):
    cfg = DiffusionKTOConfig(**options(loss_on_mask=True))
    trainer = DiffusionKTOTrainer(build_tiny_pipeline(), cfg, data([left_half()] * 4))
    regions = [trainer.train_dataset[number]["condition/" + LOSS_REGION] for number in range(8)]
    assert all(torch.equal(region[0, 0], (torch.arange(8) < 4).float()) for region in regions)
    train(trainer)


# ---- Ways that data come -----------------------------------------------------------------------------------------


def test_encoded_masks_train_as_the_rows_do_and_fit_no_other_run(options, tmp_path):
    rows = data(masks((32, 32), 4))
    on_mask, whole = (MaPOConfig(**options(loss_on_mask=value)) for value in (True, False))
    encode_dataset(build_tiny_pipeline(), rows, on_mask, output=tmp_path / "encoded")
    encoded = load_encoded_dataset(tmp_path / "encoded")
    losses = [first_values(MaPOTrainer(build_tiny_pipeline(), on_mask, given))["loss"] for given in (rows, encoded)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="loss_on_mask"):
        MaPOTrainer(build_tiny_pipeline(), whole, encoded)
    without = encode_dataset(build_tiny_pipeline(), rows.remove_columns("mask_image"), whole)
    with pytest.raises(ValueError, match="loss_on_mask"):
        MaPOTrainer(build_tiny_pipeline(), on_mask, without)


def test_another_mask_is_another_row_of_the_cache(options):
    found = []
    for mask in (left_half(), PILImage.new("L", (32, 32), 255)):
        trainer = MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options(loss_on_mask=True)), data([mask] * 2))
        found.append(trainer.train_dataset[0]["condition/" + LOSS_REGION].mean())
    assert found == [0.5, 1.0]


def test_masks_are_read_from_streams_and_in_buckets(options):
    rows = data([left_half()] * 4)
    train(
        MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options(loss_on_mask=True)), rows.to_iterable_dataset()),
    )
    wide = rows.map(
        lambda row: {name: row[name].resize((64, 32)) for name in ("chosen", "rejected", "mask_image")}
    ).select(range(2))
    cfg = MaPOConfig(**options(loss_on_mask=True, aspect_ratio_buckets=True, resolution=32))
    trainer = MaPOTrainer(build_tiny_pipeline(), cfg, concatenate_datasets([rows, wide]))
    shapes = {tuple(trainer.train_dataset[number]["condition/" + LOSS_REGION].shape) for number in range(6)}
    assert len(shapes) == 2
    train(trainer)


def test_the_memory_of_a_step_over_a_mask_can_be_estimated(options):
    assert estimate_memory(build_tiny_pipeline(), MaPOConfig(**options(loss_on_mask=True))).total > 0


# ---- Masks that do not fit ---------------------------------------------------------------------------------------


def test_a_mask_that_marks_nothing_is_named_or_left_out(options):
    marks = [left_half(), PILImage.new("L", (32, 32), 0), left_half()]
    with pytest.raises(ValueError, match="row 1, column 'mask_image': the mask marks nothing, or nothing that"):
        MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options(loss_on_mask=True)), data(marks))
    cfg = MaPOConfig(**options(loss_on_mask=True, on_bad_row="skip", max_bad_share=0.5))
    assert len(MaPOTrainer(build_tiny_pipeline(), cfg, data(marks)).train_dataset) == 2


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            PILImage.new("L", (8, 24), 255),
            "row 1, column 'mask_image': a mask of 8x24 pixels, but the image in col",
        ),
        (None, "row 1, column 'mask_image': the image is None"),
    ],
    ids=["size", "missing"],
)
def test_a_mask_that_cannot_be_used_is_named(mask, message, options):
    with pytest.raises(ValueError, match=message):
        MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options(loss_on_mask=True)), data([left_half(), mask]))


def test_data_without_masks_are_refused(options):
    with pytest.raises(ValueError, match="train_dataset lacks the column mask_image, which loss_on_mask=True needs"):
        MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options(loss_on_mask=True)), preference_pairs(4))


def test_masks_are_not_ignored_without_the_option(options):
    with pytest.raises(ValueError, match="has the column mask_image.*set loss_on_mask=True"):
        MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options()), data([left_half()] * 4))


def test_generated_samples_and_audio_have_no_masks(options):
    prompts = Dataset.from_dict({"prompt": ["a", "b"], "mask_image": [left_half()] * 2})
    prompts = prompts.cast_column("mask_image", Image())
    cfg = DiffusionNFTConfig(**options(loss_on_mask=True, start="noise"))
    with pytest.raises(ValueError, match="loss_on_mask=True and start='noise'"):
        DiffusionNFTTrainer(
            build_tiny_pipeline(), cfg, prompts, reward_funcs=lambda samples, prompts: [0.0] * len(samples)
        )
    with pytest.raises(ValueError, match="AudioLDM2Pipeline generates audio, of which there are no masks"):
        MaPOTrainer(tiny.build("audioldm2"), MaPOConfig(**options(loss_on_mask=True)), preference_pairs(2))

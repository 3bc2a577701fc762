"""Training with masks: what the denoiser sees, errors of the masked part alone, and data that do not fit."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from helpers import tiny
from helpers.pipelines import build_tiny_pipeline
from helpers.recorder import Recorder
from helpers.tiny_inpainting import masks
from helpers.tiny_instruct_pix2pix import images
from helpers.training_runs import first_values, train
from PIL import Image as PILImage

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    SelfNPOConfig,
    SelfNPOTrainer,
    estimate_memory,
)
from trl_diffusion_pref.algorithms.diffusion_dpo import trainer as dpo_trainer
from trl_diffusion_pref.algorithms.mapo import trainer as mapo_trainer
from trl_diffusion_pref.algorithms.self_npo import trainer as self_npo_trainer
from trl_diffusion_pref.algorithms.self_npo.loss import SelfNPOOptions, self_npo_loss
from trl_diffusion_pref.diffusion.elbo import denoising_error, estimate_elbo
from trl_diffusion_pref.diffusion.noise import noise_process
from trl_diffusion_pref.shapes import preference_pairs


NAME = "stable_diffusion_inpaint"
WHITE, BLACK = (PILImage.new("L", (16, 16), grey) for grey in (255, 0))


def data(marks: list, sources: list | None = None) -> Dataset:
    """Pairs with images of 16x16 pixels, and these masks."""
    columns = {"image": sources or images((16, 16), len(marks)), "mask_image": marks}
    rows = preference_pairs(len(marks), seed=7).to_dict() | columns
    features = Features({**preference_pairs(1).features, **dict.fromkeys(columns, Image())})
    return Dataset.from_dict(rows, features=features)


@pytest.fixture
def options(image_run):
    return lambda **more: image_run(**{"cache_dtype": "float32", **more})


def marked(mark: PILImage.Image) -> np.ndarray:
    """Which of 8x8 latents a mask of 16x16 pixels marks."""
    return np.asarray(mark)[::2, ::2] >= 128


# ---- What the denoiser sees --------------------------------------------------------------------------------------


def test_a_dropped_prompt_keeps_image_and_mask(options):
    cfg = DiffusionDPOConfig(**options(prompt_dropout=0.9999))
    trainer = DiffusionDPOTrainer(tiny.build(NAME), cfg, data(masks((16, 16), 4)))
    stored = [trainer.train_dataset[number] for number in range(4)]
    recorder, rows, compute = Recorder(trainer.model), [], trainer.compute_losses
    trainer.compute_losses = lambda model, batch, mode: rows.append(batch.rows) or compute(model, batch, mode)
    trainer.train()
    empty = trainer.encoder.empty_prompt["prompt_embeds"][0]
    for call, of_step in zip(recorder.calls, rows, strict=True):
        torch.testing.assert_close(call["encoder_hidden_states"], empty.expand(4, -1, -1))
        for sample, row in zip(call["sample"], of_step.tolist() * 2, strict=True):
            torch.testing.assert_close(sample[4:5], stored[row]["condition/mask_image"])
            torch.testing.assert_close(sample[5:], stored[row]["condition/image"])


def test_a_mask_of_the_whole_image_is_one(options):
    """Nothing of the image is given then."""
    train(MaPOTrainer(tiny.build(NAME), MaPOConfig(**options(loss_on_mask=True)), data([WHITE] * 4)))


# ---- Errors of the masked part -----------------------------------------------------------------------------------


def test_the_error_of_a_region_is_the_mean_over_its_elements():
    generator = np.random.default_rng(0)
    prediction, target = generator.normal(size=(2, 3, 2, 4, 5)).astype(np.float32)
    region = generator.integers(0, 2, (3, 1, 4, 5)).astype(bool)
    squares = (prediction.astype(np.float64) - target) ** 2
    expected = [square[:, where[0]].mean() for square, where in zip(squares, region, strict=True)]
    tensors = [torch.from_numpy(array) for array in (prediction, target, region)]
    torch.testing.assert_close(denoising_error(*tensors).double(), torch.tensor(expected), rtol=1e-6, atol=0)
    huber = [(np.sqrt(square[:, where[0]] + 0.01) - 0.1).mean() for square, where in zip(squares, region, strict=True)]
    found = self_npo_loss(*tensors[:2], SelfNPOOptions("huber", 0.1), tensors[2])
    torch.testing.assert_close(found.double(), torch.tensor(huber), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("kind", "config", "module"),
    [(MaPOTrainer, MaPOConfig, mapo_trainer), (DiffusionDPOTrainer, DiffusionDPOConfig, dpo_trainer)],
    ids=["mapo", "dpo"],
)
def test_errors_of_pairs_are_those_of_the_masked_part(kind, config, module, options, monkeypatch):
    noisy, corrupt, marks = [], module.corrupt, masks((16, 16), 4)

    def recorded(*args):
        noisy.append(corrupt(*args))
        return noisy[-1]

    monkeypatch.setattr(module, "corrupt", recorded)
    trainer = kind(tiny.build(NAME), config(**options(loss_on_mask=True, max_steps=1)), data(marks))
    recorder = Recorder(trainer.model)
    values = first_values(trainer)
    squares = (recorder.outputs[0].detach().double() - noisy[0].target.double()).square().numpy()
    regions = [marked(marks[row]) for row in values["rows"].tolist() * 2]
    expected = [square[:, region].mean() for square, region in zip(squares, regions, strict=True)]
    found = torch.cat([values["mse/chosen"], values["mse/rejected"]]).double()
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)
    if kind is DiffusionDPOTrainer:
        torch.testing.assert_close(values["loss"], torch.full((2,), math.log(2)), rtol=0, atol=1e-5)


def test_self_npo_s_distance_is_that_of_the_masked_part(options, monkeypatch):
    given, loss, marks = [], self_npo_trainer.self_npo_loss, masks((16, 16), 4)
    monkeypatch.setattr(self_npo_trainer, "self_npo_loss", lambda *args: given.append(args) or loss(*args))
    steps = {"max_steps": 1, "solver_steps": 4, "truncated_steps": 2, "guidance_scale": 1.0}
    cfg = SelfNPOConfig(**options(loss_on_mask=True, **steps))
    trainer = SelfNPOTrainer(tiny.build(NAME), cfg, data(marks))
    values = first_values(trainer)
    predicted, target, *_ = given[0]
    squares = (predicted.detach().double() - target.double()).square().numpy()
    regions = [marked(marks[row]) for row in values["rows"].tolist()]
    expected = [square[:, region].mean() for square, region in zip(squares, regions, strict=True)]
    torch.testing.assert_close(values["x0_error"].double(), torch.tensor(expected), rtol=1e-5, atol=0)
    assert torch.equal(given[0][3][:, 0].bool(), torch.from_numpy(np.stack(regions)))


def test_a_likelihood_of_a_region_ignores_predictions_elsewhere():
    process = noise_process(build_tiny_pipeline().scheduler)
    x0, region = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 1, 8, 8)
    region[:, :, 2:5, 3:] = 1

    def estimate(elsewhere: float, where: torch.Tensor | None) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(number) for number in range(2)]
        predict = lambda x_t, time: x_t + elsewhere * (1 - region)  # noqa: E731
        return estimate_elbo(predict, x0, process, generators, region=where)

    assert torch.equal(estimate(0.0, region), estimate(9.0, region))
    assert not torch.equal(estimate(0.0, None), estimate(9.0, None))


def test_held_out_likelihoods_are_those_of_the_masked_part(options):
    found, rows = {}, data(masks((16, 16), 4))
    for on_mask in (False, True):
        cfg = MaPOConfig(**options(loss_on_mask=on_mask, eval_draws=2))
        trainer = MaPOTrainer(tiny.build(NAME), cfg, rows, rows)
        found[on_mask] = trainer.held_out.base["eval "]
    assert (found[True] - found[False]).abs().max() > 1e-4


def test_stored_reference_errors_of_whole_images_are_not_taken(options, tmp_path):
    rows = data(masks((16, 16), 4))
    where = {"reference": "precomputed", "reference_errors_dir": str(tmp_path / "errors")}
    DiffusionDPOTrainer(tiny.build(NAME), DiffusionDPOConfig(**options(**where)), rows)
    with pytest.raises(ValueError, match="loss_on_mask: made with None, this run has True"):
        DiffusionDPOTrainer(tiny.build(NAME), DiffusionDPOConfig(**options(loss_on_mask=True, **where)), rows)


def test_precomputed_reference_errors_are_those_of_the_masked_part(options):
    cfg = DiffusionDPOConfig(**options(loss_on_mask=True, max_steps=1, beta=700.0, reference="precomputed"))
    values = first_values(DiffusionDPOTrainer(tiny.build(NAME), cfg, data(masks((16, 16), 4))))
    torch.testing.assert_close(values["loss"], torch.full((2,), math.log(2)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("other", [{"loss_type": "dspo"}, {"loss_type": "dspo_sdxl"}, {"winner_preserving_mu": 0.5}])
def test_losses_of_whole_predictions_are_not_taken_over_a_mask(other, options):
    with pytest.raises(ValueError, match=f"loss_on_mask=True and {next(iter(other))}"):
        DiffusionDPOConfig(**options(loss_on_mask=True, **other))


def test_the_memory_of_a_step_over_a_mask_can_be_estimated(options):
    assert estimate_memory(tiny.build(NAME), MaPOConfig(**options(loss_on_mask=True))).total > 0


# ---- Data that do not fit ----------------------------------------------------------------------------------------


def test_a_mask_of_another_size_is_named_with_both_sizes(options):
    marks = masks((16, 16), 2) + [PILImage.new("L", (8, 24), 255), WHITE]
    message = "row 2, column 'mask_image': a mask of 8x24 pixels, but the image in column 'image' has 16x16"
    with pytest.raises(ValueError, match=message):
        MaPOTrainer(tiny.build(NAME), MaPOConfig(**options()), data(marks))
    cfg = MaPOConfig(**options(on_bad_row="skip", max_bad_share=0.5))
    assert len(MaPOTrainer(tiny.build(NAME), cfg, data(marks)).train_dataset) == 3
    stream = MaPOTrainer(tiny.build(NAME), MaPOConfig(**options()), data(marks).to_iterable_dataset())
    with pytest.raises(ValueError, match="column 'mask_image' .*: a mask of 8x24 pixels, but"):
        stream.train()


@pytest.mark.parametrize("name", [NAME, "flux_fill"])
def test_a_mask_that_marks_nothing_is_named(name, options):
    dark = PILImage.new("L", (16, 16), 127)
    with pytest.raises(ValueError, match="(?s)row 1, column 'mask_image': the mask marks nothing.*row 3"):
        MaPOTrainer(tiny.build(name), MaPOConfig(**options()), data([WHITE, BLACK, WHITE, dark]))


def test_a_mask_whose_white_part_is_cropped_away_is_named(options):
    wide = PILImage.new("L", (48, 16), 0)
    wide.paste(255, (0, 0, 8, 16))
    with pytest.raises(ValueError, match="row 0, column 'mask_image': the mask marks nothing, or nothing that"):
        MaPOTrainer(tiny.build(NAME), MaPOConfig(**options()), data([wide], images((16, 48), 1)))


def test_data_without_masks_are_refused(options):
    rows = data(masks((16, 16), 2)).remove_columns("mask_image")
    with pytest.raises(ValueError, match="lacks the column mask_image: the pipeline fills in a part of an image, and"):
        MaPOTrainer(tiny.build(NAME), MaPOConfig(**options()), rows)


def test_masks_are_not_ignored_by_a_pipeline_that_takes_none(options):
    with pytest.raises(ValueError, match="has the column mask_image.*StableDiffusionInpaintPipeline, "):
        MaPOTrainer(tiny.build("instruct_pix2pix"), MaPOConfig(**options()), data(masks((16, 16), 2)))


def test_a_row_whose_mask_is_missing_is_named(options):
    with pytest.raises(ValueError, match="row 1, column 'mask_image': the image is None"):
        MaPOTrainer(tiny.build(NAME), MaPOConfig(**options()), data([WHITE, None, WHITE]))

"""Supervised fine-tuning is MaPO without its margin, on whatever single samples there are."""

import pytest
import torch
from datasets import Image
from helpers import tiny
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, png, weights_of
from helpers.tiny_instruct_pix2pix import images

from trl_diffusion_pref import DiffusionSFTConfig, DiffusionSFTTrainer, MaPOConfig, MaPOTrainer
from trl_diffusion_pref.shapes import preference_pairs


def test_chosen_and_single_images_train_as_mapo_without_its_margin(pairs, image_run):
    single = pairs.select_columns(["prompt", "chosen"]).rename_column("chosen", "image")
    options = image_run(optim="sgd", learning_rate=0.1, max_grad_norm=0.0, logging_steps=1)
    trainers = [
        MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options, beta=0.0), pairs),
        *(DiffusionSFTTrainer(build_tiny_pipeline(), DiffusionSFTConfig(**options), rows) for rows in (pairs, single)),
    ]
    for trainer in trainers:
        trainer.train()
    mapo, of_pairs, of_single = trainers
    logged = [trainer.state.log_history[0] for trainer in trainers]
    assert logged[1]["mse"] == logged[2]["mse"] == pytest.approx(logged[0]["mse/chosen"], rel=1e-5)
    assert logged[1]["loss"] == pytest.approx(logged[0]["loss"], rel=1e-4)
    assert_equal_weights(weights_of(of_pairs.model), weights_of(of_single.model))
    untrained, trained = weights_of(build_tiny_pipeline().unet), weights_of(of_pairs.model)
    for name, weights in weights_of(mapo.model).items():
        torch.testing.assert_close(trained[name], weights, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(trained[name], untrained[name], atol=1e-5) for name in trained)


def test_edited_images_are_trained_on_from_pairs_and_by_themselves(image_run):
    cells = [png(image) for image in images((20, 24), 2)]
    pairs = preference_pairs(2, seed=7).map(lambda row, number: {"image": cells[number]}, with_indices=True)
    pairs = pairs.cast_column("image", Image())
    losses = []
    for rows in (pairs, pairs.remove_columns("rejected").rename_column("chosen", "edited_image")):
        config = DiffusionSFTConfig(**image_run(max_steps=1, logging_steps=1))
        trainer = DiffusionSFTTrainer(tiny.build("instruct_pix2pix"), config, rows)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]

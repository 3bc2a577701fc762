"""What becomes of known layouts in a trainer: the batches, and options and columns that would have no effect."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from helpers import layout_files
from helpers.encoding import encoder_of
from helpers.layout_files import LAYOUTS, Known, jpeg
from helpers.pipelines import RESOLUTION, build_tiny_pipeline

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer, load_pairs
from trl_diffusion_pref.data import EncodingOptions
from trl_diffusion_pref.families import family_for


PAIRS = [Known(f"prompt {row}", jpeg(row), jpeg(100 + row), row % 3 != 1) for row in range(64)]
# All that have images and no condition image; two folders have the order of their files' names.
NAMES = [name for name, (_, pairs) in LAYOUTS.items() if pairs is layout_files.IMAGES]
NAMES = [name for name in NAMES if name not in ("edit_reward", "two_folders")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Each content is encoded once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def options(tmp_path, cache) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "output"),
        "dataset_cache_dir": str(cache),
        "max_steps": 2,
        "per_device_train_batch_size": 16,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "activation_checkpointing": False,
    }


def batches(dataset: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    return list(MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options), dataset).get_train_dataloader())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_64_pairs_give_identical_batches_in_every_layout(name, tmp_path, options, monkeypatch):
    monkeypatch.setattr(layout_files, "IMAGES", PAIRS)
    (tmp_path / "data").mkdir()
    found = batches(load_pairs(LAYOUTS[name][0](tmp_path / "data")), options)
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in PAIRS]
    expected = batches(Dataset.from_list(rows), options)
    assert len(found) == len(expected) == 4 and found[0]["latents"]["mean"].shape == (16, 2, 4, 8, 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_trainer_takes_a_loaded_data_set_in_its_own_layout(tmp_path, options):
    path = layout_files.pick_a_pic(tmp_path / "data")
    dataset = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "loaded"))
    assert "caption" in dataset.column_names
    options |= {"per_device_train_batch_size": 4}
    streamed = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    for rows in (dataset, streamed):
        trainer = MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options), rows)
        trainer.train()
        assert trainer.state.global_step == 2
    torch.testing.assert_close(batches(dataset, options), batches(load_pairs(path), options), rtol=0, atol=0)


# ---- Columns and options that would have no effect ---------------------------------------------------------------


def pick_a_pic(*labels: float) -> Dataset:
    return Dataset.from_list(
        [
            {"caption": "p", "jpg_0": jpeg(row), "jpg_1": jpeg(100 + row), "label_0": label}
            for row, label in enumerate(labels)
        ]
    )


def test_halved_ties_are_refused_where_the_loss_reads_no_soft_label(options):
    for make in (MaPOConfig, DiffusionDPOConfig):
        with pytest.raises(ValueError, match=f"ties='half' .*this {make.__name__} does not read"):
            make(ties="half", **options)
    with pytest.raises(ValueError, match="ties='half'"):
        DiffusionDPOConfig(ties="half", loss_type="irepo", soft_label_column="mine", **options)


def test_halved_ties_train_towards_a_margin_of_0(options):
    """At the start all margins are 0, and the loss is the square of the soft label's logit."""
    cfg = DiffusionDPOConfig(loss_type="irepo", ties="half", soft_label=0.9, logging_steps=1, **options)
    cfg.max_steps, cfg.per_device_train_batch_size = 1, 4
    trainer = DiffusionDPOTrainer(build_tiny_pipeline(), cfg, pick_a_pic(1.0, 0.5, 0.0, 0.5))
    trainer.train()
    expected = torch.logit(torch.tensor([0.9, 0.5, 0.9, 0.5], dtype=torch.float64)).square().mean().item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_soft_labels_of_0_and_1_are_refused_in_any_layout(options):
    """Votes without a dissenter are no mistakes, so that they are not left out as bad rows."""
    rows = [
        {"prompt": "p", "image1": jpeg(row), "image2": jpeg(9 + row), "votes_image1": row, "votes_image2": 2}
        for row in (0, 1, 5)
    ]
    cfg = DiffusionDPOConfig(loss_type="irepo", on_bad_row="skip", **options)
    with pytest.raises(ValueError, match=r"column 'soft_label' is 0 or 1 in 1 pairs, the first \[0\].*Clip"):
        DiffusionDPOTrainer(build_tiny_pipeline(), cfg, Dataset.from_list(rows))


def test_ties_that_count_as_preferences_are_a_warning(options, caplog):
    pairs = load_pairs(pick_a_pic(1.0, 0.5, 0.5), ties="half")
    with caplog.at_level(logging.WARNING, "trl_diffusion_pref"):
        MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options), pairs)
    assert "train_dataset: 2 pairs have a soft_label of at most 0.5, so that chosen is not preferred" in caplog.text
    caplog.clear()
    cfg = DiffusionDPOConfig(loss_type="irepo", **options)
    clipped = pairs.map(lambda row: {"soft_label": min(row["soft_label"], 0.98)})
    DiffusionDPOTrainer(build_tiny_pipeline(), cfg, clipped)
    assert "soft_label" not in caplog.text


@pytest.mark.parametrize("loaded", [False, True], ids=["raw", "pairs"])
def test_condition_images_are_not_ignored_without_a_word(loaded, tmp_path, options):
    path = layout_files.edit_reward(tmp_path / "data")
    dataset = load_pairs(path) if loaded else load_dataset("parquet", data_files=str(path), split="train")
    with pytest.raises(ValueError, match="train_dataset has the column image, from which chosen and rejected were"):
        MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options), dataset)
    assert len(batches(load_pairs(path).remove_columns("image"), options)) == 1


def test_label_noise_exchanges_samples_and_keeps_soft_labels(options):
    """iREPO would not notice a pair whose soft label was turned with it."""
    rows = [{"prompt": "p", "path1": jpeg(row), "path2": jpeg(100 + row), "confidence": 0.8} for row in range(16)]
    found = {}
    for noise in (0.0, 0.5):
        cfg = DiffusionDPOConfig(loss_type="irepo", label_noise=noise, **options)
        trainer = DiffusionDPOTrainer(build_tiny_pipeline(), cfg, Dataset.from_list(rows))
        found[noise] = [trainer.train_dataset[row] for row in range(16)]
    means = [(clean["latents/mean"], noisy["latents/mean"]) for clean, noisy in zip(*found.values(), strict=True)]
    # Rows encoded in other batches differ by rounding.
    swapped = [torch.allclose(clean.flip(0), noisy, rtol=0, atol=5e-3) for clean, noisy in means]
    kept = [torch.allclose(clean, noisy, rtol=0, atol=5e-3) for clean, noisy in means]
    assert 2 <= sum(swapped) <= 14 and sum(swapped) + sum(kept) == 16
    assert all(row["scalar/soft_label"] == pytest.approx(0.8) for row in found[0.5])


# ---- Captions ----------------------------------------------------------------------------------------------------


def test_a_stream_draws_the_captions_that_a_stored_data_set_draws(tmp_path):
    pipeline = build_tiny_pipeline()
    rows = [
        {"prompt": [f"{row} {n}" for n in range(4)], "chosen": jpeg(row), "rejected": jpeg(50 + row)}
        for row in range(8)
    ]
    dataset = Dataset.from_list(rows)
    encoder = encoder_of(pipeline, family_for(pipeline), EncodingOptions(RESOLUTION, seed=5), cache_folder=tmp_path)
    encoder.add_prompts([dataset])
    stored, streamed = (encoder.encode(data, "x") for data in (dataset, dataset.to_iterable_dataset()))
    epochs = []
    for epoch in range(4):
        stored.set_epoch(epoch)
        epochs.append([encoder.prompts.texts[stored[row]["prompt"]] for row in range(8)])
    assert all(text.startswith(f"{row} ") for texts in epochs for row, text in enumerate(texts))
    assert len(set(map(tuple, epochs))) == 4
    [batch] = streamed.evaluation_batches(8, process=(0, 1))
    expected = encoder.prompts(epochs[0])["prompt_embeds"]
    torch.testing.assert_close(batch["prompts"]["prompt_embeds"], expected, rtol=1e-4, atol=1e-4)

"""Fixtures and functions for short training runs of every family."""

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from peft import LoraConfig
from PIL import Image as PILImage
from torch import Tensor

from helpers import tiny
from helpers.tiny_inpainting import masks
from trl_diffusion_pref.shapes import preference_pairs


@pytest.fixture
def pairs(name) -> Dataset:
    """Pairs of what the case's pipeline generates."""
    case = tiny.CASES[name]
    if name in tiny.IMAGE_CASES:
        found = preference_pairs(4, seed=7)
        sources = found.select_columns("rejected").rename_column("rejected", "image")
        if case.masked:
            drawn = Dataset.from_dict({"mask_image": masks((32, 32), 4)}, features=Features({"mask_image": Image()}))
            sources = concatenate_datasets([sources, drawn], axis=1)
        return concatenate_datasets([found, sources], axis=1) if case.edits else found
    samples = [case.pixels(batch=4, seed=seed) for seed in (1, 2)]
    rows = {"prompt": ["a cat", "a dog"] * 2}
    if case.waveform:
        rate = {"stable_audio": 16, "ace_step": 8}.get(name, 16000)
        sounds = [[{"array": sound.numpy(), "sampling_rate": rate} for sound in column] for column in samples]
        return Dataset.from_dict(rows | {"chosen": sounds[0], "rejected": sounds[1]})
    clips = [[_clip(sample) for sample in column] for column in samples]
    features = Features({"prompt": Value("string"), "chosen": List(Image()), "rejected": List(Image())})
    rows |= {"chosen": clips[0], "rejected": clips[1]}
    if case.edits:
        rows, features = rows | {"image": [clip[0] for clip in clips[0]]}, Features({**features, "image": Image()})
    return Dataset.from_dict(rows, features=features)


def _clip(pixels: Tensor) -> list[PILImage.Image]:
    frames = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 3, 0)
    return [PILImage.fromarray(frame.numpy()) for frame in frames]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Latents and prompts are encoded once per family."""
    return tmp_path_factory.mktemp("encoded")


@pytest.fixture
def options(name, tmp_path, cache):
    """Makes the options of a run of two steps."""

    case = tiny.CASES[name]
    side = min(case.size) if case.frames else 16

    def make(**more) -> dict[str, Any]:
        defaults = {
            "output_dir": str(tmp_path / "output"),
            "dataset_cache_dir": str(cache),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "resolution": None if case.waveform else side,
            "num_frames": case.frames,
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": [],
            "activation_checkpointing": False,
        }
        return {**defaults, **more}

    return make


def lora_config(lora: bool) -> LoraConfig | None:
    """Alpha is not r: a file that does not say so loads at a fourth of the scale."""
    return LoraConfig(r=2, lora_alpha=8) if lora else None


def train(trainer) -> list[float]:
    """The losses of each step; checks that they are finite and that all that is trained moved."""
    losses, compute = [], trainer.compute_losses

    def compute_losses(model, batch, mode):
        values = compute(model, batch, mode)
        if mode.training:
            losses.append(values["loss"].mean().item())
        return values

    trainer.compute_losses = compute_losses
    before = {
        key: value.detach().clone()
        for key, value in trainer.model.named_parameters()
        # HunyuanVideo 1.5 reads no image here, and no words in quotation marks.
        if value.requires_grad and not key.startswith(("image_embedder.", "context_embedder_2."))
    }
    trainer.train()
    moved = [key for key, value in trainer.model.named_parameters() if key in before and (value != before[key]).any()]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    # All but what no output depends on, such as a last block's update of the text.
    assert len(moved) > 0.85 * len(before) > 0
    return losses


def first_values(trainer) -> dict[str, Tensor]:
    """Losses and metrics of the first step, and its rows."""
    found, compute = [], trainer.compute_losses

    def compute_losses(model, batch, mode):
        values = compute(model, batch, mode)
        found.append({"rows": batch.rows, **{name: value.detach() for name, value in values.items()}})
        return values

    trainer.compute_losses = compute_losses
    trainer.train()
    return found[0]

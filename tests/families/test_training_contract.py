"""What training must hold for every family, on tiny pipelines of the real classes: see `tiny.CASES`."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import weights_of
from datasets import Dataset, Features, Image, List, Value
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from PIL import Image as PILImage
from test_contract import PROMPTS, Recorder
from torch import Tensor, nn

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    SelfNPOConfig,
    SelfNPOTrainer,
)
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.shapes import preference_pairs


# One of CogVideoX's two generations trains as the other.
TRAINED = [*tiny.IMAGE_CASES, "wan", "cogvideox", "stable_audio", "audioldm2"]
every_family = pytest.mark.parametrize("name", TRAINED)
full_and_lora = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


@pytest.fixture
def pairs(name) -> Dataset:
    """Pairs of what the case's pipeline generates."""
    case = tiny.CASES[name]
    if name in tiny.IMAGE_CASES:
        return preference_pairs(4, seed=7)
    samples = [case.pixels(batch=4, seed=seed) for seed in (1, 2)]
    rows = {"prompt": ["a cat", "a dog"] * 2}
    if case.waveform:
        rate = 16 if name == "stable_audio" else 16000
        sounds = [[{"array": sound.numpy(), "sampling_rate": rate} for sound in column] for column in samples]
        return Dataset.from_dict(rows | {"chosen": sounds[0], "rejected": sounds[1]})
    clips = [[_clip(sample) for sample in column] for column in samples]
    features = Features({"prompt": Value("string"), "chosen": List(Image()), "rejected": List(Image())})
    return Dataset.from_dict(rows | {"chosen": clips[0], "rejected": clips[1]}, features=features)


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

    def make(**more) -> dict[str, Any]:
        defaults = {
            "output_dir": str(tmp_path / "output"),
            "dataset_cache_dir": str(cache),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "resolution": None if tiny.CASES[name].waveform else 16,
            "num_frames": tiny.CASES[name].frames,
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
    losses, record = [], trainer.record_step
    trainer.record_step = lambda means: (losses.append(means["loss"]), record(means))
    before = {key: value.detach().clone() for key, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    moved = [key for key, value in trainer.model.named_parameters() if key in before and (value != before[key]).any()]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    # All but what no output depends on, such as a last block's update of the text.
    assert len(moved) > 0.85 * len(before) > 0
    return losses


def denoiser_call(name: str) -> tuple[tuple, dict]:
    """Arguments as the pipeline's own loop passes them."""
    pipeline = tiny.build(name)
    recorder = Recorder(family_for(pipeline).denoiser(pipeline))
    size = dict(zip(("height", "width"), tiny.CASES[name].size, strict=False))
    options = {"num_inference_steps": 1, "output_type": "latent", **size, **tiny.CASES[name].call}
    pipeline(PROMPTS, **options, generator=torch.Generator().manual_seed(0))
    return recorder.raw[-1]


def output(denoiser: nn.Module, call: tuple[tuple, dict]) -> Tensor:
    with torch.no_grad():
        return denoiser.eval()(*call[0], **call[1])[0]


def loaded_from(folder: str, name: str, lora: bool) -> nn.Module:
    """The denoiser of an ordinary pipeline that loads what was saved."""
    pipeline = tiny.build(name)
    if not lora:
        # diffusers wants to be told again what a pipeline goes without.
        absent = {part: None for part, component in pipeline.components.items() if component is None}
        pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
        return family_for(pipeline).denoiser(pipeline)
    family = family_for(pipeline)
    if family.lora_format == "peft":
        return PeftModel.from_pretrained(family.denoiser(pipeline), folder)
    pipeline.load_lora_weights(folder)
    return family.denoiser(pipeline)


@full_and_lora
@every_family
def test_mapo_trains_alike_with_gradient_checkpointing_and_saves_what_loads(name, lora, pairs, options):
    runs = []
    # AudioLDM 2's UNet cannot do it, and there is nothing to compare.
    choices = (True, False) if family_for(tiny.build(name)).gradient_checkpointing else (False, False)
    for checkpointing in choices:
        pipeline = tiny.build(name)
        cfg = MaPOConfig(**options(activation_checkpointing=checkpointing))
        trainer = MaPOTrainer(pipeline, cfg, pairs, peft_config=lora_config(lora))
        assert family_for(pipeline).denoiser(pipeline).is_gradient_checkpointing is checkpointing
        runs.append((train(trainer), weights_of(trainer.model)))
    (losses, weights), (expected_losses, expected_weights) = runs
    assert losses == pytest.approx(expected_losses, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)

    trainer.save_model()
    call = denoiser_call(name)
    base, trained = output(family_for(pipeline).denoiser(tiny.build(name)), call), output(trainer.model, call)
    assert (trained - base).abs().max() > 1e-4
    loaded = output(loaded_from(trainer.args.output_dir, name, lora), call)
    torch.testing.assert_close(loaded, trained, rtol=0, atol=1e-5)


@full_and_lora
@every_family
def test_diffusion_dpo_begins_at_ln_2(name, lora, pairs, options):
    cfg = DiffusionDPOConfig(**options(beta=700.0, prompt_dropout=0.5))
    trainer = DiffusionDPOTrainer(tiny.build(name), cfg, pairs, peft_config=lora_config(lora))
    losses = train(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[1] != losses[0]


@full_and_lora
@every_family
def test_self_npo_trains_from_noise_and_from_data(name, lora, pairs, options):
    start = "noise" if lora else "data"
    cfg = SelfNPOConfig(
        **options(start=start, teacher="ema", guidance_scale=2.0, solver_steps=4, truncated_steps=2),
    )
    pipeline = tiny.build(name)
    samples = pairs.remove_columns("rejected").rename_column("chosen", family_for(pipeline).modality)
    train(SelfNPOTrainer(pipeline, cfg, samples, peft_config=lora_config(lora)))

"""What training must hold for every family, on tiny pipelines of the real classes: see `tiny.CASES`."""

import math

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import tiny
from helpers.pipelines import weights_of
from helpers.recorder import PROMPTS, Recorder, stacked
from helpers.training_runs import cache, lora_config, options, pairs, train  # noqa: F401
from peft import PeftModel
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


# One of CogVideoX's two generations trains as the other.
TRAINED = [
    *tiny.IMAGE_CASES,
    "wan",
    "wan_image_to_video",
    "cogvideox_image_to_video",
    "wan_5b",
    "ltx",
    "hunyuan_video",
    "hunyuan_video15",
    *(["ace_step"] if "ace_step" in tiny.CASES else []),
    "cogvideox",
    "stable_audio",
    "audioldm2",
]
every_family = pytest.mark.parametrize("name", tiny.marked(TRAINED))


def full_and_lora(slow: bool | None = None) -> pytest.MarkDecorator:
    """Both kinds of training; the default run leaves out one of them where `slow` names it: True LoRA, False full."""
    marks = [pytest.mark.slow if slow is lora else () for lora in (False, True)]
    params = [pytest.param(lora, marks=mark) for lora, mark in zip((False, True), marks, strict=True)]
    return pytest.mark.parametrize("lora", params, ids=["full", "lora"])


def denoiser_call(name: str) -> tuple[tuple, dict]:
    """Arguments as the pipeline's own loop passes them."""
    pipeline = tiny.build(name)
    recorder = Recorder(family_for(pipeline).denoiser(pipeline))
    # LTX-Video's scheduler stretches its times between the first and the last, and divides 0 by 0 where there is one.
    options = {"num_inference_steps": 2, "output_type": "latent", **tiny.CASES[name].arguments(len(PROMPTS))}
    prompts = tiny.CASES[name].takes(PROMPTS)
    pipeline(prompt=list(prompts), **options, generator=torch.Generator().manual_seed(0))
    return recorder.raw[-1]


def output(denoiser: nn.Module, call: tuple[tuple, dict]) -> Tensor:
    with torch.no_grad():
        return stacked(denoiser.eval()(*call[0], **call[1])[0])


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


# LoRAs of every family are trained below, and loaded again by the tests of export and guidance.
@full_and_lora(slow=True)
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


@full_and_lora(slow=True)
@every_family
def test_diffusion_dpo_begins_at_ln_2(name, lora, pairs, options):
    cfg = DiffusionDPOConfig(**options(beta=700.0, prompt_dropout=0.5))
    trainer = DiffusionDPOTrainer(tiny.build(name), cfg, pairs, peft_config=lora_config(lora))
    losses = train(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[1] != losses[0]


@full_and_lora(slow=False)
@every_family
def test_self_npo_trains_from_noise_and_from_data(name, lora, pairs, options):
    # Kept trajectories want conditioning of one length.
    start = "noise" if lora and not family_for(tiny.build(name)).prompts_see_images else "data"
    cfg = SelfNPOConfig(
        **options(start=start, teacher="ema", guidance_scale=2.0, solver_steps=4, truncated_steps=2),
    )
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    column = f"edited_{family.modality}" if family.modality in family.condition_images else family.modality
    samples = pairs.remove_columns("rejected").rename_column("chosen", column)
    train(SelfNPOTrainer(pipeline, cfg, samples, peft_config=lora_config(lora)))

"""Pipelines with a denoiser for each range of noise, as Wan 2.2 A14B, trained one at a time or both."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from helpers.pipelines import assert_equal_weights, weights_of
from helpers.recorder import Recorder
from helpers.tiny_wan_2_2 import BOUNDARY, build_wan_2_2
from helpers.training_runs import cache, lora_config, options, pairs, train  # noqa: F401
from peft import LoraConfig, get_peft_model
from torch import Tensor

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    SelfNPOConfig,
    SelfNPOTrainer,
    encode_dataset,
    estimate_memory,
    train_in_rounds,
)
from trl_diffusion_pref.diffusion.noise import RectifiedFlow, noise_process
from trl_diffusion_pref.export import export_lora, merge_lora
from trl_diffusion_pref.families import family_for, family_named
from trl_diffusion_pref.guidance import add_negative_guidance, negative_guidance
from trl_diffusion_pref.guidance.tuned import with_tuned_weights


HIGH, LOW = "transformer", "transformer_2"
full_and_lora = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
either_and_both = pytest.mark.parametrize("denoiser", [HIGH, LOW, None])
# The first one alone is trained like the only one of other pipelines.
second_and_both = pytest.mark.parametrize("denoiser", [pytest.param(HIGH, marks=pytest.mark.slow), LOW, None])


@pytest.fixture
def name() -> str:
    """Of the case in `tiny.CASES` whose pairs are trained on."""
    return "wan"


def parts(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {HIGH: pipeline.transformer, LOW: pipeline.transformer_2}


def trained(denoiser: str | None) -> list[str]:
    return [HIGH, LOW] if denoiser is None else [denoiser]


def sample(pipeline: DiffusionPipeline, guidance_scale: float = 1.0) -> Tensor:
    """Latents after four steps, of which each transformer takes some."""
    for part in parts(pipeline).values():
        part.eval()
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 4, "height": 16, "width": 32, "num_frames": 5, "output_type": "latent"}
    return pipeline("a cat", generator=generator, guidance_scale=guidance_scale, **call).frames


def inputs(count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Noisy latents and conditioning of so many samples."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 16, 2, 2, 4, generator=generator)
    return latents, {"prompt_embeds": torch.randn(count, 7, 32, generator=generator)}


# ---- Which transformer --------------------------------------------------------------------------------------------


def test_each_time_goes_to_the_transformer_that_the_sampler_calls():
    pipeline, family = build_wan_2_2(), family_named("WanPipeline")
    own = {name: Recorder(part) for name, part in parts(pipeline).items()}
    sample(pipeline)
    called = {name: [call["timestep"].item() for call in recorder.calls] for name, recorder in own.items()}
    assert min(map(len, called.values())) >= 2

    times = torch.tensor([time for pair in zip(*called.values(), strict=True) for time in pair])
    latents, conditioning = inputs(len(times))
    routed = build_wan_2_2()
    recorders = {name: Recorder(part) for name, part in parts(routed).items()}
    with torch.no_grad():
        predicted = family.predict(family.denoiser(routed), latents, times, conditioning)
    for name, recorder in recorders.items():
        (call,) = recorder.calls
        assert call["timestep"].tolist() == called[name]
    for row, time in enumerate(times):
        part = parts(pipeline)[HIGH if time in called[HIGH] else LOW]
        with torch.no_grad():
            alone = part(
                hidden_states=latents[row : row + 1],
                timestep=time[None],
                encoder_hidden_states=conditioning["prompt_embeds"][row : row + 1],
            ).sample
        torch.testing.assert_close(predicted[row : row + 1], alone, rtol=1e-5, atol=1e-6)


def test_the_boundary_itself_is_the_noisier_transformer_s():
    pipeline, family = build_wan_2_2(), family_named("WanPipeline")
    recorder = Recorder(pipeline.transformer)
    latents, conditioning = inputs(2)
    times = torch.tensor([BOUNDARY * 1000, BOUNDARY * 1000 - 0.1])
    family.predict(family.denoiser(pipeline), latents, times, conditioning)
    assert recorder.calls[0]["timestep"].tolist() == [BOUNDARY * 1000]


@pytest.mark.parametrize(("time", "name"), [(900.0, HIGH), (300.0, LOW)])
def test_no_gradient_reaches_the_other_transformer(time, name):
    pipeline, family = build_wan_2_2(), family_named("WanPipeline")
    latents, conditioning = inputs(3)
    family.predict(family.denoiser(pipeline), latents, torch.full((3,), time), conditioning).square().sum().backward()
    with_gradient = {
        name for name, part in parts(pipeline).items() if any(p.grad is not None for p in part.parameters())
    }
    assert with_gradient == {name}


@pytest.mark.parametrize("sampling", ["logit_normal", "uniform", "mode"])
@pytest.mark.parametrize(("first", "last"), [(0.875, 1.0), (0.0, 0.875)])
def test_times_of_one_range_are_distributed_as_all_times_are_within_it(sampling, first, last):
    process = RectifiedFlow(timestep_sampling=sampling, shift=3.0)
    times = process.within(first, last).sample_timesteps(20_000, torch.Generator().manual_seed(0))
    assert first <= times.min() and times.max() < (last if last < 1 else 1.001)
    every = process.sample_timesteps(400_000, torch.Generator().manual_seed(1))
    every = every[(every >= first) & (every < last)]
    quantiles = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    torch.testing.assert_close(times.quantile(quantiles), every.quantile(quantiles), rtol=0, atol=0.01)


def test_the_elbo_s_times_lie_in_the_range_too():
    process = noise_process(build_wan_2_2().scheduler).within(0.0, 0.5)
    assert process.times_at(torch.tensor([0.0, 0.5, 0.999])).tolist() == pytest.approx([1e-3, 0.25, 0.4995])
    assert process.describe() != noise_process(build_wan_2_2().scheduler).describe()


def test_a_range_that_hardly_any_time_reaches_is_an_error():
    process = RectifiedFlow(shift=1e-5).within(0.9, 1.0)
    with pytest.raises(ValueError, match="fewer than 1 lie in the trained denoiser's range, 0.9 to 1. Choose another"):
        process.sample_timesteps(1, torch.Generator().manual_seed(0))


# ---- Training -----------------------------------------------------------------------------------------------------


@full_and_lora
@either_and_both
def test_what_is_trained_is_saved_for_the_ordinary_pipeline(denoiser, lora, pairs, options):
    base, pipeline = build_wan_2_2(), build_wan_2_2()
    recorders = {name: Recorder(part) for name, part in parts(pipeline).items()}
    trainer = MaPOTrainer(pipeline, MaPOConfig(**options(denoiser=denoiser)), pairs, peft_config=lora_config(lora))
    train(trainer)
    for name, recorder in recorders.items():
        times = torch.cat([call["timestep"] for call in recorder.calls]) if recorder.calls else torch.empty(0)
        assert bool(len(times)) == (name in trained(denoiser))
        assert bool((times >= 1000 * BOUNDARY).all() if name == HIGH else (times < 1000 * BOUNDARY).all())
    trainer.save_model()

    folder, expected = trainer.args.output_dir, sample(trainer.pipeline)
    if lora:
        loaded = build_wan_2_2()
        if HIGH in trained(denoiser):
            loaded.load_lora_weights(folder)
        if LOW in trained(denoiser):
            file = "pytorch_lora_weights_transformer_2.safetensors"
            loaded.load_lora_weights(folder, weight_name=file, load_into_transformer_2=True)
    else:
        loaded = DiffusionPipeline.from_pretrained(folder)
        same = [name for name, part in parts(loaded).items() if _equal(part, parts(base)[name])]
        assert same == [name for name in parts(base) if name not in trained(denoiser)]
    torch.testing.assert_close(sample(loaded), expected, rtol=0, atol=1e-5)
    assert (expected - sample(base)).abs().max() > 1e-4


def _equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    weights = one.state_dict()
    return all(torch.equal(weights[name], value) for name, value in other.state_dict().items())


@full_and_lora
@either_and_both
def test_diffusion_dpo_begins_at_ln_2_and_keeps_its_reference(denoiser, lora, pairs, options):
    pipeline, family = build_wan_2_2(), family_named("WanPipeline").with_denoiser(denoiser)
    cfg = DiffusionDPOConfig(**options(beta=700.0, denoiser=denoiser))
    trainer = DiffusionDPOTrainer(pipeline, cfg, pairs, peft_config=lora_config(lora))
    losses = train(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[1] != losses[0]
    latents, conditioning = inputs(4)
    times = torch.tensor([950.0, 100.0, 900.0, 500.0])
    with trainer.reference.live.applied() as reference:
        predicted = family.predict(reference, latents, times, conditioning)
    base = family.denoiser(build_wan_2_2())
    torch.testing.assert_close(predicted, family.predict(base, latents, times, conditioning), rtol=0, atol=1e-5)


@full_and_lora
def test_checkpointing_changes_no_weights(lora, pairs, options):
    runs = []
    for checkpointing in (False, True):
        pipeline = build_wan_2_2()
        cfg = MaPOConfig(**options(activation_checkpointing=checkpointing))
        train(trainer := MaPOTrainer(pipeline, cfg, pairs, peft_config=lora_config(lora)))
        assert all(part.is_gradient_checkpointing is checkpointing for part in parts(pipeline).values())
        runs.append(weights_of(trainer.model))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


@full_and_lora
@second_and_both
def test_resuming_equals_never_having_stopped(denoiser, lora, pairs, options, tmp_path):
    common = {"denoiser": denoiser, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def run(folder: str) -> DiffusionDPOTrainer:
        cfg = DiffusionDPOConfig(**options(**common, beta=700.0, output_dir=str(tmp_path / folder)))
        return DiffusionDPOTrainer(build_wan_2_2(), cfg, pairs, peft_config=lora_config(lora))

    whole = run("whole")
    whole.train()
    resumed = run("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal_weights(weights_of(resumed.model), weights_of(whole.model))


def test_self_npo_s_teacher_goes_through_both_transformers(pairs, options):
    pipeline = build_wan_2_2()
    cfg = SelfNPOConfig(**options(solver_steps=4, truncated_steps=2, guidance_scale=2.0))
    train(SelfNPOTrainer(pipeline, cfg, Dataset.from_dict({"prompt": pairs["prompt"]}), peft_config=LoraConfig(r=2)))


@pytest.mark.parametrize(("denoiser", "expected"), [(None, True), (LOW, False)])
def test_ddp_looks_for_unused_weights_where_both_are_trained(denoiser, expected, pairs, options):
    trainer = MaPOTrainer(build_wan_2_2(), MaPOConfig(**options(denoiser=denoiser)), pairs)
    assert trainer.args.ddp_find_unused_parameters is expected


@pytest.mark.slow
def test_two_processes_end_with_equal_weights(pairs, tmp_path):
    """In each step a process trains one transformer alone, and not always the one of the other process."""
    pairs.save_to_disk(tmp_path / "pairs")
    tests = Path(__file__).parents[1]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(tests / "helpers" / "two_denoisers_run.py"), str(tmp_path), str(tmp_path / "pairs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first["weights"] == second["weights"]
    assert first["calls"] != second["calls"] and sum(first["calls"]) == sum(second["calls"]) == 6


@second_and_both
def test_rounds_go_on_from_what_the_round_before_saved(denoiser, options, tmp_path):
    pipeline = build_wan_2_2()
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 32, "num_frames": 5}
    found = train_in_rounds(
        MaPOTrainer,
        pipeline,
        MaPOConfig(**options(denoiser=denoiser, resolution=16)),
        ["a cat", "a dog"],
        lambda prompts, samples, **columns: [float(np.mean(frames)) for frames in samples],
        samples_per_prompt=2,
        peft_config=lora_config(True),
        **call,
    )
    with with_tuned_weights(build_wan_2_2(), found[-1].folder) as tuned:
        torch.testing.assert_close(sample(pipeline), sample(tuned), rtol=0, atol=1e-5)


# ---- LoRAs --------------------------------------------------------------------------------------------------------


def trained_lora(pairs, options, **more) -> MaPOTrainer:
    config = more.pop("peft_config", None) or lora_config(True)
    trainer = MaPOTrainer(build_wan_2_2(), MaPOConfig(**options(**more)), pairs, peft_config=config)
    train(trainer)
    trainer.save_model()
    return trainer


def load_both(pipeline: DiffusionPipeline, folder: str) -> DiffusionPipeline:
    pipeline.load_lora_weights(folder)
    file = "pytorch_lora_weights_transformer_2.safetensors"
    pipeline.load_lora_weights(folder, weight_name=file, load_into_transformer_2=True)
    return pipeline


def test_two_loras_of_two_runs_load_in_one_pipeline(pairs, options, tmp_path):
    folders = {name: str(tmp_path / name) for name in (HIGH, LOW)}
    runs = {
        name: trained_lora(pairs, options, denoiser=name, output_dir=folder, peft_config=LoraConfig(r=rank))
        for rank, (name, folder) in enumerate(folders.items(), 2)
    }
    pipeline = build_wan_2_2()
    pipeline.load_lora_weights(folders[HIGH])
    pipeline.load_lora_weights(
        folders[LOW], weight_name="pytorch_lora_weights_transformer_2.safetensors", load_into_transformer_2=True
    )
    sample(pipeline)
    latents, conditioning = inputs(1)
    for name, time in ((HIGH, 950.0), (LOW, 100.0)):
        family = family_named("WanPipeline").with_denoiser(name)
        loaded, own = (
            family.predict(denoiser.eval(), latents, torch.tensor([time]), conditioning)
            for denoiser in (parts(pipeline)[name], runs[name].model)
        )
        torch.testing.assert_close(loaded, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [r"blocks\.0\.attn1\.to_[qk]", "all-linear", None])
def test_every_kind_of_targets_loads_again(targets, pairs, options):
    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, alpha_pattern={f"{LOW}.blocks.0.attn1.to_q": 3})
    trainer = trained_lora(pairs, options, peft_config=config)
    pipeline = load_both(build_wan_2_2(), trainer.args.output_dir)
    torch.testing.assert_close(sample(pipeline), sample(trainer.pipeline), rtol=0, atol=1e-5)


def test_training_goes_on_with_the_loras_that_the_pipeline_carries(pairs, options):
    first = trained_lora(pairs, options)
    pipeline = load_both(build_wan_2_2(), first.args.output_dir)
    before = sample(pipeline)
    trainer = MaPOTrainer(pipeline, MaPOConfig(**options()), pairs)
    torch.testing.assert_close(sample(trainer.pipeline), before, rtol=0, atol=1e-5)
    train(trainer)
    # Also where the trainer itself put them in.
    train(MaPOTrainer(trainer.pipeline, MaPOConfig(**options()), pairs))


def test_merged_loras_sample_like_the_trained_model(pairs, options, tmp_path):
    trainer = trained_lora(pairs, options)
    expected = sample(trainer.pipeline)
    merge_lora(trainer.args.output_dir, tmp_path / "merged", base=build_wan_2_2())
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(sample(merged), expected, rtol=0, atol=1e-4)


def test_each_transformer_has_a_kohya_file_of_its_own(pairs, options, tmp_path):
    trainer = trained_lora(pairs, options, lora_format="kohya")
    export_lora(trainer.args.output_dir, tmp_path / "exported" / "lora.safetensors")
    names = ("lora.safetensors", "lora_transformer_2.safetensors")
    assert sorted(file.name for file in (tmp_path / "exported").iterdir()) == sorted(names)
    pipeline = build_wan_2_2()
    for number, name in enumerate(names):
        pipeline.load_lora_weights(tmp_path / "exported", weight_name=name, load_into_transformer_2=bool(number))
    torch.testing.assert_close(sample(pipeline), sample(trainer.pipeline), rtol=0, atol=1e-5)
    own = [f"{trainer.args.output_dir}/kohya_lora_weights{end}.safetensors" for end in ("", "_transformer_2")]
    for number, file in enumerate(own):
        with open(file, "rb") as written, open(tmp_path / "exported" / names[number], "rb") as exported:
            assert written.read() == exported.read()


def test_a_kohya_file_has_the_name_that_the_caller_chose(pairs, options, tmp_path):
    trainer = trained_lora(pairs, options, denoiser=LOW)
    assert export_lora(trainer.args.output_dir, tmp_path / "low.safetensors") == tmp_path / "low.safetensors"
    in_folder = export_lora(trainer.args.output_dir, tmp_path / "folder")
    assert in_folder.name == "kohya_lora_weights_transformer_2.safetensors"


def test_the_card_loads_both_loras(pairs, options, tmp_path):
    trainer = trained_lora(pairs, options)
    card = (tmp_path / "output" / "README.md").read_text()
    lines = [line for line in card.splitlines() if line.startswith("pipeline.load_lora_weights")]
    assert len(lines) == 2
    pipeline = build_wan_2_2()
    for line in lines:
        exec(line.replace('"output"', repr(trainer.args.output_dir)))
    torch.testing.assert_close(sample(pipeline), sample(trainer.pipeline), rtol=0, atol=1e-5)


# ---- Memory -------------------------------------------------------------------------------------------------------


def test_the_transformer_that_is_not_trained_leaves_memory(pairs, options, tmp_path):
    build_wan_2_2().save_pretrained(tmp_path / "base")
    trainer = MaPOTrainer(str(tmp_path / "base"), MaPOConfig(**options(denoiser=LOW)), pairs)
    where = []
    trainer.compute_losses = _watched(trainer, lambda: where.append(_device(trainer.encoders.pipeline.transformer)))
    trainer.train()
    assert where == ["meta", "meta"]
    expected = build_wan_2_2()
    expected.transformer_2.load_state_dict(trainer.model.state_dict())
    torch.testing.assert_close(sample(trainer.pipeline), sample(expected), rtol=0, atol=1e-5)


def _device(module: torch.nn.Module) -> str:
    return next(module.parameters()).device.type


def _watched(trainer: MaPOTrainer, note):
    compute = trainer.compute_losses

    def compute_losses(*args):
        note()
        return compute(*args)

    return compute_losses


def test_the_other_transformer_comes_to_the_device_to_sample(pairs, options, monkeypatch):
    trainer = MaPOTrainer(build_wan_2_2(), MaPOConfig(**options(denoiser=LOW)), pairs)
    other, moved = trainer.encoders.pipeline.transformer, []
    monkeypatch.setattr(other, "to", lambda device: moved.append(device) or other)
    device = torch.device("cpu")
    with trainer.encoders.on_device(device):
        assert moved == []
    with trainer.encoders.on_device(device, to_sample=True):
        assert moved == [device]


def test_one_transformer_is_enough_to_train_it(pairs, options, tmp_path):
    build_wan_2_2().save_pretrained(tmp_path / "base")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "base", transformer=None)
    train(MaPOTrainer(pipeline, MaPOConfig(**options(denoiser=LOW)), pairs))


def test_the_estimate_counts_what_is_trained():
    both, low = (
        estimate_memory(build_wan_2_2(), MaPOConfig(resolution=16, num_frames=5, denoiser=denoiser, use_cpu=True))
        for denoiser in (None, LOW)
    )
    count = sum(parameter.numel() for parameter in build_wan_2_2().transformer.parameters())
    assert (both.trained_parameters, low.trained_parameters) == (2 * count, count)
    assert both.gradients == 2 * low.gradients == 8 * count


def test_data_encoded_before_are_those_of_every_choice(pairs, options, tmp_path):
    build_wan_2_2().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    encoded = encode_dataset(base, pairs, MaPOConfig(**options()))
    for denoiser in (HIGH, LOW, None):
        train(MaPOTrainer(base, MaPOConfig(**options(denoiser=denoiser)), encoded))


# ---- What cannot be trained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("denoiser", "change", "message"),
    [
        ("unet", {}, "denoiser='unet': a WanPipeline has transformer and transformer_2"),
        (None, {"transformer": None}, r"without transformer, which.*alone \(denoiser='transformer_2'\)"),
        (HIGH, {"transformer": None}, "without transformer, which its sampler calls. Load it too.$"),
        (LOW, {"boundary_ratio": None}, "samples with transformer alone, as its config says"),
    ],
)
def test_a_transformer_that_is_not_there_is_an_error(denoiser, change, message, pairs, options):
    pipeline = build_wan_2_2()
    if "transformer" in change:
        pipeline.transformer = None
    pipeline.register_to_config(**{name: value for name, value in change.items() if name == "boundary_ratio"})
    with pytest.raises(ValueError, match=message):
        MaPOTrainer(pipeline, MaPOConfig(**options(denoiser=denoiser)), pairs)


def test_without_a_boundary_only_the_transformer_that_samples_is_trained(pairs, options):
    pipeline = build_wan_2_2()
    pipeline.register_to_config(boundary_ratio=None)
    before = weights_of(pipeline.transformer_2)
    train(MaPOTrainer(pipeline, MaPOConfig(**options()), pairs))
    assert_equal_weights(weights_of(pipeline.transformer_2), before)


def test_self_npo_does_not_train_one_transformer_alone(pairs, options):
    cfg = SelfNPOConfig(**options(denoiser=LOW))
    with pytest.raises(ValueError, match="denoiser='transformer_2': Self-NPO's trajectories go through all times"):
        SelfNPOTrainer(build_wan_2_2(), cfg, Dataset.from_dict({"prompt": pairs["prompt"]}))


def test_different_loras_are_not_trained_together(pairs, options, tmp_path):
    trainer = trained_lora(pairs, options, denoiser=HIGH)
    pipeline = build_wan_2_2()
    pipeline.load_lora_weights(trainer.args.output_dir)
    with pytest.raises(ValueError, match="different adapters .*transformer: default_0.* one at a time"):
        MaPOTrainer(pipeline, MaPOConfig(**options()), pairs)
    train(MaPOTrainer(pipeline, MaPOConfig(**options(denoiser=HIGH)), pairs))


def test_a_peft_model_in_the_pipeline_is_trained_alone(pairs, options):
    pipeline = build_wan_2_2()
    pipeline.transformer = get_peft_model(pipeline.transformer, LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="transformer came in a PeftModel, which can be trained alone"):
        MaPOTrainer(pipeline, MaPOConfig(**options()), pairs)
    train(MaPOTrainer(pipeline, MaPOConfig(**options(denoiser=HIGH)), pairs))


def test_a_checkpoint_of_one_transformer_is_not_resumed_with_both(pairs, options):
    cfg = MaPOConfig(**options(denoiser=HIGH, save_strategy="steps", save_steps=2))
    trainer = MaPOTrainer(build_wan_2_2(), cfg, pairs)
    trainer.train()
    folder = f"{trainer.args.output_dir}/checkpoint-2"
    assert json.loads(open(f"{folder}/trl_diffusion_pref.json").read())["denoisers"] == [HIGH]
    with pytest.raises(ValueError, match="holds transformer and this run trains transformer and transformer_2"):
        MaPOTrainer(build_wan_2_2(), MaPOConfig(**options()), pairs)


def test_families_with_one_denoiser_take_its_name_alone():
    family = family_named("StableDiffusionPipeline")
    assert family.with_denoiser("unet").denoiser_name == "unet"
    with pytest.raises(ValueError, match="denoiser='transformer': a StableDiffusionPipeline has unet"):
        family.with_denoiser("transformer")
    assert family_for(build_wan_2_2()).denoiser_names == (HIGH, LOW)


# ---- Sampling with what was trained ---------------------------------------------------------------------------------


@full_and_lora
@second_and_both
def test_a_comparison_samples_with_what_was_trained(denoiser, lora, pairs, options):
    cfg = MaPOConfig(**options(denoiser=denoiser))
    trainer = MaPOTrainer(build_wan_2_2(), cfg, pairs, peft_config=lora_config(lora))
    train(trainer)
    trainer.save_model()
    base, expected = build_wan_2_2(), sample(trainer.pipeline)
    before = sample(base)
    with with_tuned_weights(base, trainer.args.output_dir) as tuned:
        torch.testing.assert_close(sample(tuned), expected, rtol=0, atol=1e-5)
    assert torch.equal(sample(base), before)


@full_and_lora
@second_and_both
def test_guidance_has_a_negative_side_for_each_transformer(denoiser, lora, pairs, options):
    cfg = MaPOConfig(**options(denoiser=denoiser, negative=True, learning_rate=1e-2))
    trainer = MaPOTrainer(build_wan_2_2(), cfg, pairs, peft_config=lora_config(lora))
    train(trainer)
    trainer.save_model()
    pipeline = build_wan_2_2()
    # With one prompt on both sides only the models differ.
    embeds = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds.clone(), "output_type": "latent"}
    call |= {"num_inference_steps": 4, "height": 16, "width": 32, "num_frames": 5}

    def run(pipeline: DiffusionPipeline, scale: float) -> Tensor:
        return pipeline(**call, guidance_scale=scale, generator=torch.Generator().manual_seed(1)).frames

    plain = run(pipeline, 3.0)
    with negative_guidance(pipeline, trainer.args.output_dir):
        guided = run(pipeline, 3.0)
    assert torch.equal(run(pipeline, 3.0), plain)
    expected = build_wan_2_2()
    for name, part in parts(expected).items():
        part.forward = _guided(part.forward, parts(trainer.pipeline)[name].eval(), 3.0)
    torch.testing.assert_close(guided, run(expected, 1.0), rtol=0, atol=1e-4)
    assert (guided - plain).abs().max() > 1e-3


def _guided(own, negative: torch.nn.Module, scale: float):
    def forward(*args, **kwargs):
        (conditional,), (unconditional,) = own(*args, **kwargs), negative(*args, **kwargs)
        return (unconditional + scale * (conditional - unconditional),)

    return forward


def test_strengths_are_set_for_both_transformers(pairs, options):
    trainer = trained_lora(pairs, options)
    guidance = add_negative_guidance(build_wan_2_2(), trainer.args.output_dir)
    guidance.beta = 0.5
    assert [other.beta for other in guidance.others] == [0.5]


def test_a_lone_transformer_does_not_say_which_one_it_is():
    pipeline = build_wan_2_2()
    with pytest.raises(ValueError, match="not known for which of the WanPipeline's transformer and transformer_2"):
        add_negative_guidance(pipeline, build_wan_2_2().transformer)

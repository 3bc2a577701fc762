"""The estimate against the bytes that real training holds, and against the published models' sizes."""

import gc
import json
import shutil
import tempfile

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from helpers import tiny
from helpers.ranking import RankingConfig
from helpers.tensor_memory import PeakMemory
from helpers.training_runs import pairs  # noqa: F401
from helpers.votes import VoteConfig
from memory_recipes import flux_transformer
from peft import LoraConfig
from sdxl_memory import sdxl_unet
from torch import nn

from trl_diffusion_pref import (
    TRAINERS,
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    SelfNPOConfig,
    estimate_memory,
    families,
)
from trl_diffusion_pref.families.stable_diffusion import StableDiffusionFamily
from trl_diffusion_pref.shapes import load_pipeline, pipeline_folder, preference_pairs


TRAINER_OF = dict(TRAINERS.values())


def config_of(kind: type, **options):
    common = {"output_dir": tempfile.gettempdir(), "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    return kind(**{**common, "per_device_train_batch_size": 4, **options})


def measured_peak(trainer) -> int:
    """The most that tensors hold while it trains, its reference or teacher included."""
    others = [getattr(getattr(trainer, "reference", None), "live", None), getattr(trainer, "teacher", None)]
    held = [other.module for other in others if isinstance(getattr(other, "module", None), nn.Module)]
    gc.collect()
    with PeakMemory(trainer.model, *held) as measured:
        trainer.train()
    return measured.peak


# The marked ones vary by one option from another, and run in `make test-all`.
CASES = [
    pytest.param(
        "mixed",
        MaPOConfig,
        False,
        {"activation_checkpointing": False, "per_device_train_batch_size": 16},
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "mixed",
        MaPOConfig,
        False,
        {"activation_checkpointing": True, "per_device_train_batch_size": 16},
        marks=pytest.mark.slow,
    ),
    pytest.param("mixed", MaPOConfig, True, {"activation_checkpointing": False}, marks=pytest.mark.slow),
    ("mixed", MaPOConfig, True, {"activation_checkpointing": True}),
    pytest.param(
        "mixed",
        MaPOConfig,
        False,
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        marks=pytest.mark.slow,
    ),
    pytest.param("mixed", MaPOConfig, False, {"bf16": True}, marks=pytest.mark.slow),
    pytest.param("mixed", MaPOConfig, True, {"bf16": True, "activation_checkpointing": False}, marks=pytest.mark.slow),
    pytest.param(
        "mixed", DiffusionDPOConfig, True, {"bf16": True, "activation_checkpointing": False}, marks=pytest.mark.slow
    ),
    pytest.param("flow", MaPOConfig, True, {"bf16": True, "activation_checkpointing": False}, marks=pytest.mark.slow),
    ("flow", DiffusionDPOConfig, False, {"bf16": True, "activation_checkpointing": False}),
    pytest.param("mixed", DiffusionDPOConfig, False, {"activation_checkpointing": False}, marks=pytest.mark.slow),
    pytest.param("mixed", DiffusionDPOConfig, True, {"activation_checkpointing": True}, marks=pytest.mark.slow),
    ("mixed", DiffusionDPOConfig, False, {"optim": "sgd", "reference": "precomputed", "reference_draws": 1}),
    pytest.param("mixed", SelfNPOConfig, False, {"activation_checkpointing": False}, marks=pytest.mark.slow),
    pytest.param(
        "mixed", SelfNPOConfig, False, {"activation_checkpointing": False, "bf16": True}, marks=pytest.mark.slow
    ),
    pytest.param("mixed", SelfNPOConfig, True, {"bf16": True, "start": "data"}, marks=pytest.mark.slow),
    pytest.param(
        "flow",
        SelfNPOConfig,
        False,
        {"activation_checkpointing": True, "bf16": True, "teacher": "ema"},
        marks=pytest.mark.slow,
    ),
    pytest.param("flow", MaPOConfig, True, {"activation_checkpointing": False}, marks=pytest.mark.slow),
    pytest.param("flow", DiffusionDPOConfig, False, {"activation_checkpointing": True}, marks=pytest.mark.slow),
]


OTHERS = (
    *("flux2_klein", "pixart_sigma", "sana", "chroma", "auraflow", "lumina2", "z_image", "cogview4", "hidream"),
    "kolors",
)


@pytest.mark.parametrize(("base", "kind", "lora", "options"), CASES)
def test_the_total_is_what_training_holds(base, kind, lora, options, tmp_path):
    options = {**options, "output_dir": str(tmp_path), "max_steps": 2}
    if kind is DiffusionDPOConfig:
        options["divergence_guard"] = "off"
    # As it was saved: loaded by `load_pipeline` the flow base computes its silent tokens as one.
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder("flow")) if base == "flow" else load_pipeline(base)
    cfg = config_of(kind, **options)
    adapter = LoraConfig(r=8, init_lora_weights="gaussian") if lora else None
    estimate = estimate_memory(pipeline, cfg, adapter)
    rows = preference_pairs(32)
    if kind is SelfNPOConfig:
        rows = rows.rename_column("chosen", "image") if cfg.start == "data" else rows.select_columns("prompt")
    trainer = TRAINER_OF[kind](pipeline, cfg, rows, peft_config=adapter)
    assert estimate.total == pytest.approx(measured_peak(trainer), rel=0.03)
    assert estimate.trained_parameters == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "name",
    [
        "stable_diffusion_xl",
        "stable_diffusion_3",
        "flux_dev",
        "qwen_image",
        *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS if name in tiny.CASES),
    ],
)
def test_the_total_is_what_training_holds_of_every_family(name, tmp_path):
    options = {"activation_checkpointing": False, "resolution": 16, "max_steps": 2}
    cfg, pipeline = config_of(MaPOConfig, output_dir=str(tmp_path), **options), tiny.build(name)
    estimate = estimate_memory(pipeline, cfg)
    rows = preference_pairs(8)
    if name in ("qwen_image", "lumina2", "z_image", "cogview4"):
        # It trains with as many tokens as the batch's longest prompt has, and the estimate has all that there can be.
        # CogView4 trains each prompt of a batch with its own number.
        rows = rows.map(
            lambda row, number: {"prompt": "a" * 1100 if number % 2 or name == "cogview4" else row["prompt"]},
            with_indices=True,
        )
    trainer = MaPOTrainer(pipeline, cfg, rows)
    assert estimate.total == pytest.approx(measured_peak(trainer), rel=0.03)


@pytest.mark.slow
def test_sdxl_s_parts_are_known_before_anything_is_allocated():
    unet, cfg = sdxl_unet(), config_of(DiffusionDPOConfig, per_device_train_batch_size=1)
    with PeakMemory() as allocated:
        estimate = estimate_memory(unet, cfg)
    assert allocated.peak < 1e6
    assert estimate.parameters == estimate.trained_parameters == 2_567_463_684
    assert estimate.weights == estimate.gradients == estimate.reference == 4 * estimate.parameters
    assert estimate.optimizer_state == 8 * estimate.parameters
    assert estimate.checkpointing and estimate.total == estimate.total_with_checkpointing
    assert estimate.activations_with_checkpointing < 0.2 * estimate.activations_without_checkpointing
    held = estimate.weights + estimate.reference + estimate.optimizer_state
    assert held + estimate.gradients <= estimate.total <= held + estimate.gradients + estimate.activations
    assert "48.98" in str(estimate) and "64.51" in str(estimate)


@pytest.mark.slow
def test_flux_s_lora_needs_no_second_model():
    cfg = config_of(DiffusionDPOConfig, per_device_train_batch_size=1, bf16=True)
    estimate = estimate_memory(flux_transformer().to(torch.bfloat16), cfg, LoraConfig(r=16), "cuda")
    assert estimate.parameters - estimate.trained_parameters == 11_901_408_320
    assert estimate.weights == 2 * 11_901_408_320 + 4 * estimate.trained_parameters
    assert estimate.reference == 0
    assert estimate.total < 40e9 < estimate.total_without_checkpointing


def test_a_folder_s_configs_are_enough(tmp_path):
    folder = tmp_path / "configs"
    shutil.copytree(pipeline_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    cfg = config_of(MaPOConfig)
    assert estimate_memory(str(folder), cfg) == estimate_memory(load_pipeline(), cfg)


def test_the_model_is_left_as_it_was():
    pipeline = load_pipeline()
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in pipeline.unet.named_parameters()}
    estimate_memory(pipeline, config_of(MaPOConfig), LoraConfig(r=4))
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in pipeline.unet.named_parameters()} == before
    assert not pipeline.unet.is_gradient_checkpointing


@pytest.mark.slow
def test_a_carried_adapter_is_trained_and_copied_as_the_reference():
    pipeline = load_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_k", "to_q"]))
    adapter = sum(p.numel() for name, p in pipeline.unet.named_parameters() if "lora_" in name)
    estimate = estimate_memory(pipeline, config_of(DiffusionDPOConfig))
    assert estimate.trained_parameters == adapter
    assert estimate.reference == 4 * adapter


def test_states_in_eight_bits_have_a_maximum_per_block_and_small_tensors_stay_in_float32():
    unet = load_pipeline().unet
    estimate = estimate_memory(unet, config_of(MaPOConfig, optim="adamw_bnb_8bit"))
    counts = [p.numel() for p in unet.parameters()]
    expected = sum(2.03125 * n if n >= 4096 else 8 * n for n in counts)
    assert estimate.optimizer_state == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_resolution_and_precision_change_activations():
    pipeline, (plain, larger, half) = (
        load_pipeline(),
        (
            config_of(MaPOConfig, activation_checkpointing=False, **options)
            for options in ({}, {"resolution": 64}, {"bf16": True})
        ),
    )
    activations = estimate_memory(pipeline, plain).activations
    assert 3 < estimate_memory(pipeline, larger).activations / activations < 5
    assert 0.5 < estimate_memory(pipeline, half).activations / activations < 0.9


@pytest.mark.parametrize("base", ["mixed", "flow"])
def test_a_denoiser_alone_counts_as_one_with_published_encoders(base):
    pipeline, cfg = load_pipeline(base), config_of(MaPOConfig)
    alone = estimate_memory(getattr(pipeline, "unet", None) or pipeline.transformer, cfg)
    whole = estimate_memory(pipeline, cfg)
    assert alone.weights == whole.weights
    assert alone.activations > whole.activations  # 77 tokens instead of 16


@pytest.mark.slow
def test_the_cpu_s_autocast_keeps_less_than_cuda_s():
    pipeline, cfg = load_pipeline(), config_of(MaPOConfig, bf16=True, activation_checkpointing=False)
    cpu, cuda = (estimate_memory(pipeline, cfg, device_type=device) for device in ("cpu", "cuda"))
    assert cpu == estimate_memory(pipeline, cfg)
    assert cpu.activations < 0.9 * cuda.activations
    assert "bf16 autocast (cuda)" in str(cuda)
    plain = config_of(MaPOConfig)
    on_gpu = estimate_memory(pipeline, plain, device_type="cuda")
    assert estimate_memory(pipeline, plain).total == pytest.approx(on_gpu.total, rel=0.01)


@pytest.mark.slow
def test_self_npo_in_bf16_is_estimated_for_cuda():
    """The teacher's passes without gradients make half-precision copies of weights; the student must not get those."""
    adapter, options = LoraConfig(r=4), {"bf16": True, "per_device_train_batch_size": 2}
    frozen, ema = (
        estimate_memory(load_pipeline(), config_of(SelfNPOConfig, teacher=teacher, **options), adapter, "cuda")
        for teacher in ("frozen", "ema")
    )
    # The teacher is the model without its adapter, or with a second one.
    assert ema.gradients == 4 * ema.trained_parameters == ema.reference > 0 == frozen.reference
    assert ema.total - frozen.total == ema.reference


def test_what_cannot_be_estimated_is_named():
    with pytest.raises(TypeError, match="cfg is a dict"):
        estimate_memory(load_pipeline(), {})
    with pytest.raises(TypeError, match="AutoencoderKL.*UNet2DConditionModel"):
        estimate_memory(load_pipeline().vae, config_of(MaPOConfig))
    with pytest.raises(ValueError, match="device_type='mps'.*cuda and cpu"):
        estimate_memory(load_pipeline(), config_of(MaPOConfig), device_type="mps")
    with pytest.raises(ValueError, match="optim='galore_adamw'"):
        estimate_memory(load_pipeline(), config_of(MaPOConfig, optim="galore_adamw"))


@pytest.mark.slow
def test_a_frozen_reference_that_was_left_behind_is_not_trained(tmp_path):
    pipeline, cfg = load_pipeline(), config_of(DiffusionDPOConfig, output_dir=str(tmp_path))
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_k", "to_q"]))
    before = estimate_memory(pipeline, cfg).trained_parameters
    DiffusionDPOTrainer(pipeline, cfg, preference_pairs(2))
    assert estimate_memory(pipeline, cfg).trained_parameters == before


def test_a_denoiser_without_gradient_checkpointing_has_no_column_for_it(monkeypatch):
    pipeline = load_pipeline()
    monkeypatch.setattr(type(pipeline.unet), "_supports_gradient_checkpointing", False)
    estimate = estimate_memory(pipeline, config_of(MaPOConfig))
    assert estimate.total_with_checkpointing is None
    assert estimate.total == estimate.total_without_checkpointing


VIDEOS_AND_AUDIO = ["wan", "cogvideox", "ace_step", "audioldm2"]
OTHERS_OF_THEM = ["wan_5b", "ltx", "hunyuan_video", "hunyuan_video15", "stable_audio"]


@pytest.mark.parametrize(
    "name", [*VIDEOS_AND_AUDIO, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS_OF_THEM)]
)
@pytest.mark.parametrize("kind", [MaPOConfig, pytest.param(SelfNPOConfig, marks=pytest.mark.slow)])
def test_the_total_is_what_videos_and_audio_take(name, kind, pairs, tmp_path):
    case, pipeline = tiny.CASES[name], tiny.build(name)
    size = {} if case.waveform else {"resolution": min(case.size), "num_frames": case.frames}
    # On a CPU the loader's batch in half precision is in memory beside the step's.
    options = {"output_dir": str(tmp_path), "activation_checkpointing": False, "max_steps": 2, **size}
    cfg = config_of(kind, **options, cache_dtype="float32", per_device_train_batch_size=2)
    estimate = estimate_memory(pipeline, cfg)
    if name == "ace_step":
        # It trains with as many tokens as a prompt has, and the estimate has all that there can be.
        pairs = pairs.map(lambda row: {"prompt": "a" * 600})
    trainer = TRAINER_OF[kind](pipeline, cfg, pairs if kind is MaPOConfig else pairs.select_columns("prompt"))
    # Beside what grows with batch and model, Self-NPO of the tiny Stable Audio holds another 34 kB.
    assert estimate.total == pytest.approx(measured_peak(trainer), rel=0.03, abs=40e3)


def test_a_family_from_outside_is_estimated(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    pipeline, cfg = tiny.build("stable_diffusion"), config_of(MaPOConfig)
    own = type("OwnPipeline", (StableDiffusionPipeline,), {})(**pipeline.components)
    families.register_family(type("OwnFamily", (StableDiffusionFamily,), {"pipeline_class": "OwnPipeline"})())
    assert estimate_memory(own, cfg).total == estimate_memory(pipeline, cfg).total


def test_algorithms_from_outside_are_estimated():
    pipeline = load_pipeline()
    votes = estimate_memory(pipeline, config_of(VoteConfig))
    ranking = estimate_memory(pipeline, config_of(RankingConfig))
    assert votes.reference == 0 and ranking.reference == ranking.weights
    assert 2.5 < ranking.activations / votes.activations < 3.5


def test_another_pipeline_class_in_a_folder_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(TypeError, match="KandinskyPipeline is not supported"):
        estimate_memory(tmp_path, config_of(MaPOConfig))


@pytest.mark.slow
def test_a_reference_that_moves_is_estimated(tmp_path):
    options = {"output_dir": str(tmp_path), "reference": "copy", "use_cpu": True}
    still, moving = (
        estimate_memory(load_pipeline(), DiffusionDPOConfig(sync_ref_model=moves, **options))
        for moves in (False, True)
    )
    assert still.total == moving.total

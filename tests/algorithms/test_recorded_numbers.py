"""Ten training steps of each method from fixed seeds give the numbers that are on record, to the last digit.

`PYTHONPATH=tests python tests/algorithms/test_recorded_numbers.py` writes this processor's record. Do so only where
the numbers are meant to change, and say why in the commit. Processors round differently: a record is found by a
fingerprint of one computation, and on a processor without one, numbers are compared to 1/500 of the largest of their
series instead. (The two processors on record differ by less than 1/4000.)
"""

import hashlib
import json
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.pipelines import build_tiny_pipeline
from peft import LoraConfig

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


RECORD = Path(__file__).parents[1] / "reference" / "ten_steps.json"
MAPO, DPO, SELF_NPO = (
    (MaPOTrainer, MaPOConfig),
    (DiffusionDPOTrainer, DiffusionDPOConfig),
    (SelfNPOTrainer, SelfNPOConfig),
)
STABLE_DIFFUSION, STABLE_DIFFUSION_3, XL = "stable_diffusion", "stable_diffusion_3", "stable_diffusion_xl"
GRID = {"solver_steps": 10, "truncated_steps": 3}
SHORT = GRID | {"ema_decay": 0.9}
# Method, pipeline, options, whether a LoRA is trained.
RUNS = {
    "mapo": (MAPO, STABLE_DIFFUSION, {"prompt_dropout": 0.3}, False),
    "mapo, random crops and flips": (MAPO, STABLE_DIFFUSION, {"crop": "random", "random_flip": True}, False),
    "mapo, second version": (MAPO, STABLE_DIFFUSION, {"loss_type": "mapo_v2", "beta": 64.0}, False),
    "mapo, negative": (MAPO, STABLE_DIFFUSION, {"negative": True, "latent_sampling": "mean"}, False),
    "mapo, accumulated": (MAPO, STABLE_DIFFUSION, {"gradient_accumulation_steps": 2}, False),
    "mapo, SDXL": (MAPO, XL, {}, False),
    "mapo, flow": (MAPO, STABLE_DIFFUSION_3, {"timestep_shift": 3.0}, False),
    "mapo, LoRA": (MAPO, STABLE_DIFFUSION, {}, True),
    "dpo, copy": (DPO, STABLE_DIFFUSION, {"beta": 500.0}, False),
    "dpo, precomputed": (DPO, STABLE_DIFFUSION, {"reference": "precomputed", "reference_draws": 3}, False),
    "dpo, adapter off": (DPO, STABLE_DIFFUSION, {"beta": 2000.0, "winner_preserving_mu": 0.9}, True),
    "dpo, moving reference": (DPO, STABLE_DIFFUSION, {"sync_ref_model": True, "ref_model_sync_steps": 2}, False),
    "dpo, flow": (DPO, STABLE_DIFFUSION_3, {"beta_schedule": "flow", "sft_weight": 1.0, "margin_clip": 2.0}, False),
    "dspo": (DPO, STABLE_DIFFUSION, {"loss_type": "dspo"}, False),
    "irepo": (DPO, STABLE_DIFFUSION, {"loss_type": "irepo", "beta": 100.0}, False),
    "self-npo, noise": (SELF_NPO, STABLE_DIFFUSION, SHORT | {"guidance_scale": 3.0}, False),
    "self-npo, data": (SELF_NPO, XL, SHORT | {"preset": "released_code", "prompt_dropout": 0.2}, False),
    "self-npo, flow": (SELF_NPO, STABLE_DIFFUSION_3, GRID | {"preset": "paper"}, False),
    "self-npo, LoRA": (SELF_NPO, STABLE_DIFFUSION, SHORT, True),
}
# Not of the run: how long it took.
TIMES = ("runtime", "per_second", "total_flos", "preparation")


def processor() -> str:
    """Fingerprint of one computation with convolution, matrix product and transcendental functions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 16, 16, generator=generator)
    weight = torch.randn(64, 32, 3, 3, generator=generator)
    y = torch.nn.functional.silu(torch.conv2d(x, weight, padding=1)).flatten(2)
    z = torch.softmax(y @ y.transpose(1, 2) / 100, dim=-1) @ y
    text = f"{torch.__version__} " + hashlib.sha256(z.numpy().tobytes()).hexdigest()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def wide_pairs(side: int):
    """Pairs whose images need no scaling: as high as what is trained on, and half as wide again."""
    pairs = preference_pairs(24, seed=7)

    def scaled(row):
        size = (side * 3 // 2, side)
        return {column: row[column].resize(size, resample=0) for column in ("chosen", "rejected")}

    return pairs.map(scaled, features=pairs.features)


def ten_steps(name: str, folder: Path) -> dict[str, list[float]]:
    """Every number that a run logs, and the sum of each trained tensor after it."""
    (trainer_class, config_class), pipeline, options, lora = RUNS[name]
    build = build_tiny_pipeline if pipeline == STABLE_DIFFUSION else getattr(tiny, f"build_{pipeline}")
    torch.manual_seed(0)
    built = build()
    pairs = wide_pairs(family_for(built).resolution(built))
    if trainer_class is SelfNPOTrainer:
        pairs = pairs.rename_column("chosen", "image")
    config = config_class(
        output_dir=str(folder / "output"),
        dataset_cache_dir=str(folder / "cache"),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=10,
        learning_rate=1e-3 if lora else 1e-4,
        eval_strategy="steps",
        eval_steps=5,
        eval_draws=2,
        logging_steps=1,
        save_strategy="no",
        activation_checkpointing=False,
        disable_tqdm=True,
        cache_dtype="float32",
        aspect_ratio_buckets=False,
        use_cpu=True,
        report_to="none",
        **({"divergence_guard": "off"} if config_class is DiffusionDPOConfig else {}),
        **options,
    )
    peft_config = LoraConfig(r=4, lora_alpha=8) if lora else None
    trainer = trainer_class(built, config, pairs, pairs.select(range(5)), peft_config=peft_config)
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in sorted(trainer.model.named_parameters()):
        if "lora_A" in parameter_name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    trainer.train()
    numbers: dict[str, list[float]] = {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            if not any(part in key for part in TIMES):
                numbers.setdefault(key, []).append(float(value))
    trained = sorted((name, tensor) for name, tensor in trainer.model.named_parameters() if tensor.requires_grad)
    numbers["weights"] = [tensor.detach().double().sum().item() for _, tensor in trained]
    return numbers


@pytest.mark.parametrize("name", RUNS)
def test_ten_steps_give_the_recorded_numbers(name, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        numbers, own = ten_steps(name, tmp_path), processor()
    finally:
        torch.set_num_threads(threads)
    records = json.loads(RECORD.read_text())
    recorded = records.get(own, next(iter(records.values())))[name]
    assert recorded.keys() <= numbers.keys()
    for key, values in recorded.items():
        tolerance = 0.0 if own in records else max(map(abs, values)) / 500
        assert numbers[key] == pytest.approx(values, rel=0.0, abs=tolerance), key


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = {}
    for run_name in RUNS:
        with tempfile.TemporaryDirectory() as temporary:
            runs[run_name] = ten_steps(run_name, Path(temporary))
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    RECORD.write_text(json.dumps({**records, processor(): runs}, indent=1) + "\n")

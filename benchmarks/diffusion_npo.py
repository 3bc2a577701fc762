"""Diffusion-NPO: guidance with a model of the rejected images, against plain guidance at the same scale.

    python benchmarks/diffusion_npo.py

The negative models are LoRAs trained on pairs that prefer outlined shapes, with the preference inverted. The positive
side is the embedded pipeline.
"""

import tempfile
from pathlib import Path

import numpy as np
from peft import LoraConfig

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer
from trl_diffusion_pref.evaluation import bootstrap_interval
from trl_diffusion_pref.guidance import negative_guidance
from trl_diffusion_pref.shapes import judge, load_pipeline, pipeline_folder, preference_pairs, prompts, sample


RESULTS = Path(__file__).parent / "results"
SCALES = (1.5, 3.0, 5.0, 7.5)
SAMPLES, STEPS, BATCH_SIZE, PAIRS = 256, 30, 32, 256
METHODS = {
    "Diffusion-DPO, beta 500, lr 1e-3": (
        DiffusionDPOTrainer,
        DiffusionDPOConfig,
        {"beta": 500.0, "divergence_guard": "off", "learning_rate": 1e-3},
    ),
    "MaPO, lr 3e-3": (MaPOTrainer, MaPOConfig, {"learning_rate": 3e-3}),
}


def measure(pipeline, scale: float) -> tuple[np.ndarray, float, float]:
    """For each image, whether it is outlined; shares of clean images and of those as prompted."""
    asked = (SAMPLES // len(prompts()) + 1) * prompts()
    asked = asked[:SAMPLES]
    verdicts = judge(sample(pipeline, asked, guidance_scale=scale, batch_size=64))
    outlined = np.array([float(verdict.style == "outlined") for verdict in verdicts])
    right = np.mean([verdict.prompt == prompt for verdict, prompt in zip(verdicts, asked, strict=True)])
    return outlined, float(np.mean([verdict.clean for verdict in verdicts])), float(right)


def main() -> None:
    pipeline = load_pipeline()
    plain = {scale: measure(pipeline, scale) for scale in SCALES}
    lines = [
        "# Diffusion-NPO on pairs",
        "",
        f"Written by `benchmarks/diffusion_npo.py`. LoRA of rank 8, {STEPS} steps of {BATCH_SIZE} pairs, prompt "
        f"dropout 0.2. {SAMPLES} pictures per cell, DDIM 20 steps, the same prompts and seeds: share in the preferred "
        "(outlined) style; in brackets the difference from plain guidance with its 95 % interval (bootstrap, paired); "
        "then clean / colour and shape as asked.",
        "",
        "| negative model | " + " | ".join(f"scale {scale:g}" for scale in SCALES) + " |",
        "|---" * (len(SCALES) + 1) + "|",
        "| none (plain guidance) | "
        + " | ".join(f"{outlined.mean():.0%}, {clean:.0%} / {right:.0%}" for outlined, clean, right in plain.values())
        + " |",
    ]
    for method, (trainer_class, config_class, options) in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = config_class(
                output_dir=folder,
                negative=True,
                max_steps=STEPS,
                per_device_train_batch_size=BATCH_SIZE,
                prompt_dropout=0.2,
                activation_checkpointing=False,
                save_strategy="no",
                disable_tqdm=True,
                **options,
            )
            lora = LoraConfig(r=8, lora_alpha=8)
            trainer = trainer_class(str(pipeline_folder()), config, preference_pairs(PAIRS), peft_config=lora)
            trainer.train()
            trainer.save_model()
            cells = []
            with negative_guidance(pipeline, folder):
                for scale in SCALES:
                    outlined, clean, right = measure(pipeline, scale)
                    gain = outlined - plain[scale][0]
                    low, high = bootstrap_interval(gain)
                    cells.append(
                        f"{outlined.mean():.0%} ({100 * gain.mean():+.0f}: {100 * low:+.0f} to {100 * high:+.0f}), "
                        f"{clean:.0%} / {right:.0%}"
                    )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
        print("\n".join(lines), flush=True)
    (RESULTS / "diffusion_npo.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

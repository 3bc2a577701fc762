"""What a healthy run of each trainer looks like: short runs of the embedded pipeline, plotted.

    python benchmarks/healthy_runs.py

Writes docs/images/<trainer>_run.png, which the trainers' pages show, and results/healthy_runs.md.
"""

import argparse
import tempfile
import time
from pathlib import Path

from datasets import Dataset
from PIL import Image
from transformers.trainer_callback import PrinterCallback

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    SelfNPOConfig,
    SelfNPOTrainer,
)
from trl_diffusion_pref.shapes import pipeline_folder, preference_pairs, prompts
from trl_diffusion_pref.training.trainer import DiffusionTrainer


ROOT = Path(__file__).parents[1]
PAIRS, HELD_OUT, STEPS, BATCH = 512, 48, 60, 16
COMMON = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": BATCH,
    "learning_rate": 1e-4,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 15,
    "eval_on_start": True,
    "eval_draws": 4,
    "activation_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": [],
}


def trainer_of(name: str, folder: str) -> DiffusionTrainer:
    """A trainer with its data, which writes to the folder."""
    model, options = str(pipeline_folder()), COMMON | {"output_dir": folder}
    if name == "self_npo":
        asked = Dataset.from_dict({"prompt": 16 * prompts()})
        return SelfNPOTrainer(model, SelfNPOConfig(**options), asked, asked.select(range(HELD_OUT)))
    pairs, held_out = preference_pairs(PAIRS), preference_pairs(HELD_OUT, seed=1)
    if name == "mapo":
        return MaPOTrainer(model, MaPOConfig(**options), pairs, held_out)
    # The beta of examples/diffusion_dpo_shapes.py; published ones are for models with smaller errors.
    config = DiffusionDPOConfig(**{**options, "beta": 2000.0, "prompt_dropout": 0.0, "learning_rate": 1e-5})
    return DiffusionDPOTrainer(model, config, pairs, held_out)


def rows_of(history: list[dict[str, float]]) -> list[str]:
    """First and last value of each metric, as rows of a table."""
    rows = []
    for metric in dict.fromkeys(name for entry in history for name in entry):
        kept = metric in ("loss", "x0_error", "eval_loss", "eval_x0_error", "trajectories/begun")
        kept |= metric.startswith(("mse/", "rewards/")) or metric.endswith("_accuracy")
        if not kept:
            continue
        values = [entry[metric] for entry in history if metric in entry]
        rows.append(f"| `{metric}` | {values[0]:.4g} | {min(values):.4g} | {max(values):.4g} | {values[-1]:.4g} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    lines = [
        "# Healthy runs",
        "",
        f"Written by `benchmarks/healthy_runs.py`: the embedded pipeline, {STEPS} steps of {BATCH} rows, all weights; "
        f"{HELD_OUT} held-out rows, evaluated at the start and every {COMMON['eval_steps']} steps. Training values "
        f"are means over {COMMON['logging_steps']} steps.",
        "",
    ]
    for name in ("mapo", "diffusion_dpo", "self_npo"):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(name, folder)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        picture = ROOT / "docs" / "images" / f"{name}_run.png"
        trainer.plot().savefig(picture, dpi=70)
        # Few colours are enough for lines, and make a smaller file.
        Image.open(picture).convert("RGB").quantize(64).save(picture, optimize=True)
        print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB, {time.perf_counter() - began:.0f} s", flush=True)
        lines += [f"## {name}", "", "| metric | first | least | greatest | last |", "|---|---|---|---|---|"]
        lines += [*rows_of(trainer.state.log_history), ""]
    text = "\n".join(lines)
    (ROOT / "benchmarks" / "results" / "healthy_runs.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

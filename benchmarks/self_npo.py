"""Does guidance with a Self-NPO model beat plain guidance? Measured on the embedded pipeline and an early checkpoint.

    python benchmarks/self_npo.py

Quality is the share of clean images (`shapes.judge`: distance to the nearest drawing at most 0.08) and that distance;
faithfulness is the share with the colour and the shape of the prompt. Every cell has the same prompts and seeds, so
differences from plain guidance at the same scale are computed image by image; their intervals are bootstrapped over
images. Finished cells are kept in results/self_npo.json and not repeated.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from trl_diffusion_pref import SelfNPOConfig, SelfNPOTrainer
from trl_diffusion_pref.evaluation import bootstrap_interval
from trl_diffusion_pref.guidance import negative_guidance
from trl_diffusion_pref.shapes import judge, load_pipeline, preference_pairs, prompts, sample
from trl_diffusion_pref.shapes.judge import CLEAN_DISTANCE
from trl_diffusion_pref.shapes.train import OUTLINED_SHARE, train_denoiser


RESULTS = Path(__file__).parent / "results"
SCALES = (1.5, 3.0, 5.0, 7.5)
SAMPLES = 512
SAMPLING_STEPS = 20
STEPS = 80
BATCH_SIZE = 32
LEARNING_RATE = 1e-4
EARLY_STEPS, PLANNED_STEPS = 400, 800
BASES = {
    "finished": "the embedded pipeline",
    "early": f"its UNet trained anew, stopped at step {EARLY_STEPS} of {PLANNED_STEPS}",
}
# Options of the trainer, and beta of the guidance.
SETTINGS = {
    "default preset (noise, w = -1)": ({}, 1.0),
    "default preset, beta 0.5": ({}, 0.5),
    "default preset, learning rate 3e-4": ({"learning_rate": 3e-4}, 1.0),
    "default preset, learning rate 3e-4, beta 0.5": ({"learning_rate": 3e-4}, 0.5),
    "released_code preset (data, w = -1)": ({"preset": "released_code"}, 1.0),
    "paper preset (noise, w = 0)": ({"preset": "paper"}, 1.0),
}


def load_base(name: str, folder: Path) -> StableDiffusionPipeline:
    """One of `BASES`; the early one is trained the first time."""
    pipeline = load_pipeline()
    if name == "finished":
        return pipeline
    checkpoint = folder / f"step-{EARLY_STEPS}"
    if not checkpoint.is_dir():
        torch.manual_seed(0)
        pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config)
        train_denoiser(
            pipeline,
            OUTLINED_SHARE,
            PLANNED_STEPS,
            seed=5,
            save_every=EARLY_STEPS,
            checkpoint_folder=folder,
        )
    pipeline.unet = UNet2DConditionModel.from_pretrained(checkpoint)
    return pipeline


def train_negative(base: StableDiffusionPipeline, options: dict) -> StableDiffusionPipeline:
    """Self-NPO with all weights, in place."""
    with tempfile.TemporaryDirectory() as folder:
        config = SelfNPOConfig(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH_SIZE,
            activation_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=STEPS,
            **{"learning_rate": LEARNING_RATE, **options},
        )
        if config.start == "data":
            data = preference_pairs(512, seed=11, preferred_style="filled").rename_column("chosen", "image")
        else:
            data = Dataset.from_dict({"prompt": 16 * prompts()})
        SelfNPOTrainer(base, config, data).train()
    return base


def measure(pipeline: StableDiffusionPipeline, scale: float) -> dict:
    """For each image: distance to the nearest drawing, and whether (1 or 0) colour and shape are as prompted."""
    asked = (SAMPLES // len(prompts()) + 1) * prompts()
    asked = asked[:SAMPLES]
    images = sample(pipeline, asked, guidance_scale=scale, steps=SAMPLING_STEPS, batch_size=64)
    verdicts = judge(images)
    return {
        "distance": [round(verdict.distance, 5) for verdict in verdicts],
        "right": "".join(str(int(v.prompt == prompt)) for v, prompt in zip(verdicts, asked, strict=True)),
    }


def clean(cell: dict) -> np.ndarray:
    """For each image, 1 or 0."""
    return (np.array(cell["distance"]) <= CLEAN_DISTANCE).astype(float)


def right(cell: dict) -> float:
    """Share with colour and shape as prompted."""
    return cell["right"].count("1") / len(cell["right"])


def run(base: str, cells: dict, save, folder: Path) -> None:
    """Fills in one base's cells."""

    def fill(key: str, scale: float, pipeline) -> None:
        name = f"{base} | {key} | {scale:g}"
        if name not in cells:
            cells[name] = measure(pipeline, scale)
            save()
            print(name, f"clean {clean(cells[name]).mean():.3f} right {right(cells[name]):.3f}", flush=True)

    plain = load_base(base, folder)
    fill("alone: base", 1.0, plain)
    for scale in SCALES:
        fill("plain", scale, plain)
    trained: dict[str, StableDiffusionPipeline] = {}
    for setting, (options, beta) in SETTINGS.items():
        if all(f"{base} | {setting} | {scale:g}" in cells for scale in SCALES):
            continue
        key = json.dumps(options)
        if key not in trained:
            trained.clear()
            trained[key] = train_negative(load_base(base, folder), options)
        if beta == 1.0:
            fill(f"alone: {setting}", 1.0, trained[key])
        with negative_guidance(plain, trained[key], beta=beta):
            for scale in SCALES:
                fill(setting, scale, plain)


def table(cells: dict) -> str:
    """The results as Markdown."""
    lines = [
        "# Self-NPO",
        "",
        f"Self-NPO with all weights: {STEPS} steps of {BATCH_SIZE} at learning rate {LEARNING_RATE:g}. {SAMPLES} "
        f"pictures per cell, DDIM {SAMPLING_STEPS} steps, the same prompts and seeds everywhere. Share of clean "
        "pictures; in brackets the difference from plain guidance at the same scale with its 95 % interval (bootstrap "
        "over pictures, paired).",
        "",
    ]
    for base, what in BASES.items():
        if f"{base} | plain | {SCALES[-1]:g}" not in cells:
            continue
        scales = " | ".join(f"scale {scale:g}" for scale in SCALES)
        head = [f"| | alone (scale 1) | {scales} |", "|---|---|" + "---|" * len(SCALES)]
        lines += [f"## Base: {base} ({what})", "", *head]
        for setting in ("plain", *SETTINGS):
            if f"{base} | {setting} | {SCALES[-1]:g}" not in cells:
                continue
            alone = cells.get(f"{base} | alone: {'base' if setting == 'plain' else setting} | 1")
            row = [setting, f"{clean(alone).mean():.0%}" if alone else ""]
            for scale in SCALES:
                cell, plain = (cells[f"{base} | {key} | {scale:g}"] for key in (setting, "plain"))
                text = f"{clean(cell).mean():.0%}"
                if setting != "plain":
                    gain = clean(cell) - clean(plain)
                    low, high = bootstrap_interval(gain)
                    text += f" ({100 * gain.mean():+.1f}: {100 * low:+.1f} to {100 * high:+.1f})"
                row.append(text)
            lines.append("| " + " | ".join(row) + " |")
        lines += [
            "",
            "Mean distance to the nearest drawing in units of 1e-4, lower is better (difference from plain guidance "
            "with its interval), and share with colour and shape as asked:",
            "",
        ]
        lines += head
        for setting in ("plain", *SETTINGS):
            if f"{base} | {setting} | {SCALES[-1]:g}" not in cells:
                continue
            row = [setting]
            for scale in (None, *SCALES):
                alone = "alone: base" if setting == "plain" else f"alone: {setting}"
                cell = cells.get(f"{base} | {alone} | 1" if scale is None else f"{base} | {setting} | {scale:g}")
                if cell is None:
                    row.append("")
                    continue
                text = f"{1e4 * np.mean(cell['distance']):.0f}"
                if scale is not None and setting != "plain":
                    plain = cells[f"{base} | plain | {scale:g}"]
                    change = 1e4 * (np.array(cell["distance"]) - np.array(plain["distance"]))
                    low, high = bootstrap_interval(change)
                    text += f" ({change.mean():+.0f}: {low:+.0f} to {high:+.0f})"
                row.append(f"{text}, {right(cell):.0%}")
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    file = RESULTS / "self_npo.json"
    cells = json.loads(file.read_text()) if file.is_file() else {}

    def save() -> None:
        file.write_text(json.dumps(cells) + "\n")
        (RESULTS / "self_npo.md").write_text(table(cells))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--early_base", type=Path, help="folder that keeps the early base, else trained each time")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        for base in ("early", "finished"):
            run(base, cells, save, options.early_base or Path(folder))
    save()


if __name__ == "__main__":
    main()

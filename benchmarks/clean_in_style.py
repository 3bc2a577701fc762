"""How far the base's own images are from drawings, by style, and how far a tuned model's: is a change of style a loss?

    python benchmarks/clean_in_style.py

Written to results/clean_in_style.md. The limits in `shapes.judge.CLEAN_IN_STYLE` are the base's 90 % quantiles here,
rounded to hundredths.
"""

import tempfile
from pathlib import Path

import numpy as np

from trl_diffusion_pref import MaPOConfig, MaPOTrainer
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs, prompts, sample
from trl_diffusion_pref.shapes.judge import judge


RESULTS = Path(__file__).parent / "results"
IMAGES, TUNED_IMAGES, SEEDS = 2048, 256, (0, 1, 2)


def line(name: str, style: str, distances: np.ndarray) -> str:
    quantiles = " | ".join(f"{value:.3f}" for value in np.quantile(distances, [0.5, 0.75, 0.9]))
    limits = " | ".join(f"{np.mean(distances <= limit):.0%}" for limit in (0.08, 0.12))
    return f"| {name} | {style} | {len(distances)} | {quantiles} | {limits} |"


def by_style(pipeline, count: int, seed: int) -> dict[str, np.ndarray]:
    asked = (count // len(prompts()) + 1) * prompts()
    verdicts = judge(sample(pipeline, asked[:count], seed=seed))
    styles = {verdict.style for verdict in verdicts}
    return {style: np.array([v.distance for v in verdicts if v.style == style]) for style in sorted(styles)}


def tuned(seed: int):
    with tempfile.TemporaryDirectory() as folder:
        config = MaPOConfig(
            output_dir=folder,
            max_steps=60,
            per_device_train_batch_size=32,
            learning_rate=1e-4,
            seed=seed,
            activation_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = MaPOTrainer(load_pipeline(), config, preference_pairs(512, seed=seed))
        trainer.train()
        return trainer.pipeline


def main() -> None:
    lines = [
        "# Distance to the nearest drawing, by style",
        "",
        f"Written by `benchmarks/clean_in_style.py`: {IMAGES} images of the base, and {TUNED_IMAGES} after the demo's "
        "MaPO run with each of three seeds.",
        "",
        "| model | style | images | median | 75 % | 90 % | within 0.08 | within 0.12 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [line("base", style, found) for style, found in by_style(load_pipeline(), IMAGES, 5).items()]
    for seed in SEEDS:
        found = by_style(tuned(seed), TUNED_IMAGES, 5)
        lines += [line(f"MaPO, seed {seed}", style, distances) for style, distances in found.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "clean_in_style.md").write_text(text)


if __name__ == "__main__":
    main()

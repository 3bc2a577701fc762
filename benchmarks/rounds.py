"""What rounds of self-made pairs do to the embedded pipeline: with MaPO, and how long they take; with iREPO.

    python benchmarks/rounds.py
    python benchmarks/rounds.py --variant irepo --work_dir rounds-irepo

Written to results/rounds.md and results/rounds_irepo.md. The second goes on where it was interrupted, with the rounds
that are in its folder.
"""

import argparse
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import rounds_shapes  # noqa: E402
from diffusers import DDIMScheduler, UNet2DConditionModel  # noqa: E402

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, train_in_rounds  # noqa: E402
from trl_diffusion_pref.shapes import (  # noqa: E402
    Summary,
    judge,
    load_pipeline,
    prompts,
    sample,
    sample_base,
    summarize,
)


ROUNDS = 3
# Of iREPO, for each seed.
IREPO_ROUNDS, SEEDS, SAMPLES, STEPS, BETA, RATE = 2, 3, 6, 40, 20.0, 3e-5
ASKED = (4 * prompts())[:64]


def style(prompts, samples, **columns) -> list[float]:
    """1 for what is outlined."""
    return [float(verdict.style == "outlined") for verdict in judge(samples)]


def content(prompts, samples, **columns) -> list[float]:
    """1 for the colour and shape of the prompt."""
    return [float(verdict.prompt == prompt) for prompt, verdict in zip(prompts, judge(samples), strict=True)]


def cleanness(prompts, samples, **columns) -> list[float]:
    """The distance to the nearest drawing, negative."""
    return [-verdict.distance for verdict in judge(samples)]


def row(name: str, found: list[Summary]) -> str:
    """A row of the table: means over seeds, with the least and the largest where they differ."""
    cells = []
    for share in ("preferred", "colour", "shape", "clean_in_style"):
        values = [getattr(one, share) for one in found]
        spread = f" ({min(values):.0%} to {max(values):.0%})" if max(values) > min(values) else ""
        cells.append(f"{np.mean(values):.0%}{spread}")
    return f"| {name} | " + " | ".join(cells) + " |"


def mapo(folder: Path) -> tuple[str, list[str]]:
    summaries = rounds_shapes.main(["--output_dir", str(folder), "--rounds", str(ROUNDS)])
    rows = [row(f"after round {number}" if number else "base", [one]) for number, one in enumerate(summaries)]
    text = (
        f"`examples/rounds_shapes.py` with {['', 'one', 'two', 'three'][ROUNDS]} rounds, 18 prompts of 14 samples and "
        "40 MaPO steps in each."
    )
    return text, rows


def irepo(folder: Path) -> tuple[str, list[str]]:
    after: list[list[Summary]] = [[] for _ in range(IREPO_ROUNDS)]
    for seed in range(SEEDS):
        pipeline = load_pipeline()
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        config = DiffusionDPOConfig(
            output_dir=str(folder / f"seed-{seed}"),
            loss_type="irepo",
            beta=BETA,
            max_steps=STEPS,
            per_device_train_batch_size=32,
            learning_rate=RATE,
            prompt_dropout=0.0,
            # Seeds of rounds are one apart.
            seed=100 * seed + 1,
            activation_checkpointing=False,
            save_strategy="no",
        )
        rounds = train_in_rounds(
            DiffusionDPOTrainer,
            pipeline,
            config,
            prompts(),
            [style, content, cleanness],
            rounds=IREPO_ROUNDS,
            samples_per_prompt=SAMPLES,
            pair_options={"strategy": "all", "batch_size": 16},
            guidance_scale=3.0,
            num_inference_steps=20,
        )
        for one, found in zip(rounds, after, strict=True):
            pipeline.unet = UNet2DConditionModel.from_pretrained(one.folder / "unet")
            found.append(summarize(sample(pipeline, ASKED), ASKED))
    rows = [row("base", [summarize(sample_base("mixed", ASKED), ASKED)])]
    rows += [row(f"after round {number}", found) for number, found in enumerate(after, start=1)]
    text = (
        f'`DiffusionDPOTrainer` with `loss_type="irepo"`, beta {BETA:g} and learning rate {RATE:g}, on soft labels of '
        f"three rewards: style, colour and shape, cleanness. Each round has 18 prompts of {SAMPLES} samples, {STEPS} "
        f"steps. Means over {SEEDS} seeds, with the least and the largest."
    )
    return text, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=("mapo", "irepo"), default="mapo")
    parser.add_argument("--work_dir", type=Path, help="keeps the rounds; default: a temporary folder")
    options = parser.parse_args()
    name, run = ("rounds", mapo) if options.variant == "mapo" else ("rounds_irepo", irepo)
    with nullcontext(options.work_dir) if options.work_dir else tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        text, rows = run(Path(folder))
        minutes = (time.perf_counter() - began) / 60
    lines = [
        "# Rounds of self-made pairs" + (", with iREPO" if options.variant == "irepo" else ""),
        "",
        f"Written by `benchmarks/rounds.py`: {text} Shares of 64 images from the same seeds.",
        "",
        "| | outlined | colour | shape | clean within style |",
        "|---|---|---|---|---|",
        *rows,
    ]
    if options.variant == "mapo":
        # An interrupted call would count its last part alone.
        lines += ["", f"All of it took {minutes:.1f} minutes on two CPU cores."]
    report = "\n".join(lines) + "\n"
    print(report)
    (ROOT / "benchmarks" / "results" / f"{name}.md").write_text(report)


if __name__ == "__main__":
    main()

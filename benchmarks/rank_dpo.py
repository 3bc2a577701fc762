"""Whether rankings of four teach more than their best and worst samples: RankDPO against Diffusion-DPO.

    python benchmarks/rank_dpo.py

Both start from the `mixed` base, have the same rankings of its own samples, and call the denoiser equally often: 16
rankings of four or 32 pairs a step, and the reference likewise. Written to results/rank_dpo.md.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from rank_dpo_shapes import rankings_of_four  # noqa: E402

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, RankDPOConfig, RankDPOTrainer  # noqa: E402
from trl_diffusion_pref.shapes import Summary, load_pipeline, prompts, sample, sample_base, summarize  # noqa: E402


SEEDS = (0, 1, 2)
STEPS, SAMPLES_PER_STEP, BETA = 40, 64, 2000.0
LEARNING_RATES = (2e-5, 5e-5)
ASKED = (4 * prompts())[:64]
SHARES = ("preferred", "colour", "shape", "clean_in_style")
METHODS = {
    "DPO, best and worst": (DiffusionDPOTrainer, DiffusionDPOConfig, 2, {"ranking_pairs": "best_worst"}),
    "RankDPO": (RankDPOTrainer, RankDPOConfig, 4, {}),
}


def run(method: str, learning_rate: float, seed: int, folder: str) -> Summary:
    """Shares after a run on the rankings of a seed, which are stored in a folder."""
    torch.set_num_threads(1)
    trainer_class, config_class, samples_per_row, options = METHODS[method]
    with tempfile.TemporaryDirectory() as output:
        config = config_class(
            output_dir=output,
            max_steps=STEPS,
            learning_rate=learning_rate,
            beta=BETA,
            seed=seed,
            per_device_train_batch_size=SAMPLES_PER_STEP // samples_per_row,
            prompt_dropout=0.0,
            # All runs take all steps, each of as many samples.
            divergence_guard="off",
            dataloader_drop_last=True,
            activation_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        trainer = trainer_class(load_pipeline(), config, rankings_of_four(Path(folder) / str(seed), seed))
        trainer.train()
        found = summarize(sample(trainer.pipeline, ASKED), ASKED)
    print(method, learning_rate, seed, found, flush=True)
    return found


def make(seed: int, folder: str) -> None:
    """Makes a seed's rankings, which runs then find."""
    torch.set_num_threads(1)
    rankings_of_four(Path(folder) / str(seed), seed)


def row(name: str, learning_rate: str, found: list[Summary]) -> str:
    """A line of the table: the mean of each share over the seeds, and its least and greatest value."""
    cells = [name, learning_rate]
    for share in SHARES:
        values = [getattr(one, share) for one in found]
        spread = f" ({min(values):.0%} to {max(values):.0%})" if len(set(values)) > 1 else ""
        cells.append(f"{sum(values) / len(values):.0%}{spread}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each on one core")
    options = parser.parse_args()
    began = time.perf_counter()
    workers = ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder, workers as pool:
        for made in [pool.submit(make, seed, folder) for seed in SEEDS]:
            made.result()
        runs = {
            (method, rate): [pool.submit(run, method, rate, seed, folder) for seed in SEEDS]
            for method in METHODS
            for rate in LEARNING_RATES
        }
        found = {key: [each.result() for each in of_key] for key, of_key in runs.items()}
    minutes = (time.perf_counter() - began) / 60
    lines = [
        "# Rankings of four against their best and worst samples",
        "",
        "Written by `benchmarks/rank_dpo.py`. Rankings of four samples of the `mixed` base, scored by the shapes "
        f"judge; {STEPS} steps of {SAMPLES_PER_STEP} samples, beta {BETA:g}, AdamW, the same number of denoiser calls "
        f"for all. Shares of {len(ASKED)} images, guidance 3, 20 DDIM steps: mean of {len(SEEDS)} seeds of rankings "
        "and training (least to greatest).",
        "",
        "| | learning rate | outlined | colour | shape | clean within style |",
        "|---|---|---|---|---|---|",
        row("base", "", [summarize(sample_base("mixed", ASKED), ASKED)]),
        *(row(method, f"{rate:g}", of_key) for (method, rate), of_key in found.items()),
        "",
        f"All of it took {minutes:.0f} minutes, {options.processes} runs at a time on one CPU core each.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    (ROOT / "benchmarks" / "results" / "rank_dpo.md").write_text(text)


if __name__ == "__main__":
    main()

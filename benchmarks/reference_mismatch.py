"""Reference mismatch at small scale: which method learns a style that the base was never trained on, how fast?

    python benchmarks/reference_mismatch.py

Every run has the same base (`filled_only`), pairs, batch and number of steps; noise, timesteps and data order follow
the seed. Finished runs are kept in results/reference_mismatch.json and not repeated; the table in
results/reference_mismatch.md is written from that file.
"""

import json
import statistics
import tempfile
from pathlib import Path

from transformers import TrainerCallback

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    MaPOConfig,
    MaPOTrainer,
)
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs, prompts, sample, summarize


RESULTS = Path(__file__).parent / "results"
STEPS = (10, 20, 40, 80, 150)
SEEDS = (0, 1, 2)
LEARNING_RATES = (1e-5, 1e-4)
BATCH_SIZE = 32
PAIRS = 512
SAMPLES = 64
METHODS = {
    "SFT on chosen": (DiffusionSFTTrainer, DiffusionSFTConfig, {}),
    "MaPO": (MaPOTrainer, MaPOConfig, {"beta": 0.1}),
    # The guard is off so that all methods run all steps.
    **{
        f"DPO, beta {beta:g}": (
            DiffusionDPOTrainer,
            DiffusionDPOConfig,
            {"beta": beta, "prompt_dropout": 0.0, "divergence_guard": "off"},
        )
        for beta in (500.0, 2000.0)
    },
}


class Sampler(TrainerCallback):
    """Generates and judges images at given steps."""

    def __init__(self, pipeline) -> None:
        self.pipeline, self.shares = pipeline, {}
        self.asked = (SAMPLES // len(prompts()) + 1) * prompts()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step in STEPS:
            asked = self.asked[:SAMPLES]
            summary = summarize(sample(self.pipeline, asked), asked, "outlined")
            self.shares[str(state.global_step)] = {
                "outlined": summary.preferred,
                "right": min(summary.colour, summary.shape),
                "clean": summary.clean,
            }


def run(method: str, learning_rate: float, seed: int) -> dict:
    """Shares by step of one training run."""
    trainer_class, config_class, options = METHODS[method]
    pipeline = load_pipeline("filled_only")
    sampler = Sampler(pipeline)
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder,
            max_steps=max(STEPS),
            learning_rate=learning_rate,
            per_device_train_batch_size=BATCH_SIZE,
            activation_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
            seed=seed,
            **options,
        )
        trainer_class(pipeline, config, preference_pairs(PAIRS), callbacks=[sampler]).train()
    return sampler.shares


def table(runs: dict[str, dict]) -> str:
    """Means over seeds, with minimum and maximum."""
    lines = [
        "# Reference mismatch at small scale",
        "",
        "Written by `benchmarks/reference_mismatch.py`. Base: never saw an outlined shape. Share of "
        f"{SAMPLES} samples in the preferred (outlined) style after so many steps at {BATCH_SIZE} pairs, AdamW, "
        f"guidance 3, 20 DDIM steps: mean of {len(SEEDS)} seeds (least to greatest). Last columns: colour and shape "
        "as asked (the lesser share) and clean pictures, after the last step.",
        "",
        "| method | learning rate | " + " | ".join(f"step {step}" for step in STEPS) + " | right | clean |",
        "|---" * (len(STEPS) + 4) + "|",
    ]
    for method in METHODS:
        for learning_rate in LEARNING_RATES:
            found = [runs.get(f"{method} | {learning_rate:g} | {seed}") for seed in SEEDS]
            if None in found:
                continue
            cells = [_cell([shares[str(step)]["outlined"] for shares in found]) for step in STEPS]
            cells += [_cell([shares[str(STEPS[-1])][name] for shares in found]) for name in ("right", "clean")]
            lines.append(f"| {method} | {learning_rate:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(shares: list[float]) -> str:
    return f"{statistics.mean(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "reference_mismatch.json"
    runs = json.loads(file.read_text()) if file.is_file() else {}
    for seed in SEEDS:
        for method in METHODS:
            for learning_rate in LEARNING_RATES:
                key = f"{method} | {learning_rate:g} | {seed}"
                if key not in runs:
                    runs[key] = run(method, learning_rate, seed)
                    print(key, runs[key], flush=True)
                    file.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n")
    (RESULTS / "reference_mismatch.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()

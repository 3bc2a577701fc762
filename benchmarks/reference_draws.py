"""What precomputed reference errors cost in quality: DPO with K fixed noise samples per pair against a live reference.

    python benchmarks/reference_draws.py

Same base, pairs, steps and learning rate; few pairs and many epochs, so that each noise sample is used often. Written
to results/reference_draws.md and .json.
"""

import json
import statistics
import tempfile
from pathlib import Path

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs, prompts, sample, summarize


RESULTS = Path(__file__).parent / "results"
DRAWS = (1, 4, 8, None)
SEEDS = (0, 1)
PAIRS, STEPS, BATCH_SIZE = 64, 60, 16


def run(draws: int | None, seed: int) -> dict[str, float]:
    """Held-out and training measures after one run; `draws=None` is the live reference."""
    pipeline = load_pipeline()
    with tempfile.TemporaryDirectory() as folder:
        config = DiffusionDPOConfig(
            output_dir=folder,
            max_steps=STEPS,
            learning_rate=5e-5,
            beta=2000.0,
            prompt_dropout=0.0,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=32,
            reference="auto" if draws is None else "precomputed",
            reference_draws=draws or 8,
            divergence_guard="off",
            activation_checkpointing=False,
            save_strategy="no",
            logging_steps=10,
            disable_tqdm=True,
            seed=seed,
        )
        trainer = DiffusionDPOTrainer(pipeline, config, preference_pairs(PAIRS), preference_pairs(64, seed=99))
        trainer.train()
        held_out = trainer.evaluate()
        training = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    asked = (4 * prompts())[:64]
    summary = summarize(sample(pipeline, asked), asked)
    return {
        "training loss": training["loss"],
        "held-out loss": held_out["eval_loss"],
        "held-out accuracy": held_out["eval_preference_accuracy"],
        "outlined": summary.preferred,
        "right": min(summary.colour, summary.shape),
        "clean": summary.clean,
    }


def main() -> None:
    file = RESULTS / "reference_draws.json"
    runs = json.loads(file.read_text()) if file.is_file() else {}
    for draws in DRAWS:
        for seed in SEEDS:
            key = f"{draws or 'live'} | {seed}"
            if key not in runs:
                runs[key] = run(draws, seed)
                print(key, runs[key], flush=True)
                file.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n")
    names = list(next(iter(runs.values())))
    lines = [
        "# Fixed draws against a live reference",
        "",
        f"Written by `benchmarks/reference_draws.py`: DPO on {PAIRS} pairs, {STEPS} steps at {BATCH_SIZE} pairs "
        f"({STEPS * BATCH_SIZE // PAIRS} epochs), mean of {len(SEEDS)} seeds.",
        "",
        "| draws per pair | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for draws in DRAWS:
        found = [runs[f"{draws or 'live'} | {seed}"] for seed in SEEDS]
        cells = [statistics.mean(values[name] for values in found) for name in names]
        shown = [f"{cell:.4f}" if "loss" in name else f"{cell:.0%}" for name, cell in zip(names, cells, strict=True)]
        lines.append(f"| {draws or 'live reference'} | " + " | ".join(shown) + " |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "reference_draws.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

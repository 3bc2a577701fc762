"""How much the held-out preference accuracy moves with the seed of its noise, by how the noise is drawn.

    python benchmarks/accuracy_spread.py

Accuracy of the `mixed` base after a few steps of MaPO, measured again and again on the same pairs with other seeds.
Written to results/accuracy_spread.md and .json.
"""

import json
import statistics
import tempfile
from pathlib import Path

from trl_diffusion_pref import MaPOConfig, MaPOTrainer
from trl_diffusion_pref.evaluation import preference_accuracy
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs


RESULTS = Path(__file__).parent / "results"
PAIRS, RESEEDINGS, DRAWS = 48, 20, 8
WAYS = {
    "stratified, shared by the pair": {"sampling": "stratified", "shared": True},
    "antithetic, shared by the pair": {"sampling": "antithetic", "shared": True},
    "independent, shared by the pair": {"sampling": "independent", "shared": True},
    "independent, not shared": {"sampling": "independent", "shared": False},
}


def main() -> None:
    pipeline = load_pipeline()
    with tempfile.TemporaryDirectory() as folder:
        config = MaPOConfig(
            output_dir=folder,
            max_steps=4,
            learning_rate=5e-5,
            per_device_train_batch_size=32,
            activation_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        MaPOTrainer(pipeline, config, preference_pairs(512)).train()
        held_out = preference_pairs(PAIRS, seed=1)
        found = {
            name: [
                preference_accuracy(
                    pipeline, held_out, draws=DRAWS, seed=seed, batch_size=PAIRS, cache_folder=folder, **way
                ).likelihood_accuracy
                for seed in range(RESEEDINGS)
            ]
            for name, way in WAYS.items()
        }
    spreads = {name: statistics.stdev(values) for name, values in found.items()}
    worst = spreads["independent, not shared"]
    lines = [
        "# Spread of the held-out accuracy over reseedings",
        "",
        f"Written by `benchmarks/accuracy_spread.py`: likelihood accuracy on {PAIRS} pairs with {DRAWS} draws per "
        "image,",
        f"{RESEEDINGS} seeds, on a model between the base and a tuned one (4 steps of MaPO).",
        "",
        "| times and noise | mean | standard deviation | in units of the last |",
        "|---|---|---|---|",
    ]
    for name, values in found.items():
        lines.append(f"| {name} | {statistics.mean(values):.3f} | {spreads[name]:.4f} | {spreads[name] / worst:.2f} |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "accuracy_spread.md").write_text(text)
    (RESULTS / "accuracy_spread.json").write_text(json.dumps(found, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()

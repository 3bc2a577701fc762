"""What keeping latents and embeddings in 16 bit changes: losses of MaPO and DPO, and images after training.

    python benchmarks/cache_dtype.py

The embedded pipeline and `examples/mapo_shapes.py`'s options; each seed trains once from each `cache_dtype`, and 64
images of each are judged. Losses are compared on the same pairs, noise and weights, before the first step and after
the last. Written to results/cache_dtype.md.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs, prompts, sample, summarize


RESULTS = Path(__file__).parent / "results"
DTYPES = ("float32", "float16", "bfloat16")
# With the options of the examples.
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "MaPO": (MaPOTrainer, MaPOConfig, {}),
    "Diffusion-DPO": (DiffusionDPOTrainer, DiffusionDPOConfig, {"beta": 2000.0, "learning_rate": 5e-5}),
}
SEEDS, STEPS, LEARNING_RATE, PAIRS = (0, 1), 40, 1e-4, 512


def options(folder: str, dtype: str, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "dataset_cache_dir": folder,
        "cache_dtype": dtype,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "per_device_train_batch_size": 32,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        **more,
    }


def mean_loss(trainer: Any) -> float:
    """Of all pairs, with evaluation's noise, which the rows alone decide."""
    trainer.model.eval()
    total = 0.0
    with torch.no_grad():
        for batch in trainer._batches_in_order(trainer.train_dataset, 32):
            mode = trainer.modes.evaluation(batch.rows, None)
            total += trainer.compute_losses(trainer.model, batch, mode)["loss"].sum().item()
    return total / PAIRS


def compare_losses(folder: str) -> list[str]:
    """Rows of a table: for each method the relative difference of the loss from float32's, before and after training.

    All dtypes are compared at the weights that training from float32 gave.
    """
    rows = []
    for name, (trainer_class, config_class, own) in METHODS.items():
        base, trained = {}, {}
        weights: dict[str, torch.Tensor] = {}
        for dtype in DTYPES:
            config = config_class(**options(folder, dtype, **own))
            trainer = trainer_class(load_pipeline(), config, preference_pairs(PAIRS))
            base[dtype] = mean_loss(trainer)
            if not weights:
                trainer.train()
                weights = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
            trainer.model.load_state_dict(weights)
            trained[dtype] = mean_loss(trainer)
        for when, found in (("base", base), ("trained", trained)):
            differences = [abs(found[dtype] / found["float32"] - 1) for dtype in DTYPES[1:]]
            shown = " | ".join(f"{value:.1e}" for value in differences)
            rows.append(f"| {name}, {when} | {found['float32']:.4f} | {shown} |")
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    asked = (4 * prompts())[:64]
    lines = [
        "| seed | cache_dtype | outlined | colour | shape | clean | mean of the last 10 losses |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            for dtype in DTYPES:
                config = MaPOConfig(**options(folder, dtype, seed=seed, logging_steps=1))
                trainer = MaPOTrainer(load_pipeline(), config, preference_pairs(PAIRS))
                trainer.train()
                end = summarize(sample(trainer.pipeline, asked), asked)
                logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
                shares = " | ".join(f"{share:.0%}" for share in (end.preferred, end.colour, end.shape, end.clean))
                lines.append(f"| {seed} | {dtype} | {shares} | {statistics.mean(logged[-10:]):.6f} |")
                print(lines[-1], flush=True)
        table = compare_losses(folder)
    text = "\n".join(
        [
            "# Latents and embeddings in 16 bit",
            "",
            f"Written by `benchmarks/cache_dtype.py`: the embedded pipeline, {PAIRS} pairs, MaPO with {STEPS} steps, "
            "batch 32,",
            f"learning rate {LEARNING_RATE:g}, then 64 images.",
            "",
            *lines,
            "",
            f"Relative difference of the mean loss of the {PAIRS} pairs from float32's, at equal weights and noise:",
            "",
            "| method | loss | float16 | bfloat16 |",
            "|---|---|---|---|",
            *table,
            "",
        ]
    )
    (RESULTS / "cache_dtype.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

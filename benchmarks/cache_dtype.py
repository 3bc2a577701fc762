"""What keeping latents and embeddings in 16 bit changes: losses of MaPO and DPO, and images after training.

    python benchmarks/cache_dtype.py

The embedded pipeline and `examples/mapo_shapes.py`'s options; each seed trains once from each `cache_dtype`, and 64
images of each are judged. Losses are compared on the same batches, noise and weights, before the first step and, with
the weights of a trained model, after the last. Written to results/cache_dtype.md.
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


def losses(trainer: Any) -> list[float]:
    """Of the first 256 pairs, in batches of 32, with evaluation's noise, which the rows alone decide."""
    trainer.model.eval()
    found = []
    with torch.no_grad():
        for batch in trainer._batches_in_order(trainer.train_dataset.subset(torch.arange(256).numpy()), 32):
            mode = trainer.modes.evaluation(batch.rows, None)
            found.append(trainer.compute_losses(trainer.model, batch, mode)["loss"].mean().item())
    return found


def largest_difference(values: list[float], reference: list[float]) -> float:
    return max(abs(one - other) / abs(other) for one, other in zip(values, reference, strict=True))


def compare_losses(folder: str, trained: Any) -> dict[str, dict[str, float]]:
    """By method and dtype, the largest relative difference of a batch's loss from float32's, as it is and trained."""
    kinds = {"MaPO": (MaPOTrainer, MaPOConfig, {}), "Diffusion-DPO": (DiffusionDPOTrainer, DiffusionDPOConfig, {})}
    differences: dict[str, dict[str, float]] = {}
    for name, (trainer_class, config_class, more) in kinds.items():
        reference: list[float] = []
        for dtype in DTYPES:
            config = config_class(**options(folder, dtype, **more))
            trainer = trainer_class(load_pipeline(), config, preference_pairs(PAIRS))
            found = losses(trainer)
            trainer.model.load_state_dict(trained)
            found += losses(trainer)
            reference = reference or found
            differences.setdefault(name, {})[dtype] = largest_difference(found, reference)
    return differences


def main() -> None:
    asked = (4 * prompts())[:64]
    lines = [
        "| seed | cache_dtype | outlined | colour | shape | clean | mean of the last 10 losses |",
        "|---|---|---|---|---|---|---|",
    ]
    trained = None
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            for dtype in DTYPES:
                config = MaPOConfig(**options(folder, dtype, seed=seed, logging_steps=1))
                trainer = MaPOTrainer(load_pipeline(), config, preference_pairs(PAIRS))
                trainer.train()
                trained = trained or {name: t.clone() for name, t in trainer.model.state_dict().items()}
                end = summarize(sample(trainer.pipeline, asked), asked)
                logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
                shares = " | ".join(f"{share:.0%}" for share in (end.preferred, end.colour, end.shape, end.clean))
                lines.append(f"| {seed} | {dtype} | {shares} | {statistics.mean(logged[-10:]):.6f} |")
                print(lines[-1], flush=True)
        differences = compare_losses(folder, trained)
    table = [f"| {name} | {found['float16']:.1e} | {found['bfloat16']:.1e} |" for name, found in differences.items()]
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
            "Largest relative difference of a batch's loss from float32's, at equal weights and noise, of the base",
            "and of a trained model:",
            "",
            "| method | float16 | bfloat16 |",
            "|---|---|---|",
            *table,
            "",
        ]
    )
    (RESULTS / "cache_dtype.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

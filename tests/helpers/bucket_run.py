"""One process of tests/training/test_buckets.py: trains and evaluates in buckets, then writes what it saw."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk

from helpers.pipelines import build_tiny_pipeline
from helpers.processes import world_size
from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer


def options(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / name),
        "dataset_cache_dir": str(folder / "cache"),
        "resolution": 32,
        "aspect_ratio_buckets": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "eval_draws": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": True,
        **more,
    }


def train_mapo(folder: Path, name: str, pairs: Dataset, resume: str | None = None, **more: Any) -> dict[str, Any]:
    """Rows of each batch, where the run ends, and what it logged."""
    config = MaPOConfig(**options(folder, name, **more))
    trainer = MaPOTrainer(build_tiny_pipeline(), config, pairs)
    seen: list[list[int]] = []
    compute_loss = trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):
        seen.append(inputs.rows.tolist())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recorded
    trainer.train(resume_from_checkpoint=resume)
    return {
        "batches": seen,
        "steps": trainer.state.global_step,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "margins": [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry],
        "weights": {name: tensor.double().sum().item() for name, tensor in trainer.model.state_dict().items()},
    }


def everything(folder: Path, pairs: Dataset) -> dict[str, Any]:
    """What this process sees of two epochs, whole and resumed, of one without small batches, and of an evaluation."""
    # Two batches a step, in one process as in two.
    two = {"gradient_accumulation_steps": 2 // world_size()}
    saving = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2, **two}
    seen: dict[str, Any] = {"whole": train_mapo(folder, "mapo", pairs, **saving)}
    checkpoint = str(folder / "mapo" / "checkpoint-3")
    seen["resumed"] = train_mapo(folder, "again", pairs, checkpoint, **saving | {"save_strategy": "no"})
    seen["dropped"] = train_mapo(folder, "dropped", pairs, num_train_epochs=1, dataloader_drop_last=True)
    config = DiffusionDPOConfig(**options(folder, "dpo", max_steps=1, reference="precomputed", reference_draws=2))
    trainer = DiffusionDPOTrainer(build_tiny_pipeline(), config, pairs, pairs.select(range(7)))
    metrics = trainer.evaluate()
    seen["errors"] = trainer.reference.precomputed.tables["train"].flatten().tolist()
    seen["evaluation"] = {name: metrics[f"eval_{name}"] for name in ("loss", "mse/chosen", "preference_accuracy")}
    return seen


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    seen = everything(folder, load_from_disk(sys.argv[2]))
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()

"""One process of tests/training/test_distributed.py: trains, then writes what it saw and where it ended."""

import json
import sys
from pathlib import Path

import torch
from datasets import load_from_disk

from helpers.pipelines import build_tiny_pipeline
from helpers.processes import world_size
from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    SelfNPOConfig,
    SelfNPOTrainer,
)
from trl_diffusion_pref.data import batch as batches
from trl_diffusion_pref.data import cache
from trl_diffusion_pref.training.monitor import non_finite_weights


def train_dpo(folder: Path, pairs) -> dict:
    """Errors of the reference computed by all processes together, and where two steps on them end."""
    config = DiffusionDPOConfig(
        output_dir=str(folder / "dpo"),
        dataset_cache_dir=str(folder / "cache"),
        per_device_train_batch_size=4 // world_size(),
        per_device_eval_batch_size=2,
        max_steps=2,
        reference="precomputed",
        reference_draws=2,
        save_strategy="no",
        activation_checkpointing=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = DiffusionDPOTrainer(build_tiny_pipeline(), config, pairs, pairs.select(range(7)))
    trainer.train()
    metrics = trainer.evaluate()
    return {
        "errors": trainer.reference.precomputed.tables["train"].flatten().tolist(),
        "weights": {name: tensor.double().sum().item() for name, tensor in trainer.model.state_dict().items()},
        "accuracy": metrics["eval_preference_accuracy"],
    }


def train_self_npo(folder: Path, pairs) -> dict:
    """The process' own trajectories, where four steps end, and where two resumed from the middle end."""
    results = []
    for resumed in (False, True):
        config = SelfNPOConfig(
            output_dir=str(folder / ("self_npo_again" if resumed else "self_npo")),
            dataset_cache_dir=str(folder / "cache"),
            per_device_train_batch_size=4 // world_size(),
            max_steps=4,
            learning_rate=1e-3,
            solver_steps=10,
            truncated_steps=3,
            ema_decay=0.9,
            save_strategy="steps",
            save_steps=2,
            activation_checkpointing=False,
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = SelfNPOTrainer(build_tiny_pipeline(), config, pairs.select_columns("prompt"))
        checkpoint = str(folder / "self_npo" / "checkpoint-2") if resumed else None
        trainer.train(resume_from_checkpoint=checkpoint)
        batch = config.train_batch_size
        own = range(config.process_index * batch, (config.process_index + 1) * batch)
        results.append(
            {
                "pool": [trainer.pool.get(slot)[0].flatten()[:4].tolist() for slot in own],
                "weights": {name: t.double().sum().item() for name, t in trainer.model.state_dict().items()},
                "teacher": {name: t.double().sum().item() for name, t in trainer.teacher.parameters().items()},
            }
        )
    return {"whole": results[0], "resumed": results[1]}


def main() -> None:
    torch.set_num_threads(1)
    # One batch in each shard, so that both processes write some.
    cache._SHARD_ROWS = 1
    folder, pairs = Path(sys.argv[1]), load_from_disk(sys.argv[2])
    seen = {"rows": [], "timesteps": [], "noise": [], "encoded": 0}
    pipeline = build_tiny_pipeline()

    original_encode = pipeline.vae.encode

    def encode(pixels):
        seen["encoded"] += len(pixels)
        return original_encode(pixels)

    pipeline.vae.encode = encode
    original_draws = batches.draw_rows

    def draws(*args, **options):
        drawn = original_draws(*args, **options)
        seen["timesteps"] += drawn.timesteps.tolist()
        seen["noise"] += drawn.noise.flatten(1)[:, 0].tolist()
        return drawn

    config = MaPOConfig(
        output_dir=str(folder / "output"),
        dataset_cache_dir=str(folder / "cache"),
        per_device_train_batch_size=4 // world_size(),
        per_device_eval_batch_size=2,
        num_train_epochs=1,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="epoch",
        activation_checkpointing=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = MaPOTrainer(pipeline, config, pairs, pairs.select(range(7)))
    before = trainer.evaluate()
    batches.draw_rows = draws
    original_loss = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        seen["rows"] += inputs.rows.tolist()
        return original_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    trainer.save_model()
    batches.draw_rows = original_draws
    seen["weights"] = {name: tensor.double().sum().item() for name, tensor in trainer.model.state_dict().items()}
    seen["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seen["eval_loss"] = before["eval_loss"]
    seen["accuracies"] = [before[f"eval_{name}_accuracy"] for name in ("preference", "likelihood", "base_likelihood")]
    seen["interval"] = [before[f"eval_preference_accuracy_{end}"] for end in ("low", "high")]
    damaged = torch.nn.Linear(2, 2)
    if config.process_index == 1:
        torch.nn.init.constant_(damaged.weight, float("nan"))
    seen["non_finite"] = non_finite_weights(damaged)
    seen["dpo"] = train_dpo(folder, pairs)
    seen["self_npo"] = train_self_npo(folder, pairs)
    (folder / f"rank-{config.process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()

"""One process of tests/algorithms/test_diffusion_kto_trainer.py: trains, then writes what it saw."""

import json
import sys
from pathlib import Path

import torch
from datasets import load_from_disk

from helpers.pipelines import build_tiny_pipeline
from helpers.processes import world_size
from trl_diffusion_pref import DiffusionKTOConfig, DiffusionKTOTrainer


def main() -> None:
    torch.set_num_threads(1)
    folder, votes = Path(sys.argv[1]), load_from_disk(sys.argv[2])
    processes = world_size()
    seen: dict = {}
    for kind in ("running", "batch"):
        config = DiffusionKTOConfig(
            output_dir=str(folder / kind),
            dataset_cache_dir=str(folder / "cache"),
            per_device_train_batch_size=4 // processes,
            max_steps=4,
            learning_rate=1e-3,
            beta=50.0,
            positive_ratio=0.8,
            kl_estimate=kind,
            divergence_guard="off",
            save_strategy="no",
            activation_checkpointing=False,
            disable_tqdm=True,
            use_cpu=True,
            report_to="none",
        )
        trainer = DiffusionKTOTrainer(build_tiny_pipeline(), config, votes)
        rows, gains, kl, compute = [], [], [], trainer.compute_losses

        def compute_losses(model, batch, mode, compute=compute, rows=rows, gains=gains, kl=kl):
            values = compute(model, batch, mode)
            rows.append(batch.rows.tolist())
            kl.append(values["kl"][0].item())
            rewards = [torch.nan_to_num(values[f"rewards/{name}"]) for name in ("liked", "disliked")]
            gains.append((sum(rewards) / 50.0).tolist())
            return values

        trainer.compute_losses = compute_losses
        trainer.train()
        weights = {name: tensor.double().sum().item() for name, tensor in trainer.model.state_dict().items()}
        seen["rows"], seen[kind] = rows, {"kl": kl, "gains": gains, "weights": weights}
    (folder / f"rank-{config.process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()

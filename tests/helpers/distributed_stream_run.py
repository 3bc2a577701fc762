"""One process of tests/training/test_streaming.py: trains on a stream, goes on from the middle, then writes both."""

import json
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from torch import nn

from helpers.pipelines import build_tiny_pipeline
from trl_diffusion_pref import MaPOConfig, MaPOTrainer
from trl_diffusion_pref.data import EncodedStream
from trl_diffusion_pref.training.monitor import NonFiniteLossError


def config(folder: Path, **options) -> MaPOConfig:
    """Of a run over two epochs of sixteen pairs, in each of two processes."""
    defaults = {
        "output_dir": str(folder / "output"),
        "dataset_cache_dir": str(folder / "cache"),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "dataloader_num_workers": 2,
        "shuffle_buffer": 4,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return MaPOConfig(**{**defaults, **options})


def trained(folder: Path, pairs, checkpoint: str | None = None, *, evaluated: bool = False, **options) -> dict:
    """What each step of this process saw, and where it ended."""
    stream = pairs.to_iterable_dataset(num_shards=4)
    trainer = MaPOTrainer(
        build_tiny_pipeline(), config(folder, **options), stream, stream.take(7) if evaluated else None
    )
    seen: dict = {"latents": [], "noise": []}
    compute = trainer.compute_losses

    def compute_losses(model, batch, mode):
        if mode.training:
            chosen, rejected = batch.posterior.mean.flatten(2).sum(dim=2)
            # Several pairs have equal images, but none have both.
            seen["latents"].append((chosen + 3 * rejected).tolist())
            seen["noise"].append([list(key) for key in mode.keys])
        return compute(model, batch, mode)

    trainer.compute_losses = compute_losses
    if evaluated:
        seen["accuracy"] = trainer.evaluate()["eval_likelihood_accuracy"]
    trainer.train(resume_from_checkpoint=checkpoint)
    seen["weights"] = {name: tensor.double().sum().item() for name, tensor in trainer.model.state_dict().items()}
    seen["logged"] = [entry["rewards/margins"] for entry in trainer.state.log_history if "loss" in entry]
    return seen


def uneven(folder: Path, pairs) -> dict:
    """Two steps in which the second process has a row less; means of such values, and one that is NaN."""
    encode, rank = EncodedStream.encode, config(folder).process_index
    EncodedStream.encode = lambda self, rows, *read_by: encode(self, rows[: len(rows) - rank], *read_by)
    options = {"save_strategy": "no", "dataloader_num_workers": 0, "divergence_guard": "off"}
    seen = trained(folder, pairs, max_steps=2, **options)
    monitor = MaPOTrainer(
        build_tiny_pipeline(), config(folder, max_steps=1, **options), pairs.to_iterable_dataset(num_shards=2)
    ).monitor
    values = torch.tensor([1.0, 2.0][: 2 - rank])
    rows = torch.arange(len(values)) + 10 * rank
    monitor.record(nn.Linear(1, 1), {"loss": values, "margin": values}, rows, 0)
    seen["mean"] = monitor.take_means()["margin"]
    try:
        monitor.record(nn.Linear(1, 1), {"loss": values / (1 - rank) - values / (1 - rank)}, rows, 0)
    except NonFiniteLossError as error:
        seen["error"] = str(error)
    return seen


def main() -> None:
    torch.set_num_threads(1)
    folder, pairs = Path(sys.argv[1]), load_from_disk(sys.argv[2])
    seen = {
        "whole": trained(folder / "whole", pairs, evaluated=True),
        "resumed": trained(folder / "resumed", pairs, str(folder / "whole" / "output" / "checkpoint-3")),
        "uneven": uneven(folder / "uneven", pairs),
    }
    (folder / f"rank-{config(folder).process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()

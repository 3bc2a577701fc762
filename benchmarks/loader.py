"""What loading and collating a batch takes, in units of the training step.

    python benchmarks/loader.py

The embedded pipeline with MaPO's default batch size. In one run, batches are loaded from the files and trained on in
turns; the ratio is that of the medians. Written to results/loader.md.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from trl_diffusion_pref import MaPOConfig, MaPOTrainer
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs
from trl_diffusion_pref.training.process_state import flush_denormals


RESULTS = Path(__file__).parent / "results"
STEPS, WARM_UP, PAIRS = 60, 5, 256


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, flush_denormals(torch.device("cpu")):
        config = MaPOConfig(
            output_dir=folder, dataset_cache_dir=folder, activation_checkpointing=False, save_strategy="no"
        )
        trainer = MaPOTrainer(load_pipeline(), config, preference_pairs(PAIRS))
        trainer.create_optimizer()
        trainer.model.train()
        size, batches = config.per_device_train_batch_size, iter(())
        loading: list[float] = []
        stepping: list[float] = []
        while len(stepping) < WARM_UP + STEPS:
            began = time.perf_counter()
            batch = next(batches, None)
            loaded = time.perf_counter()
            if batch is None:
                batches = iter(trainer.get_train_dataloader())
                continue
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
            loss.backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            loading.append(loaded - began)
            stepping.append(time.perf_counter() - loaded)
            trainer.state.global_step += 1
    load, step = (statistics.median(values[WARM_UP:]) for values in (loading, stepping))
    lines = [
        "# Loading a batch",
        "",
        f"Written by `benchmarks/loader.py`: the embedded pipeline, {size} pairs a batch, read from files in the",
        f"training process (`dataloader_num_workers=0`), median of {STEPS} steps on a CPU.",
        "",
        f"Loading and collating take {load / step:.2%} of a step.",
        "",
    ]
    (RESULTS / "loader.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""What a reference costs: step time of Diffusion-DPO with live and precomputed references, in units of MaPO's step.

    python benchmarks/step_time.py

All trainers are built first and take turns step by step in one process, so that changes in the machine's speed affect
all of them equally; the ratio is that of the median step. Written to results/step_time.md.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs
from trl_diffusion_pref.training.process_state import flush_denormals


RESULTS = Path(__file__).parent / "results"
STEPS, WARM_UP, BATCH_SIZE = 60, 5, 16
RUNS = {
    "MaPO": ("full", None),
    "DPO, precomputed errors": ("full", "precomputed"),
    "DPO, live copy": ("full", "auto"),
    "MaPO, LoRA": ("lora", None),
    "DPO, LoRA, precomputed errors": ("lora", "precomputed"),
    "DPO, LoRA, adapter off": ("lora", "auto"),
}


def build(kind: str, reference: str | None, folder: str):
    """A trainer and its model, optimiser and batches, ready for `step`."""
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH_SIZE,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": STEPS,
    }
    peft_config = LoraConfig(r=8, init_lora_weights="gaussian") if kind == "lora" else None
    pairs = preference_pairs(64)
    if reference is None:
        trainer = MaPOTrainer(load_pipeline(), MaPOConfig(**common), pairs, peft_config=peft_config)
    else:
        config = DiffusionDPOConfig(**common, reference=reference, divergence_guard="off", prompt_dropout=0.0)
        trainer = DiffusionDPOTrainer(load_pipeline(), config, pairs, peft_config=peft_config)
    trainer.create_optimizer()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return trainer, batch


def step(trainer, batch) -> float:
    """Seconds of one forward, backward and update."""
    trainer.model.train()
    began = time.perf_counter()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    seconds = time.perf_counter() - began
    trainer.state.global_step += 1
    return seconds


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, flush_denormals(torch.device("cpu")):
        built = {name: build(*run, folder) for name, run in RUNS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in RUNS}
        for number in range(WARM_UP + STEPS):
            for name, (trainer, batch) in built.items():
                taken = step(trainer, batch)
                if number >= WARM_UP:
                    seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [
        "# Step time in units of MaPO's step",
        "",
        f"Written by `benchmarks/step_time.py`: embedded pipeline, {BATCH_SIZE} pairs, CPU, median of {STEPS} steps "
        "taken",
        "in turns in one process. Each group in units of its own MaPO; between the brackets the quartiles of the "
        "ratio",
        "of neighbouring steps.",
        "",
        "| run | ratio |",
        "|---|---|",
    ]
    for name in RUNS:
        unit = "MaPO, LoRA" if "LoRA" in name else "MaPO"
        pairs = [own / base for own, base in zip(seconds[name], seconds[unit], strict=True)]
        low, _, high = statistics.quantiles(pairs, n=4)
        lines.append(f"| {name} | {medians[name] / medians[unit]:.2f} ({low:.2f} to {high:.2f}) |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "step_time.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

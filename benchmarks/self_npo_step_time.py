"""What a Self-NPO step costs, in forward passes of the denoiser and compared with a MaPO step.

    python benchmarks/self_npo_step_time.py [--check]

One forward is that of the batch of samples, without gradients. A MaPO step on as many pairs trains on twice as many
images, so half of it is what training on one batch costs. K truncated steps imply K + 1 evaluations of the teacher
(twice that with guidance) and one such half. All take turns step by step in one process; ratios are of medians. With
--check nothing is written, and the exit status is 1 if a step costs more than 1.1 times what K implies in every
quarter of the measurement.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset

from trl_diffusion_pref import MaPOConfig, MaPOTrainer, SelfNPOConfig, SelfNPOTrainer
from trl_diffusion_pref.data import NoisyBatch
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs, prompts
from trl_diffusion_pref.training.process_state import flush_denormals


RESULTS = Path(__file__).parent / "results"
STEPS, WARM_UP, BATCH_SIZE = 40, 6, 16
# Truncated steps K and the generation's guidance scale.
MOST = 1.1
RUNS = {"K = 5, scale 0": (5, 0.0), "K = 5, scale -4": (5, -4.0), "K = 2, scale 0": (2, 0.0)}


def build(trainer_class, config_class, data, folder: str, **options):
    """A trainer and a batch for `step`, the EMA included in its cost."""
    config = config_class(
        output_dir=folder,
        per_device_train_batch_size=BATCH_SIZE,
        activation_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        max_steps=STEPS,
        **options,
    )
    trainer = trainer_class(load_pipeline(), config, data)
    trainer.create_optimizer()
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


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


def self_npo_step(trainer, batch) -> float:
    """As `step`, with the teacher's update."""
    return step(trainer, batch) + update(trainer)


def update(trainer) -> float:
    """Seconds of one update of the moving teacher."""
    began = time.perf_counter()
    trainer.teacher.move_towards(trainer.model, 1 - trainer.args.ema_decay)
    return time.perf_counter() - began


def forward(trainer, batch) -> float:
    """Seconds of one forward of a batch, as the teacher computes it."""
    embeds = batch.prompts["prompt_embeds"]
    x = torch.randn(BATCH_SIZE, *trainer.encoder.latent_shape)
    began = time.perf_counter()
    with torch.no_grad():
        trainer.denoise(trainer.model, NoisyBatch(x, torch.full((BATCH_SIZE,), 500), x, {"prompt_embeds": embeds}))
    return time.perf_counter() - began


def implied(k: int, scale: float, mapo_forwards: float) -> float:
    return (k + 1) * (1 if scale in (0.0, 1.0) else 2) + mapo_forwards / 2


def missed(seconds: dict[str, list[float]]) -> list[str]:
    """The runs whose step costs too much in every quarter."""
    found = []
    for name, (k, scale) in RUNS.items():
        ratios = []
        for start in range(0, STEPS, STEPS // 4):
            part = {key: values[start : start + STEPS // 4] for key, values in seconds.items()}
            unit = statistics.median(part["forward"])
            wanted = implied(k, scale, statistics.median(part["MaPO"]) / unit)
            ratios.append(statistics.fmean(part[name]) / unit / wanted)
        if min(ratios) > MOST:
            found.append(f"{name}: {min(ratios):.2f} to {max(ratios):.2f}, bound {MOST}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    asked = Dataset.from_dict({"prompt": 4 * prompts()})
    with tempfile.TemporaryDirectory() as folder, flush_denormals(torch.device("cpu")):
        mapo = build(MaPOTrainer, MaPOConfig, preference_pairs(64), folder)
        runs = {
            name: build(
                SelfNPOTrainer,
                SelfNPOConfig,
                asked,
                folder,
                truncated_steps=k,
                guidance_scale=scale,
                learning_rate=1e-6,
            )
            for name, (k, scale) in RUNS.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in ("forward", "update", "MaPO", *RUNS)}
        for number in range(WARM_UP + STEPS):
            some, batch = next(iter(runs.values()))
            taken = {"forward": forward(some, batch), "update": update(some), "MaPO": step(*mapo)}
            taken |= {name: self_npo_step(*built) for name, built in runs.items()}
            if number >= WARM_UP:
                for name, value in taken.items():
                    seconds[name].append(value)
    unit = statistics.median(seconds["forward"])
    moving = statistics.median(seconds["update"]) / unit
    mapo_forwards = statistics.median(seconds["MaPO"]) / unit
    lines = [
        "# Self-NPO's step in forwards of the denoiser",
        "",
        f"Written by `benchmarks/self_npo_step_time.py`: embedded pipeline, {BATCH_SIZE} samples, one thread of a "
        f"CPU, full weights, mean of {STEPS} steps taken in turns in one process. One forward is that of {BATCH_SIZE} "
        f"samples; a MaPO "
        f"step on {BATCH_SIZE} pairs takes {mapo_forwards:.1f}. Implied: (K + 1) teacher evaluations, twice with "
        "guidance, and half a MaPO step. Less than implied is possible, because trajectories that reach their end "
        f"take fewer steps. The moving teacher's update, {moving:.2f} forwards of so small a "
        "model, is in the measured step and not in what K implies; it weighs most where K is small.",
        "",
        "| run | forwards | implied by K | ratio | in MaPO steps |",
        "|---|---|---|---|---|",
    ]
    for name, (k, scale) in RUNS.items():
        # A step's length depends on how many trajectories end, so the cost is the mean, not the median.
        own = statistics.fmean(seconds[name]) / unit
        wanted = implied(k, scale, mapo_forwards)
        lines.append(f"| {name} | {own:.1f} | {wanted:.1f} | {own / wanted:.2f} | {own / mapo_forwards:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if check:
        sys.exit("\n".join(missed(seconds)) or 0)
    (RESULTS / "self_npo_step_time.md").write_text(text)


if __name__ == "__main__":
    main()

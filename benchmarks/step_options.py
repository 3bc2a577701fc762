"""What options do to the time of a training step, and the batch of encoding to the time of a pair.

    python benchmarks/step_options.py [--models shapes sd15] [--rounds 15]

MaPO on all weights of models of step_time.py, with one option changed at a time, and each beside the defaults, in
turns as there. Attention is timed beside torch's implementation that keeps the whole matrix. Compiling is timed on the
embedded pipeline alone: each width of a block takes minutes on a CPU. Written to results/step_options.md. On a GPU
other options pay: nothing here is measured on one.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from released_recipes import pipeline_with
from step_models import build
from step_time import SIZES, WARM_UP, interval, ratio, settle, stored_pairs, trainer_step
from torch.nn.attention import SDPBackend, sdpa_kernel

from trl_diffusion_pref import MaPOConfig, MaPOTrainer
from trl_diffusion_pref.training.process_state import flush_denormals


RESULTS = Path(__file__).parent / "results"
# What is no option of the config.
CHANNELS_LAST, WHOLE_MATRIX = "channels last", "whole matrix"
COMPILED = "`torch_compile=True`"
OPTIONS: dict[str, dict[str, Any]] = {
    "the same again": {},
    "`activation_checkpointing=True`, the default": {"activation_checkpointing": True},
    "`checkpointing_share=0.5`": {"activation_checkpointing": True, "checkpointing_share": 0.5},
    '`optim="adamw_torch"` (not fused)': {"optim": "adamw_torch"},
    '`optim="adamw_bnb_8bit"`': {"optim": "adamw_bnb_8bit"},
    "`bf16=True`": {"bf16": True},
    "weights in channels-last format": {CHANNELS_LAST: True},
    "attention with the whole matrix": {WHOLE_MATRIX: True},
    "`use_ema=True`": {"use_ema": True},
    COMPILED: {"torch_compile": True},
}
ENCODED_AT_ONCE = (1, 4, 16)


def step_of(model: str, pipeline: DiffusionPipeline, options: dict[str, Any], folder: str) -> Callable[[], float]:
    options = dict(options)
    if options.pop(CHANNELS_LAST, False):
        pipeline.unet.to(memory_format=torch.channels_last)
    whole_matrix = options.pop(WHOLE_MATRIX, False)
    config = MaPOConfig(
        output_dir=f"{folder}/output",
        dataset_cache_dir=f"{folder}/cache",
        per_device_train_batch_size=SIZES[model][0],
        **{"activation_checkpointing": False, **options},
        save_strategy="no",
        aspect_ratio_buckets=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        max_steps=10**6,
    )
    step = trainer_step(MaPOTrainer(pipeline, config, stored_pairs(model)[0]))
    if not whole_matrix:
        return step

    def with_whole_matrix() -> float:
        # torch keeps the choice for all threads.
        with sdpa_kernel(SDPBackend.MATH):
            return step()

    return with_whole_matrix


def measure(model: str, rounds: int) -> tuple[dict[str, list[list[float]]], float | None]:
    """Seconds of the steps of each round, the option's first and last; and compiling, in steps of the defaults."""
    whole, found, compiling = build(model), {}, None
    with tempfile.TemporaryDirectory() as folder, flush_denormals(torch.device("cpu")):
        defaults = step_of(model, pipeline_with(whole), {}, folder)
        for name, options in OPTIONS.items():
            if name == COMPILED and model != "shapes":
                continue
            step = step_of(model, pipeline_with(whole), options, folder)
            first = step()
            for _ in range(WARM_UP):
                defaults()
                step()
            found[name] = [[own() for own in (step, defaults, defaults, step)] for _ in range(rounds)]
            if name == COMPILED:
                compiling = first / statistics.median(taken for four in found[name] for taken in four[1:3])
            print(f"{model}, {name}: {ratio(found[name]):.3f}", flush=True)
    return found, compiling


def encoding(model: str) -> dict[int, list[float]]:
    """Seconds of the VAE for 16 images, by how many it takes at once."""
    vae, side = build(model).vae, 8 * SIZES[model][1][-1]
    images, taken = torch.rand(max(ENCODED_AT_ONCE), 3, side, side), {size: [] for size in ENCODED_AT_ONCE}
    for number in range(4):
        for size in ENCODED_AT_ONCE:
            began = time.perf_counter()
            with torch.no_grad():
                for batch in images.split(size):
                    vae.encode(batch)
            if number:
                taken[size].append(time.perf_counter() - began)
    return taken


def table(model: str, found: dict[str, list[list[float]]], compiling: float | None) -> list[str]:
    lines = [f"## {model}", "", "| option | time of a step |", "|---|---|"]
    for name, rounds in found.items():
        low, high = interval(rounds)
        lines.append(f"| {name} | {ratio(rounds):.2f} ({low:.2f} to {high:.2f}) |")
    if compiling is not None:
        lines += ["", f"The first compiled step takes as long as {compiling:.0f} others."]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("shapes", "sd15"), default=["shapes", "sd15"])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    settle()
    torch.set_num_threads(1)
    lines = [
        "# Step time by option",
        "",
        "Written by `benchmarks/step_options.py`: MaPO on all weights, one option changed at a time, in units of a "
        "step with the defaults but without activation checkpointing, on one core of a CPU "
        f"({platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__.split('+')[0]}); in brackets the "
        "interval in which the median lies with 95 %. Not measured on a GPU.",
        "",
    ]
    for model in options.models:
        lines += table(model, *measure(model, options.rounds))
    taken = {size: statistics.median(seconds) for size, seconds in encoding("sd15").items()}
    shown = ", ".join(f"{taken[size] / taken[1]:.2f} for {size}" for size in ENCODED_AT_ONCE[1:])
    lines += ["## Encoding", "", f"Time of the VAE for an image of sd15, in units of that for 1 at once: {shown}.", ""]
    text = "\n".join(lines)
    print(text)
    (RESULTS / "step_options.md").write_text(text)


if __name__ == "__main__":
    main()

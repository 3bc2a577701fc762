"""What a training step costs beside the bare model's and beside the released scripts' loops.

    python benchmarks/step_time.py [--models shapes sd15 sdxl] [--rounds 25] [--check]

Runs: the bare step (forward, backward, clipping, the optimizer's update on prepared tensors); this package's trainers,
in transformers' loop with its data loader, callbacks and default logging; and the released recipes, which decode
images and run VAE, text encoders and a live reference at every step. Models: the embedded shapes pipeline, and narrow
models of Stable Diffusion 1.5's and SDXL's classes, in which UNet and VAE cost what they do in the real ones, relative
to each other.

What is compared takes turns on one core: a round is a step of the one, two of the other, and one of the first, so
that a machine whose speed drifts slows both. A ratio is the median over rounds, with the interval in which it lies
with 95 % (bootstrap). Written to results/step_time.md and .json. With --check nothing is written, and the exit status
is 1 if the whole interval of a ratio misses its bound.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, Value
from diffusers import DiffusionPipeline
from peft import LoraConfig
from released_recipes import bare_step, photographs, pipeline_with, released_step
from step_models import REAL, build, cost
from transformers import TrainerCallback

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    MaPOConfig,
    MaPOTrainer,
)
from trl_diffusion_pref.shapes import preference_pairs
from trl_diffusion_pref.training.process_state import flush_denormals


RESULTS = Path(__file__).parent / "results"
WARM_UP = 3
# Memory that is returned to the system after each step comes back page by page, which is as noisy as the machine. One
# arena, because those of threads are small.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
# Pairs in a batch, latents of a sample, and pixels of the stored images.
SIZES = {"shapes": (16, (4, 8, 8), None), "sd15": (2, (4, 32, 32), (384, 320)), "sdxl": (1, (4, 32, 32), (384, 320))}


@dataclass(frozen=True)
class Run:
    """A run, and what it is compared with."""

    name: str
    unit: str
    kind: str = "mapo"  # or "dpo", "sft", "kto", "bare", "released"
    lora: bool = False
    reference: str | None = None
    checkpointing: bool = False
    most: float | None = None  # what the ratio of times may be
    least: float | None = None  # what the unit's pairs per second may be multiplied by at least
    models: tuple[str, ...] = ("shapes", "sd15", "sdxl")


RUNS = (
    Run("bare step", "bare step", "bare"),  # the first comparison is that of two identical steps
    Run("bare step again", "bare step", "bare"),
    Run("MaPO", "bare step"),
    Run("DPO, precomputed", "MaPO", "dpo", reference="precomputed", most=1.02),
    Run("DPO, copy", "bare step with a copy", "dpo", reference="copy"),
    Run("bare step with a copy", "bare step", "bare", reference="copy"),
    Run("fine-tuning", "MaPO", "sft", models=("shapes",)),
    Run("KTO, precomputed", "MaPO", "kto", reference="precomputed", models=("shapes",)),
    Run("bare step, checkpointing", "bare step", "bare", checkpointing=True),
    Run("MaPO, checkpointing", "bare step, checkpointing", checkpointing=True),
    Run("bare LoRA step", "bare LoRA step", "bare", lora=True),
    Run("MaPO, LoRA", "bare LoRA step", lora=True),
    Run("DPO, LoRA, precomputed", "MaPO, LoRA", "dpo", lora=True, reference="precomputed", most=1.02),
    # One forward pass more. A LoRA's backward pass is about as long as a forward pass, and with checkpointing, the
    # default, as long as two.
    Run("DPO, LoRA, adapter off", "MaPO, LoRA", "dpo", lora=True, reference="adapter_off"),
    Run("bare LoRA step, checkpointing", "bare LoRA step", "bare", lora=True, checkpointing=True),
    Run("MaPO, LoRA, checkpointing", "bare LoRA step, checkpointing", lora=True, checkpointing=True),
    Run(
        "DPO, LoRA, adapter off, checkpointing",
        "MaPO, LoRA, checkpointing",
        "dpo",
        **{"lora": True, "reference": "adapter_off", "checkpointing": True, "most": 1.40},
    ),
    Run("released MaPO", "MaPO", "released"),
    Run("released DPO", "DPO, precomputed", "released", reference="copy"),
    Run("released DPO, LoRA", "DPO, LoRA, precomputed", "released", lora=True, reference="adapter_off"),
)
# A trainer's step in bare steps, full and LoRA, and how many times a released recipe's pairs per second.
STEP = {"shapes": 1.05, "sd15": 1.03, "sdxl": 1.03}
RELEASED = {"sd15": {"released MaPO": 1.4, "released DPO": 1.75}, "sdxl": {"released MaPO": 1.2, "released DPO": 1.5}}


class Turns(TrainerCallback):
    """Lets `trainer.train()`, in a thread of its own, take one step when it is its turn."""

    def __init__(self) -> None:
        self.may_go, self.stands = threading.Semaphore(0), threading.Semaphore(0)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        # All between two calls is one step: training, the log, and the next batch.
        self.stands.release()
        self.may_go.acquire()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.stands.release()


def trainer_step(trainer) -> Callable[[], float]:
    """A step of a trainer in its own loop."""
    turns, failed = Turns(), list[Exception]()
    trainer.add_callback(turns)

    def train() -> None:
        try:
            trainer.train()
        except Exception as error:
            failed.append(error)
            turns.stands.release()

    def wait() -> None:
        turns.stands.acquire()
        if failed:
            raise failed[0]

    threading.Thread(target=train, daemon=True).start()
    wait()

    def step() -> float:
        began = time.perf_counter()
        turns.may_go.release()
        wait()
        return time.perf_counter() - began

    return step


def make_trainer(run: Run, pipeline: DiffusionPipeline, pairs: Dataset, folder: str, batch_size: int):
    """The trainer of a run, or one whose model a plain loop trains."""
    plain = run.kind in ("bare", "released")
    options = {
        "output_dir": f"{folder}/output",
        "dataset_cache_dir": f"{folder}/cache",
        # A vote is half of a pair.
        "per_device_train_batch_size": batch_size * (2 if run.kind in ("sft", "kto") else 1),
        "activation_checkpointing": run.checkpointing,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "max_steps": 10**6,
        "aspect_ratio_buckets": None if plain else False,
    }
    lora = LoraConfig(r=8, init_lora_weights="gaussian") if run.lora else None
    arguments = {"train_dataset": pairs, "peft_config": lora}
    if run.kind == "dpo":
        cfg = DiffusionDPOConfig(**options, reference=run.reference, divergence_guard="off")
        return DiffusionDPOTrainer(pipeline, cfg, **arguments)
    if run.kind == "kto":
        cfg = DiffusionKTOConfig(**options, reference=run.reference, divergence_guard="off")
        return DiffusionKTOTrainer(pipeline, cfg, **arguments)
    if run.kind == "sft":
        return DiffusionSFTTrainer(pipeline, DiffusionSFTConfig(**options), **arguments)
    return MaPOTrainer(pipeline, MaPOConfig(**options), **arguments)


def stored_pairs(model: str) -> tuple[Dataset, list[dict]]:
    """Pairs, and the same as dictionaries with the bytes of their files."""
    batch_size, _, size = SIZES[model]
    if size is None:
        pairs = preference_pairs(64)
        return pairs, list(pairs.cast(Features({name: _undecoded(kind) for name, kind in pairs.features.items()})))
    files = photographs(8 * batch_size, size)
    rows = {"prompt": [f"a photograph, number {number}" for number in range(4 * batch_size)]}
    rows |= {"chosen": files[::2], "rejected": files[1::2]}
    features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    listed = {name: [{"bytes": file} for file in column] for name, column in rows.items() if name != "prompt"}
    plain = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    return Dataset.from_dict({**rows, **listed}, features=features), plain


def _undecoded(feature):
    return Image(decode=False) if isinstance(feature, Image) else feature


def measure(model: str, rounds: int) -> dict:
    """Seconds of the four steps of every round of every comparison, and what the model's parts cost."""
    batch_size, latents, _ = SIZES[model]
    whole = build(model)
    pairs, rows = stored_pairs(model)
    rows = [
        {name: value["bytes"] if isinstance(value, dict) else value for name, value in row.items()} for row in rows
    ]
    steps: dict[str, Callable[[], float]] = {}
    counted, compared = None, []
    with tempfile.TemporaryDirectory() as folder, flush_denormals(torch.device("cpu")):
        for run in RUNS:
            if model not in run.models:
                continue
            trainer = make_trainer(run, pipeline_with(whole), pairs, folder, batch_size)
            if counted is None:
                batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
                one = {name: tensor[:1] for name, tensor in batch.conditioning().items()}
                counted = cost(trainer.encoders.whole_pipeline(), one, trainer.family, latents)
            if run.kind == "bare":
                steps[run.name] = bare_step(trainer, reference=run.reference is not None)
            elif run.kind == "released":
                steps[run.name] = released_step(trainer, rows, batch_size, reference=run.reference is not None)
            else:
                steps[run.name] = trainer_step(trainer)
        encoding = encoding_seconds(whole, pairs, folder, batch_size)
        for run in RUNS:
            if run.name in steps and run.name != run.unit:
                own, unit = steps[run.name], steps[run.unit]
                for step in WARM_UP * [own, unit]:
                    step()
                taken = [[step() for step in (own, unit, unit, own)] for _ in range(rounds)]
                compared.append({"run": run.name, "unit": run.unit, "seconds": taken})
                print(f"{model}, {run.name}: {ratio(taken):.3f}", flush=True)
    return {
        "model": model,
        "cost": vars(counted),
        "batch_size": batch_size,
        "encoding": encoding,
        "comparisons": compared,
    }


def encoding_seconds(whole: DiffusionPipeline, pairs: Dataset, folder: str, batch_size: int) -> float:
    """Seconds of encoding one pair: a trainer's construction with an empty cache less one with a full cache."""
    taken = []
    for number in range(3):
        for _ in range(2):
            began = time.perf_counter()
            make_trainer(Run("MaPO", ""), pipeline_with(whole), pairs, f"{folder}/{number}", batch_size)
            taken.append(time.perf_counter() - began)
    return statistics.median(first - second for first, second in zip(taken[::2], taken[1::2], strict=True)) / len(
        pairs
    )


def ratio(rounds: list[list[float]]) -> float:
    """The median over rounds of one's time for two steps to the other's."""
    return statistics.median((first + last) / (second + third) for first, second, third, last in rounds)


def interval(rounds: list[list[float]]) -> tuple[float, float]:
    """Where the median lies with 95 %, by 2000 resamplings of the rounds."""
    generator = random.Random(0)
    drawn = sorted(ratio(generator.choices(rounds, k=len(rounds))) for _ in range(2000))
    return drawn[50], drawn[-51]


def ratios(measured: dict) -> list[dict]:
    """Each comparison's ratio, with the interval and its bound."""
    rows, runs = [], {run.name: run for run in RUNS}
    for compared in measured["comparisons"]:
        run, seconds = runs[compared["run"]], compared["seconds"]
        most = STEP[measured["model"]] if run.unit.startswith("bare") and run.kind == "mapo" else run.most
        least = RELEASED.get(measured["model"], {}).get(run.name)
        low, high = interval(seconds)
        rows.append(
            {
                **{"run": run.name, "unit": run.unit, "ratio": ratio(seconds), "low": low, "high": high},
                **{"most": most, "least": least},
            }
        )
    return rows


def missed(rows: list[dict]) -> list[str]:
    """The bounds that the whole interval misses."""
    over = [row for row in rows if row["most"] is not None and row["low"] > row["most"]]
    under = [row for row in rows if row["least"] is not None and row["high"] < row["least"]]
    return [
        f"{row['run']}: {row['low']:.3f} to {row['high']:.3f}, bound {row['most'] or row['least']}"
        for row in over + under
    ]


def report(results: list[dict]) -> str:
    version = torch.__version__.split("+")[0]
    lines = [
        "# Step time",
        "",
        "Written by `benchmarks/step_time.py`. What is compared takes turns on one core of a CPU "
        f"({platform.machine()}, {os.cpu_count()} cores, torch {version}); the ratio of times is the median over "
        "rounds, in brackets the interval in which it lies with 95 %. A released recipe's ratio to this package's run "
        "says how many times as many pairs per second the latter trains. Not measured on a GPU.",
    ]
    for measured in results:
        model, counted = measured["model"], measured["cost"]
        real = REAL.get(model)
        share = counted["vae"] / counted["unet"]
        beside = "" if real is None else f" (the real ones': {real[1] / real[0]:.2f})"
        lines += [
            "",
            f"## {model}",
            "",
            f"{counted['parameters']:.1f} million parameters, {counted['unet']:.2f} GFLOP for one image; encoding one "
            f"by the VAE costs {share:.2f} of that{beside}. {measured['batch_size']} pairs a step.",
            "",
            "| run | in units of | ratio | bound |",
            "|---|---|---|---|",
        ]
        for row in ratios(measured):
            bound = f"at most {row['most']}" if row["most"] else f"at least {row['least']}" if row["least"] else ""
            spread = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            lines.append(f"| {row['run']} | {row['unit']} | {spread} | {bound} |")
        lines += ["", repaid(measured)]
    return "\n".join(lines) + "\n"


def repaid(measured: dict) -> str:
    """When encoding once has saved what it took."""
    compared = next(compared for compared in measured["comparisons"] if compared["run"] == "released MaPO")
    released = statistics.median(step for first, _, _, last in compared["seconds"] for step in (first, last))
    own = statistics.median(step for _, second, third, _ in compared["seconds"] for step in (second, third))
    batch_size, encoding = measured["batch_size"], measured["encoding"]
    return (
        f"Encoding a pair, once, takes {encoding * batch_size / own:.2f} of what training on it takes. Beside MaPO's "
        f"released recipe this is repaid after {encoding * batch_size / (released - own):.1f} epochs."
    )


def settle() -> None:
    """Keeps this process on one core, and starts it again with an allocator that keeps what was freed."""
    # Trainers have threads of their own: on another core than the bare step's they would meet other neighbours.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    settle()
    torch.set_num_threads(1)
    results = [measure(model, options.rounds) for model in options.models]
    text = report(results)
    print(text)
    if options.check:
        found = [f"{measured['model']}: {line}" for measured in results for line in missed(ratios(measured))]
        sys.exit("\n".join(found) or 0)
    (RESULTS / "step_time.md").write_text(text)
    (RESULTS / "step_time.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

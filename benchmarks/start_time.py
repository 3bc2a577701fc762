"""What `import trl_diffusion_pref` adds to `import trl`, and how long the demo takes until its first training step.

    python benchmarks/start_time.py [--check]

Each is measured in processes of its own that take turns; medians and quartiles. Written to results/start_time.md. With
--check nothing is written, and the exit status is 1 if three of four measurements miss a bound.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


RESULTS = Path(__file__).parent / "results"
ROUNDS = 7
# Seconds: the package beyond trl, and the demo's first step.
IMPORT, START = 0.1, 12.0
IMPORTS = """
import time
began = time.perf_counter()
import trl
between = time.perf_counter()
import trl_diffusion_pref
print(between - began, time.perf_counter() - between)
"""
# What training a diffusion model with these libraries loads, whatever the method.
HOSTS = """
import time
began = time.perf_counter()
import datasets, peft
from diffusers import DiffusionPipeline, UNet2DConditionModel
from trl.trainer.base_trainer import _BaseTrainer
print(time.perf_counter() - began)
"""
# Leaves the process after the first step, as the clock of the process that started it counts.
FIRST_STEP = """
import os, sys, time
from trl_diffusion_pref.cli.main import main
from trl_diffusion_pref.training.trainer import DiffusionTrainer

inherited = DiffusionTrainer.training_step

def training_step(self, *args, **kwargs):
    inherited(self, *args, **kwargs)
    print("first step after", time.time() - float(sys.argv[1]), flush=True)
    os._exit(0)

DiffusionTrainer.training_step = training_step
main(["demo", "--output_dir", sys.argv[2]])
"""


def run(code: str, *arguments: str) -> str:
    """What a new process prints last."""
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return found.stdout.strip().splitlines()[-1]


def shown(seconds: list[float]) -> str:
    low, middle, high = statistics.quantiles(seconds, n=4)
    return f"{middle:.2f} s ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    imports: list[tuple[float, float]] = []
    first_steps, hosts = list[float](), list[float]()
    for _ in range(ROUNDS):
        trl, package = map(float, run(IMPORTS).split())
        imports.append((trl, package))
        hosts.append(float(run(HOSTS)))
        with tempfile.TemporaryDirectory() as folder:
            # With a cache of its own, so that the data set is encoded as in a first run.
            os.environ["HF_DATASETS_CACHE"] = f"{folder}/datasets"
            line = run(FIRST_STEP, str(time.time()), f"{folder}/demo")
            first_steps.append(float(line.removeprefix("first step after ")))
    trl, package = zip(*imports, strict=True)
    text = "\n".join(
        [
            "# Time to start",
            "",
            f"Written by `benchmarks/start_time.py`: medians of {ROUNDS} processes each, with the quartiles, "
            f"on a CPU of {os.cpu_count()} cores.",
            "",
            "| what | time | bound |",
            "|---|---|---|",
            f"| `import trl` | {shown(list(trl))} | |",
            f"| then `import trl_diffusion_pref` | {shown(list(package))} | {IMPORT} s |",
            f"| the classes of datasets, peft, diffusers and trl that any such training loads | {shown(hosts)} | |",
            "| the demo, from its start to the end of its first training step "
            f"| {shown(first_steps)} | {START:.0f} s |",
        ]
    )
    print(text)
    if check:
        measured = {"import": (list(package), IMPORT), "first step": (first_steps, START)}
        missed = [name for name, (seconds, bound) in measured.items() if statistics.quantiles(seconds, n=4)[0] > bound]
        sys.exit(f"Bounds are missed: {', '.join(missed)}." if missed else 0)
    (RESULTS / "start_time.md").write_text(text + "\n")


if __name__ == "__main__":
    main()

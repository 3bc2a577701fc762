"""Wall time and processor time of encoding with one and with two gloo processes, and whether their files are equal.

    python benchmarks/encoding_processes.py

The embedded pipeline encodes images of 64 pixels, with one thread per process; runs with one and with two processes
take turns. The time counted is that of `encode_dataset`, without starting and importing. Written to
results/encoding_processes.md.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import load_from_disk

from trl_diffusion_pref import MaPOConfig, encode_dataset
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs


RESULTS = Path(__file__).parent / "results"
PAIRS, SIDE, REPETITIONS = 1024, 64, 3


def run(folder: Path, rows: Path) -> None:
    """One process of a run."""
    torch.set_num_threads(1)
    config = MaPOConfig(
        output_dir=str(folder / "output"), dataset_cache_dir=str(folder / "cache"), resolution=SIDE, use_cpu=True
    )
    pipeline, pairs = load_pipeline(), load_from_disk(rows)
    if config.world_size > 1:
        torch.distributed.barrier()
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    encode_dataset(pipeline, pairs, config)
    wall, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    processor = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank-{config.process_index}.json").write_text(json.dumps({"wall": wall, "processor": processor}))


def measure(processes: int, folder: Path, rows: Path) -> tuple[float, float, float]:
    """Seconds of wall time, of processor time of all processes, and of that of the busiest one."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, __file__, "--worker", str(folder), str(rows)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    ranks = [json.loads(file.read_text()) for file in folder.glob("rank-*.json")]
    used = [rank["processor"] for rank in ranks]
    return max(rank["wall"] for rank in ranks), sum(used), max(used)


def files(folder: Path) -> dict[str, bytes]:
    shards = (folder / "cache").rglob("*.safetensors")
    return {str(file.relative_to(folder)): file.read_bytes() for file in shards}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run(*map(Path, options.worker))
        return
    times: dict[int, list[tuple[float, float, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as temporary:
        rows = Path(temporary) / "rows"
        preference_pairs(PAIRS).save_to_disk(rows)
        written = []
        for number in range(REPETITIONS):
            for processes in times:
                folder = Path(temporary) / f"{processes}-{number}"
                times[processes].append(measure(processes, folder, rows))
                written.append(files(folder))
        equal = all(one == written[0] for one in written)
    ratios = [two[0] / one[0] for one, two in zip(times[1], times[2], strict=True)]
    processor, busiest = (
        statistics.median(two[kind] for two in times[2]) / statistics.median(one[kind] for one in times[1])
        for kind in (1, 2)
    )
    lines = [
        "# Encoding with two processes",
        "",
        f"Written by `benchmarks/encoding_processes.py`: {PAIRS} pairs of {SIDE} pixels, the embedded pipeline, one",
        f"thread for each process, {REPETITIONS} runs of each in turns on two cores.",
        "",
        f"* wall time of two processes, in units of one's: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        f"* processor time of the busier of two processes, in units of one's: {busiest:.2f}, to which the wall",
        "  time comes where nothing else runs",
        f"* processor time of two processes together, in units of one's: {processor:.2f}",
        f"* files of all runs {'are equal byte by byte' if equal else 'DIFFER'}",
        "",
    ]
    (RESULTS / "encoding_processes.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

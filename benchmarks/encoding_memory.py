"""Peak memory of encoding and training on 2,000 and on 20,000 pairs.

    python benchmarks/encoding_memory.py

Each size runs in a process of its own, with the embedded pipeline on images of 16 pixels, one prompt for each 14 pairs
(as in Pick-a-Pic v2), and 20 steps; the peak is `getrusage`'s. Written to results/encoding_memory.md.
"""

import argparse
import io
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from trl_diffusion_pref import MaPOConfig, MaPOTrainer
from trl_diffusion_pref.shapes import load_pipeline


RESULTS = Path(__file__).parent / "results"
SIZES, SIDE, PAIRS_PER_PROMPT = (2_000, 20_000), 16, 14


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rows(count: int) -> Iterator[dict]:
    rng = np.random.default_rng(0)
    for row in range(count):
        cells = []
        for _ in range(2):
            buffer = io.BytesIO()
            PILImage.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(buffer, format="PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        prompt = f"a drawing with the number {row // PAIRS_PER_PROMPT}"
        yield {"prompt": prompt, "chosen": cells[0], "rejected": cells[1]}


def make(count: int, folder: Path) -> None:
    features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    dataset = Dataset.from_generator(
        rows, gen_kwargs={"count": count}, features=features, cache_dir=str(folder / "cache")
    )
    dataset.save_to_disk(folder / "rows")


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    config = MaPOConfig(
        output_dir=str(folder / "output"),
        dataset_cache_dir=str(folder / "encoded"),
        resolution=SIDE,
        encode_batch_size=32,
        per_device_train_batch_size=8,
        max_steps=20,
        learning_rate=1e-5,
        activation_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    packages = peak()
    trainer = MaPOTrainer(load_pipeline(), config, Dataset.load_from_disk(folder / "rows"))
    encoded = peak()
    trainer.train()
    print(f"{packages:.0f} {encoded:.0f} {peak():.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(int(options.make[0]), Path(options.make[1]))
        return
    if options.run:
        run(Path(options.run))
        return
    measured = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "--make", str(size), folder], check=True)
            done = subprocess.run(
                [sys.executable, __file__, "--run", folder], check=True, stdout=subprocess.PIPE, text=True
            )
        measured[size] = [int(number) for number in done.stdout.split()[-3:]]
    small, large = (measured[size][2] for size in SIZES)
    lines = [
        "# Peak memory of encoding and training",
        "",
        "Written by `benchmarks/encoding_memory.py`: the embedded pipeline on a CPU, MiB at most so far.",
        "",
        "| pairs | packages imported | encoded | trained |",
        "|---|---|---|---|",
        *(f"| {size:,} | {' | '.join(map(str, values))} |" for size, values in measured.items()),
        "",
        f"Ten times the pairs take {large / small:.3f} times the memory.",
        "",
    ]
    (RESULTS / "encoding_memory.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

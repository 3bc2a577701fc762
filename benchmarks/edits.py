"""How many edits the embedded editing pipeline makes in place, before and after training on pairs of its own edits.

    python benchmarks/edits.py

Written to results/edits.md.
"""

import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import edits_shapes  # noqa: E402

from trl_diffusion_pref.shapes import EditSummary  # noqa: E402


SEEDS = (0, 1, 2)
METHODS = {"mapo": "MaPO", "dpo": "Diffusion-DPO"}
SHARES = ("made_in_place", "made", "in_place", "rest_kept")


def row(name: str, found: list[EditSummary]) -> str:
    """A line of the table: the mean of each share over the seeds, and its least and greatest value."""
    cells = []
    for share in SHARES:
        values = [getattr(one, share) for one in found]
        spread = f" ({min(values):.0%} to {max(values):.0%})" if len(set(values)) > 1 else ""
        cells.append(f"{sum(values) / len(values):.0%}{spread}")
    return f"| {name} | " + " | ".join(cells) + " |"


def table(base: EditSummary, after: dict[str, list[EditSummary]], minutes: float) -> str:
    """The page of results."""
    lines = [
        "# Edits in place",
        "",
        "Written by `benchmarks/edits.py`: `examples/edits_shapes.py` with MaPO and Diffusion-DPO and "
        f"{len(SEEDS)} seeds of pairs and training. Shares of {base.count} held-out edits: the edit was made in "
        "place; it was made; shape, position and size were kept; of colour and style, the one that was not to change "
        "was kept. Mean of the seeds, least to greatest.",
        "",
        "| | made in place | made | in place | rest kept |",
        "|---|---|---|---|---|",
        row("base", [base]),
        *(row(name, after[method]) for method, name in METHODS.items()),
        "",
        f"All of it took {minutes:.0f} minutes on two CPU cores.",
    ]
    return "\n".join(lines) + "\n"


def run(method: str, seed: int) -> dict[str, EditSummary]:
    """The example's shares before and after training."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return edits_shapes.main(["--method", method, "--seed", str(seed), "--output_dir", folder])


def main() -> None:
    began = time.perf_counter()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = {method: [pool.submit(run, method, seed) for seed in SEEDS] for method in METHODS}
        found = {method: [each.result() for each in of_method] for method, of_method in runs.items()}
    after = {method: [each["after"] for each in of_method] for method, of_method in found.items()}
    text = table(found["mapo"][0]["before"], after, (time.perf_counter() - began) / 60)
    print(text)
    (ROOT / "benchmarks" / "results" / "edits.md").write_text(text)


if __name__ == "__main__":
    main()

"""How well a reward of noisy latents tells held-out pairs apart, and what sampling towards it does to the samples.

    python benchmarks/reward_guidance.py

Written to results/reward_guidance.md.
"""

import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import reward_guidance_shapes  # noqa: E402

from trl_diffusion_pref.shapes import prompts, summarize  # noqa: E402


SEEDS = (0, 1, 2)
BASES = {"mixed": "`mixed`, predicts noise", "flow": "`flow`, a rectified flow"}
SCALES = (0.5, 1.0, 2.0, 4.0)
SHARES = ("preferred", "colour", "shape", "clean_in_style")


def spread(values: list[float]) -> str:
    """The mean of the seeds, and the least and greatest value where they differ."""
    between = f" ({min(values):.0%} to {max(values):.0%})" if len(set(values)) > 1 else ""
    return f"{sum(values) / len(values):.0%}{between}"


def table(found: dict[str, list[dict[str, dict]]]) -> str:
    """The page of results."""
    levels = list(found["mixed"][0]["accuracy"])
    asked = (4 * prompts())[:64]
    lines = [
        "# Sampling towards a reward of noisy latents",
        "",
        "Written by `benchmarks/reward_guidance.py`: `examples/reward_guidance_shapes.py` on two embedded bases, with "
        f"{len(SEEDS)} seeds of pairs, training and samples. The denoisers are not trained. Mean of the seeds, least "
        "to greatest.",
        "",
        "Share of 256 held-out pairs whose chosen image the reward prefers, by the noise's time as a share of the "
        "noisiest:",
        "",
        "| base | " + " | ".join(f"{level:g}" for level in levels) + " |",
        "|---|" + "---|" * len(levels),
    ]
    for base, name in BASES.items():
        cells = [spread([run["accuracy"][level] for run in found[base]]) for level in levels]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Shares of {len(asked)} images, 20 steps at guidance scale 3: in the preferred style (outlined), colour and "
        "shape as asked, as clean as nine of ten of `mixed`'s own images in their style.",
        "",
        "| base | scale of the reward | preferred | colour | shape | clean in its style |",
        "|---|---|---|---|---|---|",
    ]
    for base, name in BASES.items():
        for column in found[base][0]["images"]:
            summaries = [summarize(run["images"][column], asked) for run in found[base]]
            cells = [spread([getattr(one, share) for one in summaries]) for share in SHARES]
            lines.append(f"| {name} | {column.removeprefix('scale ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run(base: str, seed: int) -> dict[str, dict]:
    """The example's accuracies and images."""
    torch.set_num_threads(1)
    scales = [f"{scale:g}" for scale in SCALES]
    with tempfile.TemporaryDirectory() as folder:
        return reward_guidance_shapes.main(
            ["--base", base, "--seed", str(seed), "--output_dir", folder, "--scales", *scales]
        )


def main() -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = {base: [pool.submit(run, base, seed) for seed in SEEDS] for base in BASES}
        found = {base: [each.result() for each in of_base] for base, of_base in runs.items()}
    text = table(found)
    print(text)
    (ROOT / "benchmarks" / "results" / "reward_guidance.md").write_text(text)


if __name__ == "__main__":
    main()

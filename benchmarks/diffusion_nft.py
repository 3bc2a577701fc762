"""DiffusionNFT online on the embedded flow pipeline: prompts, a judge, and how the generated style changes.

    python benchmarks/diffusion_nft.py

Three seeds of `examples/diffusion_nft_shapes.py`, looked at on the way. Written to results/diffusion_nft.md.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import diffusion_nft_shapes  # noqa: E402
import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from trl_diffusion_pref import DiffusionNFTTrainer  # noqa: E402
from trl_diffusion_pref.shapes import Summary, prompts, sample, sample_base, summarize  # noqa: E402


EVERY = 20
# How samples are looked at, and the guidance with which the phases sample.
GUIDANCE = (3.0, 1.0)
ASKED = (4 * prompts())[:64]


class Look(TrainerCallback):
    """Summaries of the same seeds on the way, and the time that sampling them took."""

    def __init__(self, trainer: DiffusionNFTTrainer) -> None:
        self.trainer, self.seconds = trainer, 0.0
        self.found: dict[int, list[Summary]] = {}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % EVERY == 0:
            began = time.perf_counter()
            pipeline = self.trainer.encoders.pipeline
            self.found[state.global_step] = [
                summarize(sample(pipeline, ASKED, guidance_scale=scale), ASKED) for scale in GUIDANCE
            ]
            self.seconds += time.perf_counter() - began


def cell(values: list[float]) -> str:
    """The mean over seeds, with the least and the largest where they differ."""
    spread = f" ({min(values):.0%} to {max(values):.0%})" if max(values) > min(values) else ""
    return f"{np.mean(values):.0%}{spread}"


def table(looks: list[Look], minutes: list[float]) -> str:
    """The page, of the seeds that were run so far."""
    base = [summarize(sample_base("flow", ASKED, guidance_scale=scale), ASKED) for scale in GUIDANCE]
    found = [{0: base, **look.found} for look in looks]
    lines = [
        "# DiffusionNFT from prompts and a judge",
        "",
        "Written by `benchmarks/diffusion_nft.py`: `examples/diffusion_nft_shapes.py`, the embedded flow pipeline, "
        "phases of 16 prompts with 8 samples, four steps in each, sampled without guidance; the reward is the "
        f"shapes' judge. Shares of {len(ASKED)} images from the same seeds, means over {len(looks)} seeds with the "
        "least and the largest, with the guidance that the demo samples with and without any.",
        "",
        "| steps | guidance | outlined | colour | shape |",
        "|---|---|---|---|---|",
    ]
    for step in found[0]:
        for number, scale in enumerate(GUIDANCE):
            summaries = [one[step][number] for one in found]
            shares = [cell([getattr(one, name) for one in summaries]) for name in ("preferred", "colour", "shape")]
            lines.append(f"| {step} | {scale:g} | {' | '.join(shares)} |")
    threads = torch.get_num_threads()
    took = f"A seed took {np.mean(minutes):.1f} minutes with {threads} CPU thread{'s' * (threads > 1)}"
    return "\n".join([*lines, "", f"{took}, sampling of the phases included."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=80)
    options = parser.parse_args()

    looks: list[Look] = []
    minutes: list[float] = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            trainer = diffusion_nft_shapes.trainer_for(folder, options.max_steps, seed)
            look = Look(trainer)
            trainer.add_callback(look)
            began = time.perf_counter()
            trainer.train()
            minutes.append((time.perf_counter() - began - look.seconds) / 60)
        looks.append(look)
        report = table(looks, minutes)
        print(report, flush=True)
        (ROOT / "benchmarks" / "results" / "diffusion_nft.md").write_text(report)


if __name__ == "__main__":
    main()

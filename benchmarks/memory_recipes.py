"""What fits on cards of 8 to 80 GB, by `estimate_memory`: the tables of docs/memory.md.

    python benchmarks/memory_recipes.py

The denoisers have the sizes of Stable Diffusion 1.5, SDXL and Flux.1 dev and no weights. Written to
results/memory_recipes.md. The counts are for CUDA and made on a CPU: computed, not measured on a GPU.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from gpu_models import flux_dev
from peft import LoraConfig
from sdxl_memory import sdxl_unet

from trl_diffusion_pref import DiffusionDPOConfig, MaPOConfig, estimate_memory
from trl_diffusion_pref.memory.cards import GIB, SHARE


RESULTS = Path(__file__).parent / "results"
CARDS = (8, 12, 16, 24, 80)
BATCHES = (1, 4, 16)


def sd15_unet() -> UNet2DConditionModel:
    """Of the sizes in stable-diffusion-v1-5's unet/config.json, without storage."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def flux_transformer() -> ModelMixin:
    """Of FLUX.1-dev, without storage."""
    return flux_dev(tiny=False).denoiser(torch.device("meta"), torch.float32)


@dataclass(frozen=True)
class Recipe:
    """One way to train: its name in the tables, the config's class and options, and whether it trains a LoRA."""

    name: str
    config: type[MaPOConfig] | type[DiffusionDPOConfig]
    options: dict[str, Any]
    lora: bool = False
    half: bool = False  # the base's weights in bfloat16


NF4 = {"quantize": "nf4"}
ROUNDED = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
# Of a base in half precision, which the largest models need.
SMALL = (
    Recipe("MaPO or Diffusion-DPO, LoRA of rank 16, base in nf4", DiffusionDPOConfig, NF4, lora=True, half=True),
    Recipe("MaPO or Diffusion-DPO, LoRA of rank 16, base in bfloat16", DiffusionDPOConfig, {}, lora=True, half=True),
)
RECIPES = (
    *SMALL,
    Recipe("MaPO or Diffusion-DPO, LoRA of rank 16", DiffusionDPOConfig, {}, lora=True),
    Recipe("MaPO, all weights in bfloat16, 8-bit Adam with stochastic rounding", MaPOConfig, ROUNDED, half=True),
    Recipe("MaPO, all weights, 8-bit Adam", MaPOConfig, {"optim": "adamw_bnb_8bit"}),
    Recipe("MaPO, all weights", MaPOConfig, {}),
    Recipe("Diffusion-DPO, all weights, 8-bit Adam", DiffusionDPOConfig, {"optim": "adamw_bnb_8bit"}),
    Recipe("Diffusion-DPO, all weights", DiffusionDPOConfig, {}),
)


MODELS: tuple[tuple[str, Callable[[], ModelMixin], tuple[Recipe, ...]], ...] = (
    ("Stable Diffusion 1.5, 512 px", sd15_unet, RECIPES),
    ("SDXL, 1024 px", sdxl_unet, RECIPES),
    ("Flux.1 dev, 1024 px", flux_transformer, SMALL),
)


def totals(model: Callable[[], ModelMixin], recipe: Recipe) -> dict[tuple[int, bool], float]:
    """GiB by pairs in a batch and whether activations are checkpointed."""
    found = {}
    for batch in BATCHES:
        denoiser = model().to(torch.bfloat16) if recipe.half else model()
        config = recipe.config(
            output_dir="unused", per_device_train_batch_size=batch, bf16=True, use_cpu=True, **recipe.options
        )
        estimate = estimate_memory(denoiser, config, LoraConfig(r=16) if recipe.lora else None, "cuda")
        found[batch, True] = (estimate.total_with_checkpointing or 0) / GIB
        found[batch, False] = estimate.total_without_checkpointing / GIB
    return found


def what_fits(found: dict[tuple[int, bool], float], card: int) -> str:
    """The largest batch for a card, without checkpointing where that fits as many pairs."""
    fitting = [(batch, not checkpointing) for (batch, checkpointing), gib in found.items() if gib <= SHARE * card]
    if not fitting:
        return "-"
    batch, without = max(fitting)
    return f"{batch}" if without else f"{batch} (c)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    lines = [
        "# Memory recipes",
        "",
        "Written by `benchmarks/memory_recipes.py`. Computed by `estimate_memory` for CUDA with bfloat16 autocast and "
        "not measured on a GPU. The rows of LoRAs are Diffusion-DPO's, of which MaPO needs a little less.",
    ]
    for model, denoiser, recipes in MODELS:
        found = {recipe.name: totals(denoiser, recipe) for recipe in recipes}
        head = " | ".join(f"{batch} pair{'s' if batch > 1 else ''}" for batch in BATCHES)
        lines += [
            "",
            f"## {model}",
            "",
            "GiB at so many pairs in a batch, with activation checkpointing / without:",
            "",
        ]
        lines += [f"| run | {head} |", "|---|" + len(BATCHES) * "---|"]
        for name, gib in found.items():
            cells = (f"{gib[batch, True]:.1f} / {gib[batch, False]:.1f}" for batch in BATCHES)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += [
            "",
            f"The most pairs of {', '.join(map(str, BATCHES))} that take at most {SHARE:.0%} of a card; (c): with "
            "activation checkpointing alone:",
            "",
            f"| run | {' | '.join(f'{card} GB' for card in CARDS)} |",
            "|---|" + len(CARDS) * "---|",
        ]
        for name, gib in found.items():
            lines.append(f"| {name} | {' | '.join(what_fits(gib, card) for card in CARDS)} |")
        print("\n".join(lines[-40:]), flush=True)
        (RESULTS / "memory_recipes.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

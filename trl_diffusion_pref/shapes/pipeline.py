"""Loads the embedded pipeline and samples from it the way the demo, the tests and the benchmarks do."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image


BASES = {
    "mixed": "trained on 85 % filled and 15 % outlined shapes",
    "filled_only": "never saw an outlined shape; shares the other's text encoder and VAE",
}
_WEIGHTS = Path(__file__).parent / "weights"


def pipeline_folder() -> Path:
    """Folder of the `mixed` base, which `StableDiffusionPipeline.from_pretrained` loads."""
    return _WEIGHTS / "pipeline"


def load_pipeline(base: str = "mixed", dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Loads one of the two trained bases.

    Args:
        base: "mixed" or "filled_only", see `BASES`.
        dtype: Of the weights, which are stored in float16.

    Raises:
        ValueError: Unknown base.
    """
    if base not in BASES:
        raise ValueError(f"base={base!r} is none of {', '.join(BASES)}.")
    components = {}
    if base == "filled_only":
        components["unet"] = UNet2DConditionModel.from_pretrained(_WEIGHTS / "filled_only_unet", dtype=dtype)
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder(), dtype=dtype, **components)
    return pipeline


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    guidance_scale: float = 3.0,
    steps: int = 20,
    batch_size: int = 32,
) -> list[Image.Image]:
    """Draws one picture per prompt with DDIM, picture i from a generator seeded with (seed, i).

    The pipeline's own scheduler is put back afterwards; its progress bar is switched off.
    """
    pipeline.set_progress_bar_config(disable=True)
    scheduler = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_config(scheduler.config)
    images: list[Image.Image] = []
    try:
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            generators = [
                torch.Generator().manual_seed(seed * 1_000_003 + start + index) for index in range(len(batch))
            ]
            images += pipeline(
                batch, generator=generators, guidance_scale=guidance_scale, num_inference_steps=steps
            ).images
    finally:
        pipeline.scheduler = scheduler
    return images

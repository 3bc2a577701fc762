"""Loads the embedded pipelines and generates images with them, for the demo, the tests and the benchmarks."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from ..evaluation import sampling
from ..host_libraries import dtype_option, quiet_loading
from .silent_tokens import count_silent_tokens


BASES = {
    "mixed": "trained on 85 % filled and 15 % outlined shapes",
    "filled_only": "trained on filled shapes only; has the same text encoder and VAE as mixed",
    "flow": "a rectified flow of Stable Diffusion 3's classes; has the same data, text encoder and VAE as mixed",
}
_WEIGHTS = Path(__file__).parent / "weights"


def pipeline_folder(base: str = "mixed") -> Path:
    """Folder that `DiffusionPipeline.from_pretrained` loads.

    Args:
        base: "mixed" or "flow"; "filled_only" is stored as a UNet only, see `load_pipeline`.

    Raises:
        ValueError: Any other base.
    """
    folders = {"mixed": "pipeline", "flow": "flow_pipeline"}
    if base not in folders:
        raise ValueError(f"base={base!r} has no folder of its own, only {' and '.join(folders)} have one.")
    return _WEIGHTS / folders[base]


def load_pipeline(
    base: str = "mixed", dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """Loads one of the trained bases.

    Args:
        base: "mixed", "filled_only" or "flow", see `BASES`. The last is a `StableDiffusion3Pipeline`; the
            equal tokens of its T5 encoder are computed as one, which gives the same values faster, see
            `silent_tokens`.
        dtype: Of the weights, which are stored in float16.

    Raises:
        ValueError: Unknown base.
    """
    if base not in BASES:
        raise ValueError(f"base={base!r} is not one of {', '.join(BASES)}.")
    options = dtype_option(dtype)
    with quiet_loading():
        if base == "flow":
            pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder("flow"), **options)
            count_silent_tokens(pipeline.transformer)
            return pipeline
        components = {}
        if base == "filled_only":
            components["unet"] = UNet2DConditionModel.from_pretrained(_WEIGHTS / "filled_only_unet", **options)
        return StableDiffusionPipeline.from_pretrained(pipeline_folder(), **options, **components)


def sample(
    pipeline: StableDiffusionPipeline | StableDiffusion3Pipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    guidance_scale: float = 3.0,
    steps: int = 20,
    batch_size: int = 32,
) -> list[Image.Image]:
    """Generates one image per prompt, with DDIM or, for a flow, its own Euler scheduler; image i depends on (seed, i).

    The pipeline gets its scheduler back afterwards. Rounding depends on the batch, see `evaluation.sampling.sample`.
    """
    scheduler = pipeline.scheduler
    kind = type(scheduler) if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else DDIMScheduler
    pipeline.scheduler = kind.from_config(scheduler.config)
    try:
        images = sampling.sample(
            pipeline,
            prompts,
            [seed * 1_000_003 + index for index in range(len(prompts))],
            batch_size=batch_size,
            # The numbers of the README and the benchmarks were measured so.
            exact=False,
            all_processes=False,
            show_progress=False,
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
        )
    finally:
        pipeline.scheduler = scheduler
    return [image for image in images if isinstance(image, Image.Image)]


def sample_base(
    base: str, prompts: Sequence[str], *, seed: int = 0, guidance_scale: float = 3.0, steps: int = 20
) -> list[Image.Image]:
    """What `sample` generates with a base before alignment, computed once per process for the same arguments.

    Args:
        base: As for `load_pipeline`.
        prompts, seed, guidance_scale, steps: As for `sample`.
    """
    return [image.copy() for image in _sampled_once(base, tuple(prompts), seed, guidance_scale, steps)]


@lru_cache(maxsize=8)
def _sampled_once(
    base: str, prompts: tuple[str, ...], seed: int, guidance_scale: float, steps: int
) -> list[Image.Image]:
    return sample(load_pipeline(base), prompts, seed=seed, guidance_scale=guidance_scale, steps=steps)

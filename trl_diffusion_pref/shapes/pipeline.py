"""Loads the embedded pipelines and generates images with them, for the demo, the tests and the benchmarks."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from ..evaluation import sampling
from ..host_libraries import dtype_option, quiet_loading
from .drawing import IMAGE_SIZE
from .silent_tokens import count_silent_tokens


BASES = {
    "mixed": "trained on 85 % filled and 15 % outlined shapes",
    "filled_only": "trained on filled shapes only; has the same text encoder and VAE as mixed",
    "flow": "a rectified flow of Stable Diffusion 3's classes; has the same data, text encoder and VAE as mixed",
    "editing": "InstructPix2Pix, trained from mixed on edits, half of them redrawn elsewhere; same encoder and VAE",
}
ShapesPipeline: TypeAlias = StableDiffusionPipeline | StableDiffusion3Pipeline | StableDiffusionInstructPix2PixPipeline
_WEIGHTS = Path(__file__).parent / "weights"


def pipeline_folder(base: str = "mixed") -> Path:
    """Folder that `DiffusionPipeline.from_pretrained` loads.

    Args:
        base: "mixed" or "flow"; "filled_only" and "editing" are stored as UNets only, see `load_pipeline`.

    Raises:
        ValueError: Any other base.
    """
    folders = {"mixed": "pipeline", "flow": "flow_pipeline"}
    if base not in folders:
        raise ValueError(f"base={base!r} has no folder of its own, only {' and '.join(folders)} have one.")
    return _WEIGHTS / folders[base]


def load_pipeline(base: str = "mixed", dtype: torch.dtype = torch.float32) -> ShapesPipeline:
    """Loads one of the trained bases.

    Args:
        base: "mixed", "filled_only", "flow" or "editing", see `BASES`. "flow" is a `StableDiffusion3Pipeline`; the
            equal tokens of its T5 encoder are computed as one, which gives the same values faster, see
            `silent_tokens`. "editing" is a `StableDiffusionInstructPix2PixPipeline` for the instructions of `edits`.
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
        if base != "mixed":
            components["unet"] = UNet2DConditionModel.from_pretrained(_WEIGHTS / f"{base}_unet", **options)
        kind = StableDiffusionInstructPix2PixPipeline if base == "editing" else StableDiffusionPipeline
        return kind.from_pretrained(pipeline_folder(), **options, **components)


def sample(
    pipeline: ShapesPipeline,
    prompts: Sequence[str],
    *,
    images: Sequence[Image.Image] | None = None,
    seed: int = 0,
    guidance_scale: float = 3.0,
    steps: int = 20,
    batch_size: int = 32,
) -> list[Image.Image]:
    """Generates one image per prompt, with DDIM or, for a flow, its own Euler scheduler; image i depends on (seed, i).

    The pipeline gets its scheduler back afterwards. Rounding depends on the batch, see `evaluation.sampling.sample`.

    Args:
        pipeline: One of the bases, or trained from one.
        prompts: N prompts.
        images: For the editing pipeline, what to edit: N drawings.
        seed: Of the samples' seeds.
        guidance_scale, steps: Of the pipeline's call.
        batch_size: Images in one call.

    Raises:
        ValueError: See `evaluation.sampling.sample`.
    """
    scheduler = pipeline.scheduler
    kind = type(scheduler) if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else DDIMScheduler
    pipeline.scheduler = kind.from_config(scheduler.config)
    try:
        samples = sampling.sample(
            pipeline,
            prompts,
            [seed * 1_000_003 + index for index in range(len(prompts))],
            images=images,
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
    return [image for image in samples if isinstance(image, Image.Image)]


def sample_base(
    base: str,
    prompts: Sequence[str],
    *,
    images: Sequence[Image.Image] | None = None,
    seed: int = 0,
    guidance_scale: float = 3.0,
    steps: int = 20,
) -> list[Image.Image]:
    """What `sample` generates with a base before alignment, computed once per process for the same arguments.

    Args:
        base: As for `load_pipeline`.
        prompts, images, seed, guidance_scale, steps: As for `sample`.
    """
    sources = None if images is None else tuple(image.convert("RGB").tobytes() for image in images)
    made = _sampled_once(base, tuple(prompts), sources, seed, guidance_scale, steps)
    return [image.copy() for image in made]


@lru_cache(maxsize=8)
def _sampled_once(
    base: str,
    prompts: tuple[str, ...],
    sources: tuple[bytes, ...] | None,
    seed: int,
    guidance_scale: float,
    steps: int,
) -> list[Image.Image]:
    images = None
    if sources is not None:
        images = [Image.frombytes("RGB", (IMAGE_SIZE, IMAGE_SIZE), pixels) for pixels in sources]
    return sample(load_pipeline(base), prompts, images=images, seed=seed, guidance_scale=guidance_scale, steps=steps)

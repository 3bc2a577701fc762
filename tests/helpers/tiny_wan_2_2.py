"""Wan 2.2 A14B's pipeline with random weights: two transformers, one for each of two ranges of noise."""

import torch
from diffusers import WanPipeline

from helpers import tiny


BOUNDARY = 0.875


def build_wan_2_2() -> WanPipeline:
    """Wan's tiny pipeline with a second transformer, which is called below `BOUNDARY`."""
    pipeline = tiny.build("wan")
    torch.manual_seed(1)
    second = type(pipeline.transformer)(**{**pipeline.transformer.config})
    pipeline = WanPipeline(**{**pipeline.components, "transformer_2": second}, boundary_ratio=BOUNDARY)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

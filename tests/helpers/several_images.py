"""A pipeline that edits up to three images at once, with the parts of the tiny InstructPix2Pix."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from helpers.tiny_instruct_pix2pix import build_instruct_pix2pix
from trl_diffusion_pref import families
from trl_diffusion_pref.families.instruct_pix2pix import InstructPix2PixFamily


class SeveralImagesPipeline(StableDiffusionInstructPix2PixPipeline):
    """Its sample is the mean of the images, as large as the last one, plus noise by the seed.

    Like the pipelines of its kind it takes one prompt, and the images of that prompt as a list.
    """

    calls: list[tuple[list[str], list[tuple[int, int]]]] = []

    def __call__(self, prompt, image, generator, output_type="pil", num_inference_steps=1):
        assert len(prompt) == len(generator) == 1 and isinstance(image, list)
        self.calls.append((prompt, [one.size for one in image]))
        size = image[-1].size
        mean = np.mean([np.asarray(one.resize(size), dtype=np.float64) for one in image], axis=0)
        noise = np.random.default_rng(generator[0].initial_seed()).integers(0, 40, mean.shape)
        return ([Image.fromarray((mean * 0.8 + noise).astype(np.uint8))],)


class SeveralImagesFamily(InstructPix2PixFamily):
    pipeline_class = "SeveralImagesPipeline"
    max_condition_images = 3


@contextmanager
def several_images() -> Iterator[SeveralImagesPipeline]:
    """The pipeline, whose family is registered as long as the block lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families._FAMILIES, SeveralImagesFamily.pipeline_class, SeveralImagesFamily())
        patch.setattr(SeveralImagesPipeline, "calls", [])
        yield SeveralImagesPipeline(**build_instruct_pix2pix().components, requires_safety_checker=False)

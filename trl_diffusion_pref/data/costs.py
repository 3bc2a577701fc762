"""What encoding a data set takes, before it is encoded: disk, memory while training, and floating-point operations."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ClapModel

from ..families import Family
from ..families.autoencoders import weights_in_float32
from .cache import row_bytes, stored_bytes
from .layouts import PAIRS, Layout
from .options import EncodingOptions
from .preparation import preparation_for
from .shards import KEY


# In memory for each row while training: its number, place, bucket, caption and where its captions begin; and of the
# files its key there, once more among all keys in order, and its place.
_ROW_BYTES = sum(
    np.dtype(dtype).itemsize
    for dtype in (np.int64, np.int32, np.int32, np.int16, np.int32, np.int64, KEY, KEY, np.int32, np.int32)
)
# For each distinct prompt: its text, in a dictionary beside its number, the three numbers of its place, and its key.
_PROMPT_BYTES = 49 + 100 + 32 + 12 + 2 * KEY.itemsize + 8
_LETTERS = 60


@dataclass(frozen=True)
class EncodingCosts:
    """Of one row and of one prompt; see `encoding_costs`.

    Args:
        row_bytes: On disk, of a row's samples.
        prompt_bytes: On disk, of a prompt's embeddings, with their padding.
        row_memory, prompt_memory: In memory while training, in bytes.
        sample_flops: Floating-point operations of the VAE for a row's samples; a multiplication and an addition are
            two.
        prompt_flops: Of the text encoders for a prompt.
    """

    row_bytes: int
    prompt_bytes: int
    row_memory: int
    prompt_memory: int
    sample_flops: int
    prompt_flops: int

    def of(self, rows: int, prompts: int) -> "EncodingCosts":
        """The totals of a data set."""
        return EncodingCosts(
            rows * self.row_bytes,
            prompts * self.prompt_bytes,
            rows * self.row_memory,
            prompts * self.prompt_memory,
            rows * self.sample_flops,
            prompts * self.prompt_flops,
        )


def encoding_costs(
    pipeline: DiffusionPipeline, family: Family, options: EncodingOptions, layout: Layout = PAIRS
) -> EncodingCosts:
    """What one row and one prompt take, from shapes alone.

    Args:
        pipeline: Its VAE and text encoders may be on the meta device; they are not changed.
        options: Their resolution, dtype, and whether the standard deviation is kept.
        layout: The columns.
    """
    preparation = preparation_for(pipeline, family, options.resolution, options.num_frames)
    inputs = family.input_shapes(pipeline, preparation.shape)
    of_sample = {name: tuple(tensor.shape) for name, tensor in preparation.uncropped_conditioning().items()}
    of_prompt = {name: shape for name, shape in inputs.conditioning.items() if name not in of_sample}
    count = layout.num_samples + len(layout.conditions)
    conditions = layout.condition_shapes(pipeline, family, preparation.shape)
    return EncodingCosts(
        row_bytes=row_bytes(inputs.latents, of_sample, conditions, layout, options, pipeline.vae.dtype),
        prompt_bytes=stored_bytes(of_prompt, options.stored_dtype(family.text_dtype(pipeline))),
        row_memory=_ROW_BYTES,
        prompt_memory=_PROMPT_BYTES + _LETTERS,
        sample_flops=count * vae_flops(pipeline, family, preparation.shape),
        prompt_flops=sum(text_flops(pipeline, family).values()),
    )


def vae_flops(pipeline: DiffusionPipeline, family: Family, shape: tuple[int, ...]) -> int:
    """Floating-point operations of encoding one sample, of a shape as `Family.encode_samples` takes it."""
    vae = pipeline.vae
    # In half precision, values would be looked at, and there are none.
    with weights_in_float32(vae):
        return _counted(vae, lambda: family.encode_samples(pipeline, torch.empty(1, *shape, device=vae.device)))


def text_flops(pipeline: DiffusionPipeline, family: Family) -> Mapping[str, int]:
    """Floating-point operations of each text encoder for one prompt, whose tokens are padded to its limit.

    What an encoder does to see images is not counted.
    """
    flops = {}
    shapes = family.conditioning_shapes(pipeline).values() if family.prompts_see_images else ()
    assumed = max((shape[0] for shape in shapes if len(shape) == 2), default=None)
    for name, limit in family.token_limits(pipeline).items():
        encoder: Any = getattr(pipeline, name.replace("tokenizer", "text_encoder"))
        # Nothing is cut where an encoder sees images; the limit is then none.
        limit = limit if assumed is None else assumed
        if isinstance(encoder, ClapModel):
            # The other half of it hears.
            encoder = encoder.text_model

        def run(encoder: Any = encoder, limit: int = limit) -> object:
            return encoder(input_ids=torch.zeros(1, limit, dtype=torch.int64, device=encoder.device))

        flops[name.replace("tokenizer", "text_encoder")] = _counted(encoder, run)
    return flops


def _counted(module: nn.Module, run: Callable[[], object]) -> int:
    """What FlopCounterMode counts, on tensors without values, with attention as the matrix products that it is."""
    counter = FlopCounterMode(display=False)
    without_values = nullcontext() if module.device.type == "meta" else FakeTensorMode(allow_non_fake_inputs=True)
    with without_values, sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        run()
    return counter.get_total_flops()

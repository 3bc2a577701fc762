"""How samples and prompts are encoded, and in which dtypes they are kept."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .bad_rows import BadRowPolicy
from .buckets import BucketOptions
from .pair_options import PairOptions
from .resolution import Resolution


CacheDtype = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class EncodingOptions:
    """How samples are encoded.

    Args:
        resolution: Side length in pixels of images, shorter side of videos, or (height, width); None for what the
            pipeline generates.
        num_frames: Of a video; None for what the pipeline generates.
        crop: "center" or "random" (one place per row, drawn once from the seed and the row).
        random_flip: Whether each row's samples are mirrored with probability 1/2 (one decision per row, likewise).
        seed: Of these draws.
        cache_dtype: In which latents and prompt embeddings are kept; "auto" for the encoder's own half precision, or
            float16 where that is float32.
        keep_std: Whether the posterior's standard deviation is kept, which only sampling from it needs.
        keep_empty_prompt: Whether rows whose text encoder sees their condition images also keep the conditioning on
            the empty prompt, which prompt dropout and a guided teacher need.
        buckets: Whether images of several shapes are encoded in their own.
        bad_rows: What happens with rows that cannot be used.
        pairs: How rows became pairs, which a run that takes an encoded data set compares with its own.
    """

    resolution: Resolution = None
    num_frames: int | None = None
    crop: Literal["center", "random"] = "center"
    random_flip: bool = False
    seed: int = 0
    cache_dtype: CacheDtype = "auto"
    keep_std: bool = True
    keep_empty_prompt: bool = False
    buckets: BucketOptions = field(default_factory=BucketOptions)
    bad_rows: BadRowPolicy = field(default_factory=BadRowPolicy)
    pairs: PairOptions | None = None

    @property
    def draws(self) -> bool:
        """Whether the seed plays a part."""
        return self.crop == "random" or self.random_flip

    def draw(self, row: int) -> tuple[tuple[float, float], bool]:
        """Where a row's samples are cropped, and whether they are mirrored."""
        rng = np.random.default_rng([self.seed, row])
        across, down = rng.random(2).tolist() if self.crop == "random" else (0.5, 0.5)
        return (across, down), self.random_flip and bool(rng.random() < 0.5)

    def stored_dtype(self, encoder: torch.dtype) -> torch.dtype:
        """The dtype in which what an encoder of this dtype computes is kept."""
        if self.cache_dtype != "auto":
            return getattr(torch, self.cache_dtype)
        return encoder if encoder in (torch.float16, torch.bfloat16) else torch.float16


def as_stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of one row as it is kept, on the CPU: vectors and numbers in float32, what is larger in `dtype`.

    What exceeds float16 stays in float32.
    """
    value = value.cpu().float()
    if value.ndim < 2 or dtype == torch.float32:
        return value.contiguous()
    stored = value.to(dtype)
    return (value if bool((stored.isinf() & value.isfinite()).any()) else stored).contiguous()

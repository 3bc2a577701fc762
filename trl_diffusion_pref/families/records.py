"""What families say in one value: published options, shapes of inputs, stand-ins for parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recommended:
    """Values of options for one algorithm on one family or kind of model.

    Args:
        values: By the option's name.
        source: Where they were published, or that they were not and whose they are.
    """

    values: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class InputShapes:
    """Shapes of what the denoiser is given for one sample, without the batch dimension; all of it is float32.

    Args:
        latents: `(C, h, w)` of an image, `(C, f, h, w)` of a video; of audio as its VAE has them.
        conditioning: By name, everything that `Family.predict` reads.
    """

    latents: tuple[int, ...]
    conditioning: dict[str, tuple[int, ...]]


@dataclass(eq=False)
class PartConfig:
    """Stands in for a part of a pipeline of which only its config, or a tokenizer's length, is read.

    Not frozen, since some pipelines set an attribute of their tokenizer when they are made, from its `eos_token`.
    """

    config: Any = None
    model_max_length: int | None = None
    eos_token: str | None = None

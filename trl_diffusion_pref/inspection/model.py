"""A model of which only sizes and tokenizers are needed: no weights are read."""

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from ..data.cache import row_bytes, stored_bytes
from ..data.layouts import Layout
from ..data.options import EncodingOptions
from ..data.preparation import ImagePreparation, Preparation, VideoPreparation, preparation_for
from ..data.resolution import Resolution
from ..families import Family, family_for, family_named
from ..families.weightless import pipeline_from_configs
from ..host_libraries import quiet_loading
from .parts import EncodedSize, Spread, Tokens


# Prompts that are divided into tokens at once.
_TOKENIZED_AT_ONCE = 1000
_EXAMPLES = 10


def pipeline_with_tokenizers(model: str | os.PathLike[str]) -> DiffusionPipeline:
    """A pipeline of a folder or Hub id with its tokenizers, but without weights; see `pipeline_from_configs`.

    Raises:
        TypeError: diffusers has no pipeline of this class, or no family is for it.
        OSError: There is no pipeline of this name.
    """
    with quiet_loading():
        index = DiffusionPipeline.load_config(model)
        family_named(index["_class_name"])
        pipeline = pipeline_from_configs(model)
        for name, entry in index.items():
            if name.startswith("tokenizer") and isinstance(entry, (list, tuple)) and entry[1] is not None:
                # Those that are not of transformers are in the folder of one of diffusers' pipelines.
                library = entry[0] if entry[0] == "transformers" else f"diffusers.pipelines.{entry[0]}"
                kind: Any = getattr(import_module(library), entry[1])
                setattr(pipeline, name, kind.from_pretrained(model, subfolder=name))
    return pipeline


class InspectedModel:
    """What a model makes of samples and prompts.

    Args:
        model: A folder or Hub id, of which configs and tokenizers are read, or a loaded pipeline.
        resolution, num_frames: As for the trainers.

    Attributes:
        name: What the report calls it.

    Raises:
        TypeError: No supported pipeline.
        ValueError: A size that the model does not take.
    """

    def __init__(
        self, model: str | os.PathLike[str] | DiffusionPipeline, resolution: Resolution, num_frames: int | None
    ) -> None:
        by_name = isinstance(model, (str, os.PathLike))
        self.pipeline: DiffusionPipeline = pipeline_with_tokenizers(model) if by_name else model
        self.family: Family = family_for(self.pipeline)
        self.name = str(model) if by_name else type(model).__name__
        self.preparation: Preparation = preparation_for(self.pipeline, self.family, resolution, num_frames)

    @property
    def kind(self) -> Literal["image", "video", "audio"]:
        """What it generates."""
        return self.family.modality

    @property
    def num_frames(self) -> int | None:
        """Of its videos."""
        return self.preparation.num_frames if isinstance(self.preparation, VideoPreparation) else None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that samples are brought to; None for audio."""
        preparation = self.preparation
        return preparation.size if isinstance(preparation, (ImagePreparation, VideoPreparation)) else None

    @property
    def size_step(self) -> int:
        """Pixels that a side must be a multiple of."""
        return self.family.size_step(self.pipeline)

    @property
    def largest_side(self) -> int | None:
        """Pixels that a side may have."""
        return self.family.largest_side(self.pipeline)

    def tokens(self, prompts: Sequence[str], rows: Sequence[int]) -> dict[str, Tokens]:
        """How long prompts are for each tokenizer, and how many are cut.

        Args:
            prompts: Distinct ones.
            rows: How many rows each has.
        """
        if not prompts:
            return {}
        limits = self.family.token_limits(self.pipeline)
        lengths: dict[str, list[int]] = {name: [] for name in limits}
        # In parts: the tokens of a million prompts are gigabytes of Python numbers.
        for start in range(0, len(prompts), _TOKENIZED_AT_ONCE):
            part = prompts[start : start + _TOKENIZED_AT_ONCE]
            texts = [self.family.tokenized_text(self.pipeline, prompt) for prompt in part]
            for name in limits:
                lengths[name] += map(len, getattr(self.pipeline, name)(texts, verbose=False)["input_ids"])
        return {name: _tokens(prompts, rows, lengths[name], limit) for name, limit in limits.items()}

    def encoded_size(self, layout: Layout, rows: int, prompts: int, *, keep_std: bool) -> EncodedSize | None:
        """Bytes on disk; None where only a loaded pipeline knows them, which is so of Stable Audio.

        Args:
            layout: Samples and condition images of a row.
            rows: That can be used.
            prompts: Distinct ones.
            keep_std: Whether the posterior's deviation is kept (`latent_sampling="sample"`).
        """
        try:
            conditioning = self.preparation.uncropped_conditioning()
        # A duration is encoded by a module, for which a pipeline without weights has a stand-in.
        except AttributeError:
            return None
        latent = self.family.latent_shape(self.pipeline, self.preparation.shape)
        of_sample = {name: tuple(tensor.shape) for name, tensor in conditioning.items()}
        dtype = getattr(self.pipeline.vae, "dtype", torch.float32)
        conditions = layout.condition_shapes(self.pipeline, self.family, self.preparation.shape)
        of_row, of_row_mean = (
            row_bytes(latent, of_sample, conditions, layout, EncodingOptions(keep_std=keep), dtype)
            for keep in (keep_std, False)
        )
        return EncodedSize(of_row, of_row_mean, rows, self._bytes_per_prompt(set(of_sample)), prompts + 1)

    def _bytes_per_prompt(self, of_samples: set[str]) -> int | None:
        try:
            shapes = self.family.conditioning_shapes(self.pipeline)
        # A family from outside may have to encode a prompt to say it.
        except TypeError:
            return None
        of_prompts = {name: shape for name, shape in shapes.items() if name not in of_samples}
        return stored_bytes(of_prompts, EncodingOptions().stored_dtype(torch.float16))


def _tokens(prompts: Sequence[str], rows: Sequence[int], lengths: Sequence[int], limit: int) -> Tokens:
    cut = [number for number, length in enumerate(lengths) if length > limit]
    longest = sorted(cut, key=lambda number: -lengths[number])[:_EXAMPLES]
    spread = Spread.of(lengths)
    assert spread is not None
    return Tokens(
        limit=limit,
        lengths=spread,
        cut=len(cut),
        cut_rows=sum(rows[number] for number in cut),
        examples=[prompts[number][:200] for number in longest],
    )

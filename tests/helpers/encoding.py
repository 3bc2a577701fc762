"""Encoding as tests want it: one call, and rows in which each sample's posterior has a name."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from trl_diffusion_pref.data import PAIRS, DatasetEncoder, EncodingOptions, Layout


def encoder_of(
    pipeline, family, options: EncodingOptions, *, cache_folder=None, batch_size: int = 4, layout: Layout = PAIRS
) -> DatasetEncoder:
    folder = Path(cache_folder or mkdtemp())
    if options.cache_dtype == "auto":
        # Values are compared with those of the VAE itself.
        options = replace(options, cache_dtype="float32")
    return DatasetEncoder(pipeline, family, layout, options, cache_folder=folder, batch_size=batch_size)


class Rows:
    """Encoded rows, with `<column>_mean`, `<column>_std` and `<column>/<name>` of each sample beside their columns."""

    def __init__(self, encoded: Any, layout: Layout) -> None:
        self.encoded, self.layout = encoded, layout

    def _named(self, row: dict[str, Any]) -> dict[str, Any]:
        named = dict(row)
        for index, column in enumerate(self.layout.samples):
            named |= {f"{column}_{part}": row[f"latents/{part}"][index] for part in ("mean", "std")}
            own = {name: value[index] for name, value in row.items() if name.startswith("sample/")}
            named |= {f"{column}/{name.removeprefix('sample/')}": value for name, value in own.items()}
        return named

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._named(self.encoded[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, range(len(self)))

    def __len__(self) -> int:
        return len(self.encoded)


def encode_rows(
    dataset, pipeline, family, options: EncodingOptions, *, what="train_dataset", layout: Layout = PAIRS, **where
) -> Rows:
    """Rows of a stored data set."""
    encoder = encoder_of(pipeline, family, options, layout=layout, **where)
    encoder.add_prompts([dataset])
    return Rows(encoder.encode(dataset, what), layout)


def latent_shape(pipeline, family, resolution=None, num_frames=None) -> tuple[int, ...]:
    return encoder_of(pipeline, family, EncodingOptions(resolution, num_frames)).latent_shape

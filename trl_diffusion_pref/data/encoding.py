"""Encodes a data set's samples once, to latent posteriors, in `datasets`' cache; and streams the same."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from diffusers import DiffusionPipeline

from ..families import Family
from ..fingerprint import weights_fingerprint
from .arrays import array_features
from .cells import CellProblem, paths_outside
from .columns import check_prompts, dataset_fingerprint, raise_row_problems
from .preparation import Preparation, preparation_for
from .prompts import truncation_report, without_truncation_messages
from .resolution import Resolution
from .space import check_space


logger = logging.getLogger(__name__)

CONDITIONING_PREFIX = "conditioning/"
# Part of the cache's key: raise it when encoded values change for the same inputs.
_ENCODING_VERSION = 3


def image_conditioning_prefix(column: str) -> str:
    """What the columns with the conditioning of an image column's images begin with."""
    return f"{column}_{CONDITIONING_PREFIX}"


def latent_columns(image_columns: tuple[str, ...]) -> tuple[str, ...]:
    """The columns that encoding makes of image columns: each posterior's mean and standard deviation."""
    return tuple(f"{column}_{part}" for column in image_columns for part in ("mean", "std"))


@dataclass(frozen=True)
class EncodingOptions:
    """What decides the encoded values, besides the weights.

    Args:
        resolution: Side length in pixels of images, shorter side of clips, or (height, width); None for what the
            pipeline generates.
        crop: "center" or "random" (one place per pair, drawn once from the seed and the row).
        random_flip: Whether each pair is mirrored with probability 1/2 (one decision per pair, likewise).
        seed: Of these draws.
        image_columns: The columns that hold images, clips or sound. They are encoded alike, with the same crop and
            flip within a row; none where prompts are all there is.
        num_frames: Of a clip; None for what the pipeline generates.
    """

    resolution: Resolution = None
    crop: str = "center"
    random_flip: bool = False
    seed: int = 0
    image_columns: tuple[str, ...] = ("chosen", "rejected")
    num_frames: int | None = None

    def preparation(self, pipeline: DiffusionPipeline, family: Family) -> Preparation:
        """How these options make samples of cells for a pipeline.

        Raises:
            ValueError: An option that samples of this kind do not have.
        """
        return preparation_for(
            pipeline,
            family,
            self.resolution,
            self.num_frames,
            cropped_or_mirrored=self.crop == "random" or self.random_flip,
        )


@contextmanager
def on_device(pipeline: DiffusionPipeline, family: Family, device: torch.device) -> Iterator[None]:
    """Keeps the pipeline's encoders on a device for the duration, then puts them back where they were."""
    encoders = family.encoders(pipeline)
    before = [(encoder.device, encoder.training) for encoder in encoders]
    try:
        for encoder in encoders:
            encoder.to(device).eval()
        yield
    finally:
        for encoder, (place, training) in zip(encoders, before, strict=True):
            encoder.to(place).train(training)


class _RowEncoder:
    """Encodes a batch of rows; the function that `map` calls."""

    def __init__(
        self,
        preparation: Preparation,
        options: EncodingOptions,
        what: str,
        *,
        with_prompts: bool,
        extra_columns: tuple[str, ...],
        notes_file: Path | None = None,
    ) -> None:
        self.preparation, self.options, self.what = preparation, options, what
        self.pipeline, self.family = preparation.pipeline, preparation.family
        self.with_prompts, self.extra_columns = with_prompts, extra_columns
        self._reported_truncation = False
        # By kind, so that each is said once.
        self._said: dict[str, str] = {}
        self._notes_file = notes_file

    def __call__(self, batch: dict[str, list], rows: list[int]) -> dict[str, Any]:
        check_prompts(batch["prompt"], rows, self.what)
        # Made here and not kept: data loader workers get this object by pickling or by forking.
        with ThreadPoolExecutor(max_workers=4) as pool:
            cells = [batch[column] for column in self.options.image_columns]
            prepared = list(pool.map(self._prepare_row, rows, zip(*cells, strict=True))) if cells else []
        raise_row_problems([problem for row in prepared for problem in row.problems], self.what)
        self._say_once([note for row in prepared for note in row.notes])
        encoded: dict[str, Any] = {"prompt": batch["prompt"], "row": rows}
        encoded |= {name: batch[name] for name in self.extra_columns}
        for index, column in enumerate(self.options.image_columns):
            pixels = torch.stack([row.images[index] for row in prepared])
            mean, std = self.family.encode_images(self.pipeline, pixels)
            finite = (torch.isfinite(mean) & torch.isfinite(std)).flatten(1).all(dim=1).tolist()
            raise_row_problems(
                [
                    f"row {row}, column '{column}': the {type(self.pipeline.vae).__name__} gives NaN or infinity, in "
                    "float32 too, so its weights are damaged; load it anew"
                    for row, good in zip(rows, finite, strict=True)
                    if not good
                ],
                self.what,
            )
            encoded[f"{column}_mean"], encoded[f"{column}_std"] = mean.cpu().numpy(), std.cpu().numpy()
            for name in prepared[0].conditioning[index]:
                values = torch.stack([row.conditioning[index][name] for row in prepared])
                encoded[image_conditioning_prefix(column) + name] = values.cpu().numpy()
        if self.with_prompts:
            self._report_truncation(batch["prompt"])
            with without_truncation_messages(self.pipeline):
                conditioning = self.family.encode_prompts(self.pipeline, batch["prompt"])
            encoded |= {CONDITIONING_PREFIX + name: tensor.cpu().numpy() for name, tensor in conditioning.items()}
        return encoded

    def _report_truncation(self, prompts: list[str]) -> None:
        """Once: how many are to come, nobody knows."""
        report = None if self._reported_truncation else truncation_report(prompts, self.pipeline, self.family)
        if report:
            logger.warning("%s is streamed, and so far: %s", self.what, report)
            self._reported_truncation = True

    def _say_once(self, notes: list[tuple[str, str]]) -> None:
        for kind, text in notes:
            if kind not in self._said:
                self._said[kind] = text
                logger.warning("%s: %s", self.what, text)
                if self._notes_file is not None:
                    # At once: the file of rows, which comes last, must not be there without it.
                    # Its name is its own, since another run may be encoding the same.
                    unfinished = self._notes_file.with_suffix(f".{uuid4().hex}")
                    unfinished.write_text(json.dumps(self._said))
                    unfinished.replace(self._notes_file)

    def _prepare_row(self, row: int, cells: tuple[Any, ...]) -> "_PreparedRow":
        rng = np.random.default_rng([self.options.seed, row])
        crop_at = tuple(rng.random(2)) if self.options.crop == "random" else (0.5, 0.5)
        flip = self.options.random_flip and bool(rng.random() < 0.5)
        problems, decoded, notes = [], [], []
        for column, cell in zip(self.options.image_columns, cells, strict=True):
            try:
                decoded.append(self.preparation.decode(cell))
            except CellProblem as problem:
                problems.append(f"row {row}, column '{column}': {problem}")
                continue
            changes = self.preparation.notes(decoded[-1])
            notes += [(kind, f"{text} (first in row {row}, column '{column}')") for kind, text in changes.items()]
        samples = [] if problems else [self.preparation.tensor(sample, crop_at, flip) for sample in decoded]
        conditioning = [] if problems else [self.preparation.conditioning(item, crop_at, flip) for item in decoded]
        # Also where they differ only in what is always cut off; with another seed, another crop may show it.
        if (
            len(samples) == 2
            and _alike(*samples)
            and all(torch.equal(one, conditioning[1][name]) for name, one in conditioning[0].items())
            and (self.options.crop == "center" or self.preparation.same(*decoded))
        ):
            names = " and ".join(repr(column) for column in self.options.image_columns)
            problems.append(
                f"row {row}, columns {names}: what is used of them is the same {self.preparation.noun}, so there is "
                "no preference"
            )
        if problems:
            return _PreparedRow(problems, [], [], [])
        return _PreparedRow(problems, samples, conditioning, notes)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for rounding, which is far below a step of 8-bit pixels or 16-bit sound."""
    return bool((one - other).abs().max() < 1e-6)


@dataclass(frozen=True)
class _PreparedRow:
    """One row's samples, of `Preparation.shape`, their conditioning, and notes (kind, text); or only problems."""

    problems: list[str]
    images: list[torch.Tensor]
    conditioning: list[dict[str, torch.Tensor]]
    notes: list[tuple[str, str]]


def _undecoded(
    dataset: Dataset | IterableDataset,
    preparation: Preparation,
    image_columns: tuple[str, ...],
    extra_columns: tuple[str, ...],
) -> Dataset | IterableDataset:
    """The columns needed, samples as bytes or paths, so that decoding errors are ours to explain."""
    dataset = dataset.select_columns(["prompt", *image_columns, *extra_columns])
    # A stream may not know its columns' types before it is read; its cells are then taken as they come.
    if dataset.features is None:
        return dataset
    for column in image_columns:
        wanted = preparation.feature(dataset.features[column])
        if wanted != dataset.features[column]:
            dataset = dataset.cast_column(column, wanted)
    return dataset


def _file_stamps(undecoded: Dataset, image_columns: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """Path, time of change and size of samples in files of their own, which a data set's fingerprint misses.

    Looks at the whole Arrow table, also where the data set is a selection of it: that copies no bytes.
    """
    stamps = []
    for column in image_columns:
        for path in paths_outside(undecoded.data.column(column)):
            if os.path.isfile(path):
                status = os.stat(path)
                stamps.append((path, status.st_mtime_ns, status.st_size))
    return stamps


def latent_shape(
    pipeline: DiffusionPipeline, family: Family, resolution: Resolution = None, num_frames: int | None = None
) -> tuple[int, ...]:
    """Shape of the latents of one sample, found by encoding one: `(C, h, w)`, `(C, f, h, w)` of a clip.

    Args:
        resolution, num_frames: See `EncodingOptions`.

    Raises:
        ValueError: The pipeline cannot take samples of that size.
    """
    return _latent_shape(preparation_for(pipeline, family, resolution, num_frames))


def _latent_shape(preparation: Preparation) -> tuple[int, ...]:
    mean, _ = preparation.family.encode_images(preparation.pipeline, torch.zeros(1, *preparation.shape))
    return tuple(mean.shape[1:])


def uncropped_conditioning(
    pipeline: DiffusionPipeline, family: Family, resolution: Resolution = None, num_frames: int | None = None
) -> dict[str, torch.Tensor]:
    """`Family.image_conditioning` of a sample that was neither resized nor cropped; empty where there is none."""
    return preparation_for(pipeline, family, resolution, num_frames).uncropped_conditioning()


def _image_shapes(preparation: Preparation, image_columns: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the columns that encoding makes of the image columns."""
    if not image_columns:
        return {}
    shapes = dict.fromkeys(latent_columns(image_columns), _latent_shape(preparation))
    for name, tensor in preparation.uncropped_conditioning().items():
        shapes |= {image_conditioning_prefix(column) + name: tuple(tensor.shape) for column in image_columns}
    return shapes


def _encoded(
    undecoded: Dataset | IterableDataset,
    encode: _RowEncoder,
    shapes: dict[str, tuple[int, ...]],
    batch_size: int,
    **caching: Any,
) -> Dataset | IterableDataset:
    """Rows with columns of these shapes; `caching` is for `Dataset.map`."""
    extra = encode.extra_columns
    encoded = undecoded.map(
        encode,
        batched=True,
        with_indices=True,
        batch_size=batch_size,
        remove_columns=["prompt", *encode.options.image_columns, *extra],
        features=array_features(shapes, prompt="string", row="int64", **dict.fromkeys(extra, "float32")),
        **caching,
    )
    return encoded.with_format("torch")


def encode_rows(
    dataset: Dataset,
    pipeline: DiffusionPipeline,
    family: Family,
    options: EncodingOptions,
    *,
    what: str,
    cache_folder: Path,
    batch_size: int,
    extra_columns: tuple[str, ...] = (),
    say: Callable[[str], None] = logger.warning,
) -> Dataset:
    """Encodes every row, or finds it in the cache.

    The cache's key covers the data set, the encoders' weights, the options and nothing else, so that runs that differ
    in learning rate or algorithm share it.

    Args:
        dataset: Columns `prompt` and `options.image_columns`.
        pipeline: Its encoders are used where they are; see `on_device`.
        what: How messages call the data set.
        cache_folder: Holds one Arrow file per key.
        batch_size: Rows per call of the VAE.
        extra_columns: Numeric columns to keep, as float32.
        say: Told what was changed about the samples (sound resampled, say) where the cache has them already.

    Returns:
        Data set of the same length with `prompt` (str), `row` (int64), `latent_columns(options.image_columns)`
        (float32 arrays), what `Family.image_conditioning` gives for each image, in columns that begin with
        `image_conditioning_prefix`, and the extra columns.

    Raises:
        ValueError: A row cannot be used; the message names row and column. The cache then holds nothing. Or the disk
            has no room for the whole.
    """
    # Prompts are cheap to read, so all are checked before hours of encoding.
    check_prompts(list(dataset["prompt"]), list(range(len(dataset))), what)
    encoders = [weights_fingerprint(module) for module in family.encoders(pipeline)]
    images = options.image_columns
    preparation = options.preparation(pipeline, family)
    undecoded = _undecoded(dataset, preparation, images, extra_columns)
    content = [dataset_fingerprint(dataset), _file_stamps(undecoded, images), extra_columns]
    # Without random crops and flips the seed plays no part.
    used = options if options.crop == "random" or options.random_flip else replace(options, seed=0)
    shapes = _image_shapes(preparation, images)
    # What the options leave to the pipeline is in its config, not in its weights.
    samples = [family.modality, preparation.shape, preparation.key, sorted(shapes.items())]
    fingerprint = Hasher.hash([_ENCODING_VERSION, family.pipeline_class, content, encoders, asdict(used), samples])
    file = cache_folder / f"rows-{fingerprint}.arrow"
    check_space(file, len(dataset), shapes, f"{what}, encoded,")
    notes = file.with_suffix(".json")
    if file.exists() and notes.exists():
        for text in json.loads(notes.read_text()).values():
            say(f"{what}: {text}")
    encode = _RowEncoder(preparation, options, what, with_prompts=False, extra_columns=extra_columns, notes_file=notes)
    return _encoded(
        undecoded,
        encode,
        shapes,
        batch_size,
        new_fingerprint=fingerprint,
        cache_file_name=str(file),
        desc=f"Encoding {what}",
    )


def stream_rows(
    dataset: IterableDataset,
    pipeline: DiffusionPipeline,
    family: Family,
    options: EncodingOptions,
    *,
    what: str,
    batch_size: int,
    extra_columns: tuple[str, ...] = (),
) -> IterableDataset:
    """Like `encode_rows` for a streamed data set: encodes whenever rows are read, so the encoders must stay in place.

    Rows carry their prompt's conditioning too, in columns that begin with `CONDITIONING_PREFIX`.
    """
    preparation = options.preparation(pipeline, family)
    shapes = _image_shapes(preparation, options.image_columns)
    for name, tensor in family.encode_unconditional(pipeline).items():
        shapes[CONDITIONING_PREFIX + name] = tuple(tensor.shape[1:])
    undecoded = _undecoded(dataset, preparation, options.image_columns, extra_columns)
    encode = _RowEncoder(preparation, options, what, with_prompts=True, extra_columns=extra_columns)
    return _encoded(undecoded, encode, shapes, batch_size)

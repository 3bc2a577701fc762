"""Samples of stored data sets to shards: what is there already, what has to be encoded, and by which process."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from ..fingerprint import weights_fingerprint
from .bad_rows import RowProblem
from .buckets import assign, bucket_sizes
from .cache import Part, encode_missing, row_bytes, rows_per_shard
from .content import batches, contents_of
from .encoding import PreparedRow, RowEncoder
from .image_shapes import cropping_report, log_cropping, shape_problems
from .layouts import Layout
from .options import EncodingOptions
from .preparation import ImagePreparation, Preparation
from .prompts import text_record
from .shards import ShardedTensors, as_keys, key_of
from .stored import lengths_of_rows


logger = logging.getLogger(__name__)

# Part of the cache's key: raise it when encoded values change for the same inputs.
_ENCODING_VERSION = 7


@dataclass(frozen=True)
class EncodedSamples:
    """The samples of a data set.

    Args:
        shards: Where they are.
        keys: `(N,)`, by which each row is found there.
        buckets: `(N,)`, by which rows go into batches: those of one number have samples, and condition images, of one
            size.
        sizes: By these numbers, height and width of the samples; empty where all rows are alike.
        problems: Rows that cannot be used, and are not there.
    """

    shards: ShardedTensors
    keys: np.ndarray
    buckets: np.ndarray
    sizes: list[tuple[int, int]]
    problems: list[RowProblem]


class SampleEncoder:
    """Encodes the samples of stored data sets.

    Args:
        preparation: Of the size that `options.resolution` asks for.
        layout: The columns.
        cache_folder: Has one folder of shards for each way of encoding.
        batch_size: Rows that the VAE takes at once.

    Attributes:
        sizes: Heights and widths of the buckets; empty without.

    Raises:
        ValueError: Buckets for samples that have none.
    """

    def __init__(
        self,
        preparation: Preparation,
        layout: Layout,
        options: EncodingOptions,
        cache_folder: Path,
        batch_size: int,
    ) -> None:
        self.preparation, self.layout, self.options = preparation, layout, options
        self.pipeline, self.family = preparation.pipeline, preparation.family
        self.cache_folder, self.batch_size = cache_folder, batch_size
        self.sizes = self._bucket_sizes() if options.buckets.enabled else []
        self._encoders: dict[int, RowEncoder] = {}

    def _bucket_sizes(self) -> list[tuple[int, int]]:
        if not isinstance(self.preparation, ImagePreparation):
            raise ValueError(
                f"aspect_ratio_buckets are for images, and {type(self.pipeline).__name__} generates "
                f"{self.preparation.noun}s. Leave it out."
            )
        height, width = self.preparation.size
        if height != width:
            raise ValueError(
                f"aspect_ratio_buckets takes the side of a square as resolution, not {height}x{width}: the sizes of "
                "the buckets follow from it."
            )
        return bucket_sizes(height, self.family.size_step(self.pipeline), self.family.largest_side(self.pipeline))

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample, found by encoding one: `(C, h, w)`, of a video `(C, f, h, w)`; with buckets the square's."""
        mean, _ = self.family.encode_samples(self.pipeline, torch.zeros(1, *self.preparation.shape))
        return tuple(mean.shape[1:])

    def record(self) -> dict[str, Any]:
        """What decides the values, the rows aside, by name, that of the option where there is one; JSON."""
        options, vae, preparation = self.options, self.pipeline.vae, self.preparation
        return {
            "encoding version": _ENCODING_VERSION,
            "pipeline": self.family.pipeline_class,
            "vae": weights_fingerprint(vae),
            "vae's dtype": str(vae.dtype).removeprefix("torch."),
            "cache_dtype": str(options.stored_dtype(vae.dtype)).removeprefix("torch."),
            "latent_sampling": "sample" if options.keep_std else "mean",
            "crop": options.crop,
            "random_flip": options.random_flip,
            # What the options leave to the pipeline is in its config, not in its weights.
            "resolution": [list(size) for size in self.sizes] if self.sizes else list(preparation.shape[1:]),
            "prepared as": [self.family.modality, preparation.shape[0], *preparation.key],
            "samples": [*self.layout.samples, self._per_cell],
            **self._conditions_record(),
        }

    @property
    def _per_cell(self) -> int | str:
        return "several" if self.layout.fewest_per_cell is not None else self.layout.samples_per_cell or 1

    def _conditions_record(self) -> dict[str, Any]:
        record: dict[str, Any] = {"conditions": list(self.layout.conditions)}
        if self.layout.region is not None:
            record["loss_on_mask"] = True
        if not self.layout.conditions:
            return record
        if self.family.own_condition_sizes:
            record["condition images prepared with"] = vars(self.family)
        if self.family.prompts_see_images:
            record["prompts seen with condition images"] = text_record(self.pipeline, self.family)
            record["keep_empty_prompt"] = self.options.keep_empty_prompt
        return record

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of a row to encode it."""
        return (
            *self.layout.media,
            *(("prompt",) if self.layout.conditions and self.family.prompts_see_images else ()),
        )

    def bytes_per_row(self, samples: int | None = None) -> int:
        """Bytes that a row takes on disk, of so many samples in a cell where cells have several numbers of them."""
        of_sample = {name: tuple(tensor.shape) for name, tensor in self.preparation.uncropped_conditioning().items()}
        conditions = self.layout.condition_shapes(self.pipeline, self.family, self.preparation.shape, all_of_cell=True)
        layout = self.layout if samples is None else replace(self.layout, samples_per_cell=samples)
        options: Any = {"layout": layout, "options": self.options, "encoder": self.pipeline.vae.dtype}
        return row_bytes(self.latent_shape, of_sample, conditions, **options)

    def encode(self, undecoded: Dataset, label: str, bad: Sequence[int], found_bad: bool) -> EncodedSamples:
        """Encodes the rows that are not in the cache, with all processes.

        With `on_bad_row="raise"` nothing more is encoded once there is a row that cannot be used; the other rows are
        decoded, so that one run names all of them.

        Args:
            undecoded: Samples as bytes or paths.
            label: How messages call the data set.
            bad: Rows that cannot be used for another reason.
            found_bad: Whether there are such rows, also among those that are not in `undecoded`.
        """
        is_image, count = isinstance(self.preparation, ImagePreparation), len(undecoded)
        own_sizes = bool(self.layout.conditions) and self.family.own_condition_sizes
        wanted: Literal["none", "local", "all"] = "all" if self.sizes or own_sizes else "local" if is_image else "none"
        contents = contents_of(undecoded, self.layout, label, self.cache_folder, sizes=wanted)
        problems, lengths = list(contents.problems), lengths_of_rows(undecoded, self.layout, label)
        if is_image:
            several = self.options.buckets if self.sizes else None
            problems += shape_problems(contents.sizes, self.layout, self.options.bad_rows, several, lengths)
        good = np.setdiff1d(np.arange(count), [*bad, *(problem.row for problem in problems)])
        buckets = np.zeros(count, dtype=np.int16)
        if self.sizes:
            of_samples = contents.sizes[:, : self.layout.num_samples]
            # Where a row has fewer, its first one stands in.
            missing = np.arange(self.layout.num_samples) >= lengths[:, None]
            of_samples = np.where(missing[:, :, None], of_samples[:, :1], of_samples)
            known = good[(of_samples[good] > 0).all(axis=(1, 2))]
            buckets[known] = assign(of_samples[known], self.sizes)
        reported = None
        if isinstance(self.preparation, ImagePreparation):
            shapes = self.sizes or [self.preparation.size]
            cropped = contents.sizes[good, : self.layout.num_samples] if own_sizes else contents.sizes[good]
            reported = cropping_report(cropped, buckets[good], shapes)
            if reported is not None:
                log_cropping(reported, label)
        keys = self._row_keys(contents.keys, buckets, undecoded)
        sizes, of_samples_alone = self.sizes, buckets
        if own_sizes:
            first = self.layout.num_samples
            of_conditions = contents.sizes[:, first : first + len(self.layout.condition_names)]
            buckets, sizes = self._by_condition_sizes(of_conditions, buckets, good)
        if self.layout.fewest_per_cell is not None:
            buckets, sizes = self._by_length(lengths, buckets, sizes, good)
        shards = ShardedTensors(self.cache_folder / f"samples-{key_of(self.record()).hex()}")
        policy = self.options.bad_rows
        stop = policy.on_bad_row == "raise"
        if (stop and found_bad) or any(map(policy.stops, problems)):
            missing = good[shards.locate(keys[good])[:, 0] < 0]
            found = self._problems_of(undecoded, missing, of_samples_alone)
        else:
            mean = (
                round(float(lengths[good].mean())) if self.layout.fewest_per_cell is not None and len(good) else None
            )
            bytes_per_row = self.bytes_per_row(mean)
            size = rows_per_shard(bytes_per_row, self.batch_size)
            share = _ShardEncoder(self, undecoded, of_samples_alone, stop=stop)
            options: dict[str, Any] = {"label": label, "bytes_per_row": bytes_per_row}
            found = encode_missing(
                shards, keys, good, lambda rows: _one_bucket_each(rows, buckets, size), share.encode, **options
            )
        problems += found
        places = shards.locate(keys[good])
        for kind, note in shards.notes(places[places[:, 0] >= 0]).items():
            # The report has counted it already where all sizes are known.
            if kind != "crop" or reported is None or reported.unknown:
                logger.warning("%s: %s", label, note)
        return EncodedSamples(shards, keys, buckets, sizes, problems)

    def _by_condition_sizes(
        self, sizes: np.ndarray, buckets: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Buckets divided by the sizes that condition images are brought to, and the size of the samples in each.

        Args:
            sizes: `(N, M, 2)`, widths and heights of the condition images; 0 where a row has no more, or where nobody
                knows, and then decoding will say why.
            buckets: `(N,)`, of the samples.
            rows: Those that can be used.
        """
        kinds, of_row = np.unique(
            np.concatenate([buckets[rows, None], sizes[rows].reshape(len(rows), -1)], axis=1),
            axis=0,
            return_inverse=True,
        )
        numbers: dict[tuple, int] = {}
        shapes = []
        for bucket, *flat in kinds.tolist():
            known = [(height, width) for width, height in zip(flat[::2], flat[1::2], strict=True) if width and height]
            prepared = [self.family.condition_size(self.pipeline, size, len(known)) for size in known]
            shapes.append(numbers.setdefault((bucket, *prepared), len(numbers)))
        divided = np.zeros(len(buckets), dtype=np.int32)
        divided[rows] = np.asarray(shapes, dtype=np.int32)[of_row.reshape(-1)] if len(rows) else 0
        if len(numbers) == 1 and not self.sizes:
            return divided, []
        height, width = self.preparation.shape[-2:]
        return divided, [self.sizes[bucket] if self.sizes else (height, width) for bucket, *_ in numbers]

    def _by_length(
        self, lengths: np.ndarray, buckets: np.ndarray, sizes: list[tuple[int, int]], rows: np.ndarray
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Buckets divided by the number of samples of their rows, and the size of the samples in each, if there are
        several sizes."""
        kinds, of_row = np.unique(np.stack([buckets[rows], lengths[rows]], axis=1), axis=0, return_inverse=True)
        divided = np.zeros(len(buckets), dtype=np.int32)
        divided[rows] = of_row.reshape(-1)
        return divided, [sizes[bucket] for bucket, _ in kinds.tolist()] if sizes else []

    def _row_keys(self, contents: np.ndarray, buckets: np.ndarray, undecoded: Dataset) -> np.ndarray:
        """Of each row: its content, its size with buckets, its draws where there are any, and a seen prompt."""
        prompts = undecoded["prompt"] if "prompt" in self.columns else None
        if not (self.sizes or self.options.draws or prompts is not None):
            return contents
        sizes = [self.sizes[bucket] if self.sizes else () for bucket in buckets.tolist()]
        draws = [[self.options.seed, row] if self.options.draws else [] for row in range(len(contents))]
        texts = [[]] * len(contents) if prompts is None else [[prompt] for prompt in prompts]
        parts = zip(contents, sizes, draws, texts, strict=True)
        return as_keys(key_of(content.tobytes(), size, draw, *text) for content, size, draw, text in parts)

    def row_encoder(self, bucket: int) -> RowEncoder:
        """Encodes rows of one size."""
        if bucket not in self._encoders:
            preparation = self.preparation.at(self.sizes[bucket]) if self.sizes else self.preparation
            self._encoders[bucket] = RowEncoder(preparation, self.layout, self.options)
        return self._encoders[bucket]

    def _problems_of(self, undecoded: Dataset, rows: np.ndarray, buckets: np.ndarray) -> list[RowProblem]:
        """Decodes rows, all processes their share, and returns what all found."""
        state = PartialState()
        share = _ShardEncoder(self, undecoded, buckets, stop=True)
        share.stopped = True
        parts = _one_bucket_each(rows[state.process_index :: state.num_processes], buckets, len(undecoded))
        return gather_object([problem for part in parts for problem in share.encode(part).problems])


def _one_bucket_each(rows: np.ndarray, buckets: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows divided into parts of one bucket and at most `size` rows each."""
    parts = []
    for bucket in np.unique(buckets[rows]):
        members = rows[buckets[rows] == bucket]
        parts += [members[start : start + size] for start in range(0, len(members), size)]
    return parts


class _ShardEncoder:
    """Encodes the rows of one shard after the other; a batch is decoded while the one before is encoded.

    Args:
        stop: Whether rows are only decoded once there was one that cannot be used.
    """

    def __init__(self, encoder: SampleEncoder, undecoded: Dataset, buckets: np.ndarray, *, stop: bool) -> None:
        self.encoder, self.undecoded, self.buckets, self.stop = encoder, undecoded, buckets, stop
        self.stopped = False

    def encode(self, rows: np.ndarray) -> Part:
        """The part of one shard, whose rows have one size."""
        row_encoder, part = self.encoder.row_encoder(int(self.buckets[rows[0]])), Part(rows[:0], [])
        read = batches(self.undecoded, self.encoder.columns, rows.tolist(), self.encoder.batch_size)
        encoded: list[int] = []
        with ThreadPoolExecutor(max_workers=4) as pool, ThreadPoolExecutor(max_workers=1) as ahead:

            def prepare() -> list[PreparedRow]:
                cells, numbers = next(read, ([], []))
                return row_encoder.prepare(pool, numbers, cells)

            upcoming = ahead.submit(prepare)
            while prepared := upcoming.result():
                upcoming = ahead.submit(prepare)
                problems = [problem for row in prepared for problem in row.problems]
                good = [row for row in prepared if not row.problems]
                self.stopped |= self.stop and bool(problems)
                if good and not self.stopped:
                    tensors, unusable = row_encoder.encode(good)
                    self.stopped |= self.stop and bool(unusable)
                    problems += unusable
                    wrong = {problem.row for problem in unusable}
                    for row, values in zip(good, tensors, strict=True):
                        if row.row not in wrong:
                            encoded.append(row.row)
                            part.tensors.append(values)
                            part.notes = row.notes | part.notes
                part.problems += problems
        if self.stopped:
            # A shard is written with all of its rows or not at all.
            return Part(rows[:0], [], problems=part.problems)
        part.rows = np.asarray(encoded, dtype=np.int64)
        return part

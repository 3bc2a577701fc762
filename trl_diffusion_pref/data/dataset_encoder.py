"""Encodes data sets once, samples to latent posteriors and prompts to embeddings; and streams as they are read."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from xxhash import xxh3_128

from ..families import Family
from .batch import Collator
from .cells import captions_of, prompt_problems, scalar_problems
from .encoded import LIBRARIES, EncodedDataset
from .encoders import Encoders
from .layouts import Layout, column_names, labelled_datasets
from .options import EncodingOptions
from .pair_source import RowSource
from .preparation import preparation_for
from .prompts import PromptTable, encode_prompt_table, truncation_report
from .samples import EncodedSamples, SampleEncoder
from .shards import key_of
from .stored import list_lengths
from .streams import EncodedStream


logger = logging.getLogger(__name__)

# Rows whose captions are read at once.
_READ_AT_ONCE = 1000


class DatasetEncoder:
    """Encodes data sets for a pipeline.

    Args:
        layout: The columns to encode.
        encoders: Of the pipeline. Default: they stay where they are.
        cache_folder: Has one folder of shards for each way of encoding.
        batch_size: Rows that the VAE, and prompts that the text encoders, take at once.

    Raises:
        ValueError: An option that samples of this kind do not have, or a size that the model cannot take.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        family: Family,
        layout: Layout,
        options: EncodingOptions,
        *,
        cache_folder: Path,
        batch_size: int,
        encoders: Encoders | None = None,
    ) -> None:
        self.encoders = encoders or Encoders(pipeline, family)
        self.pipeline, self.family, self.layout, self.options = pipeline, family, layout, options
        self.cache_folder, self.batch_size = cache_folder, batch_size
        self.preparation = preparation_for(
            pipeline, family, options.resolution, options.num_frames, cropped_or_mirrored=options.draws
        )
        self.samples = SampleEncoder(self.preparation, layout, options, cache_folder, batch_size)
        self._prompts: PromptTable | None = None

    # ---- What trainers ask ---------------------------------------------------------------------------------------

    @property
    def prompts(self) -> PromptTable:
        """Embeddings of all prompts so far, the empty one among them."""
        if self._prompts is None:
            with self.encoders.present():
                self.add_prompts([])
        assert self._prompts is not None
        return self._prompts

    @cached_property
    def empty_prompt(self) -> dict[str, torch.Tensor]:
        """The unconditional side's conditioning, `(1, ...)` float32."""
        return {name: tensor.float() for name, tensor in self.prompts([""]).items()}

    # Algorithms ask in every step, when the encoders may be out of memory and would be read again each time.
    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample: `(C, h, w)`, of a video `(C, f, h, w)`; with aspect-ratio buckets the square's."""
        with self.encoders.present():
            return self.samples.latent_shape

    def latent_shapes(self) -> list[tuple[int, ...]]:
        """Of one sample in each bucket; none without buckets."""
        shapes = []
        for size in self.samples.sizes:
            preparation = self.preparation.at(size)
            shapes.append(self.family.latent_shape(self.pipeline, preparation.shape))
        return shapes

    @cached_property
    def uncropped_conditioning(self) -> dict[str, torch.Tensor]:
        """Conditioning on the preparation of a sample that was neither resized, nor cropped, nor padded."""
        with self.encoders.present():
            return self.preparation.uncropped_conditioning()

    @property
    def own_prompts(self) -> bool:
        """Whether rows have the conditioning on their own prompts, since the text encoder sees their images."""
        return bool(self.layout.conditions) and self.family.prompts_see_images

    @property
    def collator(self) -> Collator:
        return Collator(self.prompts)

    def encode_all(
        self,
        train_dataset: Any,
        eval_dataset: Any,
        device: torch.device,
        sources: Mapping[str, RowSource] | None = None,
    ) -> tuple[Any, Any]:
        """A training data set, and none, one or several by name for evaluation, encoded on a device.

        The encoders are then back where they were, except where a stream needs them on the device.

        Args:
            sources: What rows were made of, if they are not the data set's own, by what messages call it.
        """
        sources = sources or {}
        evaluation = dict(labelled_datasets(eval_dataset))
        everything = [dataset for dataset in (train_dataset, *evaluation.values()) if dataset is not None]
        if all(map(self.is_encoded, everything)):
            return train_dataset, eval_dataset
        if any(isinstance(dataset, IterableDataset) for dataset in everything):
            self.encoders.stay_on(device)
        with self.encoders.on_device(device):
            # Now, since afterwards the VAE is on a CPU, where one video takes minutes.
            self.latent_shape  # noqa: B018
            self.add_prompts([dataset for dataset in everything if isinstance(dataset, Dataset)])
            encoded_train = None
            if train_dataset is not None:
                encoded_train = self.encode(train_dataset, "train_dataset", sources.get("train_dataset"))
            encoded = [self.encode(dataset, label, sources.get(label)) for label, dataset in evaluation.items()]
        if isinstance(eval_dataset, dict):
            return encoded_train, dict(zip(eval_dataset, encoded, strict=True))
        return encoded_train, encoded[0] if encoded else None

    def is_encoded(self, dataset: Any) -> bool:
        """Whether a data set was encoded, or taken in, by this encoder."""
        if isinstance(dataset, EncodedDataset):
            return dataset.prompts is self._prompts
        return isinstance(dataset, EncodedStream)

    def add_prompts(self, datasets: Sequence[Dataset]) -> None:
        """Encodes the prompts of stored data sets that are not in the table yet; warns of those that are cut off."""
        known = self._prompts
        cells = (cell for dataset in datasets for cell in dataset["prompt"])
        # Each once as it is read: a million rows may have a hundred thousand prompts.
        prompts = list(dict.fromkeys(prompt for cell in cells for prompt in captions_of(cell)))
        if known is not None:
            prompts = [prompt for prompt in prompts if prompt not in known]
            if not prompts:
                return
        report = truncation_report(prompts, self.pipeline, self.family)
        if report:
            logger.warning(report)
        if self.own_prompts:
            prompts = []
        table = encode_prompt_table(
            prompts,
            self.pipeline,
            self.family,
            cache_folder=self.cache_folder,
            batch_size=self.batch_size,
            options=self.options,
        )
        if known is None:
            self._prompts = table
        else:
            known.absorb(table)

    # ---- Encoding ------------------------------------------------------------------------------------------------

    def encode(self, dataset: Any, label: str, source: RowSource | None = None) -> Any:
        """Encodes every row, or finds it in the cache; a stream is encoded whenever its rows are read.

        A row is found by the content of its samples, whatever its position and its other columns are. What else
        decides the values is in the name of the folder: the VAE's weights and the options.

        Args:
            dataset: With the layout's columns; or one that is encoded, perhaps on another machine, which must fit.
            label: How messages call the data set.
            source: What its rows were made of, if they are not the user's own.

        Raises:
            ValueError: Rows cannot be used; the message names the first ten by row and column, and counts them by
                kind. Or the disk has no room for the whole. Or the data set was encoded for something else; the
                message says what differs.
        """
        if self.is_encoded(dataset):
            return dataset
        if isinstance(dataset, EncodedDataset):
            return self._taken_in(dataset, label)
        scalars = self.layout.scalars_of(column_names(dataset))
        undecoded = self._undecoded(dataset, scalars)
        if isinstance(dataset, IterableDataset):
            if self.samples.sizes:
                raise ValueError(
                    f"{label} is streamed, and a batch of a stream has images of any shape. Set "
                    "aspect_ratio_buckets=False, or encode the data first, without streaming=True."
                )
            return EncodedStream(undecoded, self.samples.row_encoder(0), label, scalars)
        # Prompts and numbers are cheap to read, so all are checked before hours of encoding.
        problems, count, samples = prompt_problems(dataset["prompt"]), len(dataset), None
        several = bool(scalars) and self.layout.fewest_per_cell is not None
        lengths = list_lengths(dataset, self.layout.samples[0], label) if several else None
        problems += scalar_problems({name: dataset[name] for name in scalars}, self.layout, lengths)
        if self.layout.places:
            other = [*problems, *(source.problems if source is not None else ())]
            stops = any(map(self.options.bad_rows.stops, other))
            samples = self.samples.encode(undecoded, label, [problem.row for problem in problems], stops)
            problems += samples.problems
        if source is None:
            left_out = self.options.bad_rows.apply(problems, count, label)
        else:
            left_out = self.options.bad_rows.apply(source.all_problems(problems), source.rows, label)
        good = np.setdiff1d(np.arange(count), [problem.row for problem in problems])
        if not len(good):
            raise ValueError(f"{label}: none of its {count} pairs is left to use.")
        return self._assembled(dataset, good, samples, scalars, left_out)

    def _assembled(
        self,
        dataset: Dataset,
        good: np.ndarray,
        samples: EncodedSamples | None,
        scalars: Sequence[str],
        left_out: dict[str, int],
    ) -> EncodedDataset:
        numbers, first_captions, content = self._captions(dataset, good)
        # Others may have no numbers there.
        kept = dataset.select(good) if scalars and len(good) < len(dataset) else dataset
        columns = {name: self._numbers(kept[name]) for name in scalars}
        record = self.record()
        parts: list[Any] = [good.tobytes(), content, record]
        parts += [part for name, column in sorted(columns.items()) for part in (name, column.tobytes())]
        places, buckets = np.zeros((len(good), 2), dtype=np.int32), np.zeros(len(good), dtype=np.int16)
        if samples is not None:
            parts.append(samples.keys[good].tobytes())
            places, buckets = samples.shards.locate(samples.keys[good]), samples.buckets[good]
            if (places < 0).any():
                lost = good[int(np.argmin(places[:, 0]))]
                raise RuntimeError(
                    f"row {lost} was encoded, and is not in {samples.shards.folder}. Was a file removed meanwhile? "
                    "Run again, and what is missing is encoded."
                )
        return EncodedDataset(
            rows=good,
            samples=None if samples is None else samples.shards,
            places=places,
            prompts=self.prompts,
            captions=numbers,
            first_captions=first_captions,
            scalars=columns,
            buckets=buckets,
            sizes=[] if samples is None else samples.sizes,
            record=record,
            fingerprint=key_of(*parts).hex(),
            left_out=left_out,
            seed=self.options.seed,
        )

    def _numbers(self, cells: Sequence[Any]) -> np.ndarray:
        """A column of numbers, `(N,)` or `(N, S)` float32; NaN where a row has fewer than S samples."""
        if self.layout.fewest_per_cell is None:
            return np.asarray(cells, dtype=np.float32)
        numbers = np.full((len(cells), self.layout.num_samples), np.nan, dtype=np.float32)
        for row, cell in enumerate(cells):
            numbers[row, : len(cell)] = cell
        return numbers

    def record(self) -> dict[str, Any]:
        """What decides the values of rows, the data aside, by name; JSON."""
        samples = self.samples.record() if self.layout.places else {"samples": [], "conditions": []}
        pairs = {} if self.options.pairs is None else asdict(self.options.pairs)
        # Which columns were read does not matter any more, and the seed is that of the noise.
        left_out = ("column_map",) if pairs.get("label_noise") else ("column_map", "seed")
        pairs = {name: value for name, value in pairs.items() if name not in left_out}
        return {"pipeline": self.family.pipeline_class, "prompts": self.prompts.record, **samples, "pairs": pairs}

    def _captions(self, dataset: Dataset, good: np.ndarray) -> tuple[np.ndarray, np.ndarray, bytes]:
        """Numbers of the rows' captions, where each row's begin, and a digest of them all."""
        numbers, counts, content = [self.prompts.numbers([])], [np.zeros(1, dtype=np.int64)], xxh3_128()
        prompts = dataset.select_columns("prompt")
        for start in range(0, len(good), _READ_AT_ONCE):
            rows = [captions_of(cell) for cell in prompts[good[start : start + _READ_AT_ONCE].tolist()]["prompt"]]
            content.update(json.dumps(rows).encode())
            # The table has the empty prompt alone where rows have the conditioning on their own.
            known = [["" for _ in row] for row in rows] if self.own_prompts else rows
            numbers.append(self.prompts.numbers([caption for row in known for caption in row]))
            counts.append(np.asarray([len(row) for row in rows], dtype=np.int64))
        return np.concatenate(numbers), np.cumsum(np.concatenate(counts)), content.digest()

    def _taken_in(self, dataset: EncodedDataset, label: str) -> EncodedDataset:
        """An encoded data set that fits, with the prompts of this encoder's table.

        Raises:
            ValueError: It does not fit; the message says what differs.
        """
        dataset.check_fits(self.record(), label, required=self.layout.scalars)
        self._check_versions(dataset, label)
        self.prompts.absorb(dataset.prompts)
        captions = self.prompts.numbers(dataset.prompts.texts)[dataset.captions]
        return replace(dataset, prompts=self.prompts, captions=captions, seed=self.options.seed)

    def _check_versions(self, dataset: EncodedDataset, label: str) -> None:
        """Raises where other versions of the libraries give other embeddings, by encoding a few prompts once more.

        Raises:
            ValueError: They do.
        """
        own, made = self.prompts.record, dataset.prompts.record
        other = [f"{name} {made[name]}" for name in LIBRARIES if made[name] != own[name]]
        if not other:
            return
        texts = [text for text in dataset.prompts.texts if text][:4]
        if names := dataset.prompts.differs_from(texts, self.pipeline, self.family):
            raise ValueError(
                f"The prompts of {label} were encoded with {' and '.join(other)}, and the installed versions give "
                f"other {' and '.join(names)}. Install those versions, or encode the data set again."
            )

    def _undecoded(self, dataset: Any, scalars: Sequence[str]) -> Any:
        """The columns needed, samples as bytes or paths, so that decoding errors are ours to explain."""
        media = self.layout.media
        dataset = dataset.select_columns(["prompt", *media, *scalars])
        # A stream may not know its columns' types before it is read; its cells are then taken as they come.
        for column in media if dataset.features is not None else ():
            wanted = self.preparation.feature(dataset.features[column])
            if wanted != dataset.features[column]:
                dataset = dataset.cast_column(column, wanted)
        return dataset

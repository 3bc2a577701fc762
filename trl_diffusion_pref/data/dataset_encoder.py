"""Encodes data sets once, samples to latent posteriors and prompts to embeddings; and streams as they are read."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline

from ..families import Family
from .batch import Collator
from .encoded import EncodedDataset
from .layouts import Layout, captions_of, column_names, labelled_datasets, prompt_problems
from .options import EncodingOptions
from .preparation import preparation_for
from .prompts import PromptTable, encode_prompt_table, truncation_report
from .samples import EncodedSamples, SampleEncoder
from .shards import key_of
from .streams import EncodedStream


logger = logging.getLogger(__name__)


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


class DatasetEncoder:
    """Encodes data sets for a pipeline; its encoders are used where they are, see `on_device`.

    Args:
        layout: The columns to encode.
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
    ) -> None:
        self.pipeline, self.family, self.layout, self.options = pipeline, family, layout, options
        self.cache_folder, self.batch_size = cache_folder, batch_size
        self.preparation = preparation_for(
            pipeline, family, options.resolution, options.num_frames, cropped_or_mirrored=options.draws
        )
        self.samples = SampleEncoder(self.preparation, layout, options, cache_folder, batch_size)
        self._prompts: PromptTable | None = None
        # Whether a data set is encoded as it is read, for which the encoders must stay where they are.
        self.streams = False

    # ---- What trainers ask ---------------------------------------------------------------------------------------

    @property
    def prompts(self) -> PromptTable:
        """Embeddings of all prompts so far, the empty one among them."""
        if self._prompts is None:
            self.add_prompts([])
        assert self._prompts is not None
        return self._prompts

    @cached_property
    def empty_prompt(self) -> dict[str, torch.Tensor]:
        """The unconditional side's conditioning, `(1, ...)` float32."""
        return {name: tensor.float() for name, tensor in self.prompts([""]).items()}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample: `(C, h, w)`, of a video `(C, f, h, w)`; with aspect-ratio buckets the square's."""
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
        return self.preparation.uncropped_conditioning()

    @property
    def collator(self) -> Collator:
        return Collator(self.prompts)

    def encode_all(self, train_dataset: Any, eval_dataset: Any, device: torch.device) -> tuple[Any, Any]:
        """A training data set, and none, one or several by name for evaluation, encoded on a device.

        The encoders are then back where they were, except where a stream needs them on the device.
        """
        evaluation = dict(labelled_datasets(eval_dataset))
        everything = [dataset for dataset in (train_dataset, *evaluation.values()) if dataset is not None]
        if all(isinstance(dataset, EncodedDataset | EncodedStream) for dataset in everything):
            return train_dataset, eval_dataset
        if any(isinstance(dataset, IterableDataset) for dataset in everything):
            self.streams = True
            self.move_encoders(device)
        with on_device(self.pipeline, self.family, device):
            # Now, since afterwards the VAE is on a CPU, where one video takes minutes.
            self.latent_shape  # noqa: B018
            self.add_prompts([dataset for dataset in everything if isinstance(dataset, Dataset)])
            encoded_train = None if train_dataset is None else self.encode(train_dataset, "train_dataset")
            encoded = [self.encode(dataset, label) for label, dataset in evaluation.items()]
        if isinstance(eval_dataset, dict):
            return encoded_train, dict(zip(eval_dataset, encoded, strict=True))
        return encoded_train, encoded[0] if encoded else None

    def move_encoders(self, device: torch.device) -> None:
        """Moves the encoders, in evaluation mode."""
        for encoder in self.family.encoders(self.pipeline):
            encoder.to(device).eval()

    def add_prompts(self, datasets: Sequence[Dataset]) -> None:
        """Encodes the prompts of stored data sets that are not in the table yet; warns of those that are cut off."""
        prompts = [prompt for dataset in datasets for cell in dataset["prompt"] for prompt in captions_of(cell)]
        known = self._prompts
        if known is not None:
            prompts = [prompt for prompt in prompts if prompt not in known]
            if not prompts:
                return
        report = truncation_report(prompts, self.pipeline, self.family)
        if report:
            logger.warning(report)
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
            known.add(prompts)

    # ---- Encoding ------------------------------------------------------------------------------------------------

    def encode(self, dataset: Any, label: str) -> Any:
        """Encodes every row, or finds it in the cache; a stream is encoded whenever its rows are read.

        A row is found by the content of its samples, whatever its position and its other columns are. What else
        decides the values is in the name of the folder: the VAE's weights and the options.

        Args:
            dataset: With the layout's columns. One that is encoded is returned as it is.
            label: How messages call the data set.

        Raises:
            ValueError: Rows cannot be used; the message names the first ten by row and column, and counts them by
                kind. Or the disk has no room for the whole.
        """
        if isinstance(dataset, EncodedDataset | EncodedStream):
            return dataset
        scalars = self.layout.scalars_of(column_names(dataset))
        undecoded = self._undecoded(dataset, scalars)
        if isinstance(dataset, IterableDataset):
            if self.samples.sizes:
                raise ValueError(
                    f"{label} is streamed, and a batch of a stream has images of any shape. Set "
                    "aspect_ratio_buckets=False, or encode the data first, without streaming=True."
                )
            return EncodedStream(undecoded, self.samples.row_encoder(0), label, scalars)
        # Prompts are cheap to read, so all are checked before hours of encoding.
        problems, count, samples = prompt_problems(dataset["prompt"]), len(dataset), None
        if self.layout.places:
            samples = self.samples.encode(undecoded, label, [problem.row for problem in problems])
            problems += samples.problems
        left_out = self.options.bad_rows.apply(problems, count, label)
        good = np.setdiff1d(np.arange(count), [problem.row for problem in problems])
        return self._assembled(dataset, good, samples, scalars, left_out)

    def _assembled(
        self,
        dataset: Dataset,
        good: np.ndarray,
        samples: EncodedSamples | None,
        scalars: Sequence[str],
        left_out: dict[str, int],
    ) -> EncodedDataset:
        prompts = dataset["prompt"]
        captions = [captions_of(prompts[row]) for row in good.tolist()]
        numbers = self.prompts.numbers([caption for row in captions for caption in row])
        columns = {name: np.asarray(dataset[name], dtype=np.float32)[good] for name in scalars}
        record: dict[str, Any] = {"pipeline": self.family.pipeline_class, "prompts": self.prompts.encoded_with}
        parts: list[Any] = [good.tobytes(), captions]
        parts += [part for name, column in sorted(columns.items()) for part in (name, column.tobytes())]
        places, buckets = np.zeros((len(good), 2), dtype=np.int32), np.zeros(len(good), dtype=np.int16)
        if samples is not None:
            record |= self.samples.record()
            parts.append(samples.keys[good].tobytes())
            places, buckets = samples.shards.locate(samples.keys[good]), samples.buckets[good]
        return EncodedDataset(
            rows=good,
            samples=None if samples is None else samples.shards,
            places=places,
            prompts=self.prompts,
            captions=numbers,
            first_captions=np.cumsum([0, *map(len, captions)]),
            scalars=columns,
            buckets=buckets,
            sizes=self.samples.sizes,
            record=record,
            fingerprint=key_of(*parts, record).hex(),
            left_out=left_out,
            seed=self.options.seed,
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

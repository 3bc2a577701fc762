"""Encodes data sets once, samples to latent posteriors and prompts to embeddings; and streams as they are read."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from diffusers import DiffusionPipeline

from ..families import Family
from ..fingerprint import weights_fingerprint
from .batch import CONDITION, MEAN, PROMPT, SAMPLE, SCALAR, STD, Collator
from .cache import array_features, check_space
from .decode.cell import paths_outside
from .encoding import BadRows, EncodingOptions, RowEncoder
from .layouts import (
    Layout,
    column_names,
    dataset_fingerprint,
    labelled_datasets,
    prompt_problems,
    raise_row_problems,
)
from .preparation import preparation_for
from .prompts import PromptTable, encode_prompt_table, truncation_report


logger = logging.getLogger(__name__)

# Part of the cache's key: raise it when encoded values change for the same inputs.
_ENCODING_VERSION = 5


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
        cache_folder: Holds one Arrow file per key for rows, and one for prompts.
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
        self._made: set[str] = set()  # fingerprints of the data sets that `encode` returned
        self.preparation = preparation_for(
            pipeline, family, options.resolution, options.num_frames, cropped_or_mirrored=options.draws
        )
        self._prompts: PromptTable | None = None
        # Whether a data set is encoded as it is read, for which the encoders must stay where they are.
        self.streams = False

    # ---- What trainers ask ---------------------------------------------------------------------------------------

    @property
    def prompts(self) -> PromptTable:
        """Embeddings of all prompts so far, the empty one among them."""
        if self._prompts is None:
            self._prompts = self._encoded_prompts([])
        return self._prompts

    @cached_property
    def empty_prompt(self) -> dict[str, torch.Tensor]:
        """The unconditional side's conditioning, `(1, ...)`."""
        return self.prompts([""])

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample, found by encoding one: `(C, h, w)`, of a video `(C, f, h, w)`."""
        mean, _ = self.family.encode_samples(self.pipeline, torch.zeros(1, *self.preparation.shape))
        return tuple(mean.shape[1:])

    @cached_property
    def uncropped_conditioning(self) -> dict[str, torch.Tensor]:
        """Conditioning on the preparation of a sample that was neither resized, nor cropped, nor padded."""
        return self.preparation.uncropped_conditioning()

    @property
    def collator(self) -> Collator:
        return Collator(self.prompts)

    def is_encoded(self, dataset: Dataset | IterableDataset) -> bool:
        """Whether a data set came out of `encode`."""
        if not self.layout.samples and isinstance(dataset, Dataset):
            # Columns do not tell: a user's data set may have a column `row` too.
            return dataset_fingerprint(dataset) in self._made
        return {MEAN, STD} <= set(dataset.column_names or ())

    def encode_all(self, train_dataset: Any, eval_dataset: Any, device: torch.device) -> tuple[Any, Any]:
        """A training data set, and none, one or several by name for evaluation, encoded on a device.

        The encoders are then back where they were, except where a stream needs them on the device.
        """
        evaluation = dict(labelled_datasets(eval_dataset))
        everything = [dataset for dataset in (train_dataset, *evaluation.values()) if dataset is not None]
        if all(map(self.is_encoded, everything)):
            return train_dataset, eval_dataset
        if any(isinstance(dataset, IterableDataset) for dataset in everything):
            self.streams = True
            self.move_encoders(device)
        with on_device(self.pipeline, self.family, device):
            # Now, since afterwards the VAE is on a CPU, where one video takes minutes.
            self.latent_shape  # noqa: B018
            self.add_prompts(everything)
            encoded_train = None if train_dataset is None else self.encode(train_dataset, "train_dataset")
            encoded = [
                dataset if self.is_encoded(dataset) else self.encode(dataset, label)
                for label, dataset in evaluation.items()
            ]
        if isinstance(eval_dataset, dict):
            return encoded_train, dict(zip(eval_dataset, encoded, strict=True))
        return encoded_train, encoded[0] if encoded else None

    def move_encoders(self, device: torch.device) -> None:
        """Moves the encoders, in evaluation mode."""
        for encoder in self.family.encoders(self.pipeline):
            encoder.to(device).eval()

    def add_prompts(self, datasets: Sequence[Dataset | IterableDataset]) -> None:
        """Encodes the prompts of stored data sets that are not in the table yet; warns of those that are cut off."""
        prompts: list[str] = []
        for dataset in datasets:
            if isinstance(dataset, Dataset):
                prompts += [prompt for prompt in dataset["prompt"] if isinstance(prompt, str)]
        known = self._prompts
        if known is not None:
            prompts = [prompt for prompt in prompts if prompt not in known]
            if not prompts:
                return
        report = truncation_report(prompts, self.pipeline, self.family)
        if report:
            logger.warning(report)
        table = self._encoded_prompts(prompts)
        if known is None:
            self._prompts = table
        else:
            known.add(table)

    def _encoded_prompts(self, prompts: Sequence[str]) -> PromptTable:
        return encode_prompt_table(
            prompts, self.pipeline, self.family, cache_folder=self.cache_folder, batch_size=self.batch_size
        )

    # ---- Encoding ------------------------------------------------------------------------------------------------

    def encode(self, dataset: Dataset | IterableDataset, label: str) -> Dataset | IterableDataset:
        """Encodes every row, or finds it in the cache; a stream is encoded whenever its rows are read.

        There is one Arrow table and one cache key for each shape of samples. The key covers the data set, the
        encoders' weights, the options and nothing else, so that runs that differ in learning rate or algorithm share
        it.

        Args:
            dataset: With the layout's columns.
            label: How messages call the data set.

        Returns:
            Rows with `prompt` (str), `row` (int64), and float32 arrays: `latents/mean` and `latents/std` `(S, ...)`,
            and columns that begin with `sample/`, `condition/` and `scalar/` as in `Batch`. Rows of a stream carry
            their prompt's conditioning too, in columns that begin with `prompt/`.

        Raises:
            ValueError: Rows cannot be used; the message names the first ten by row and column, and counts the others.
                Or the disk has no room for the whole.
        """
        scalars = self.layout.scalars_of(column_names(dataset))
        shapes = self._shapes(scalars)
        undecoded = self._undecoded(dataset, scalars)
        if isinstance(dataset, IterableDataset):
            for name, tensor in self.family.encode_unconditional(self.pipeline).items():
                shapes[PROMPT + name] = tuple(tensor.shape[1:])
            return self._mapped(undecoded, self._row_encoder(label, scalars, with_prompts=True), shapes)
        # Prompts are cheap to read, so all are checked before hours of encoding.
        raise_row_problems(prompt_problems(list(dataset["prompt"]), range(len(dataset))), label)
        fingerprint = self._fingerprint(dataset, undecoded, shapes)
        file = self.cache_folder / f"rows-{fingerprint}.arrow"
        check_space(file, len(dataset), shapes, f"{label}, encoded,")
        notes = file.with_suffix(".json")
        if file.exists() and notes.exists():
            for text in json.loads(notes.read_text()).values():
                logger.warning("%s: %s", label, text)
        encoder = self._row_encoder(label, scalars, notes_file=notes)
        try:
            caching = {"cache_file_name": str(file), "desc": f"Encoding {label}"}
            encoded = self._mapped(undecoded, encoder, shapes, new_fingerprint=fingerprint, **caching)
            self._made.add(dataset_fingerprint(encoded))
            return encoded
        except BadRows as bad:
            # The rest is only decoded, so that one run names every row that cannot be used.
            problems = list(bad.problems)
            for start in range(bad.next_row, len(undecoded), self.batch_size):
                rows = range(start, min(start + self.batch_size, len(undecoded)))
                problems += [problem for row in encoder.prepared(undecoded[rows], rows) for problem in row.problems]
            raise_row_problems(problems, label)
            raise

    def _row_encoder(self, label: str, scalars: Sequence[str], **options: Any) -> RowEncoder:
        return RowEncoder(self.preparation, self.layout, self.options, label, scalars, **options)

    def _fingerprint(self, dataset: Dataset, undecoded: Dataset, shapes: dict[str, tuple[int, ...]]) -> str:
        encoders = [weights_fingerprint(module) for module in self.family.encoders(self.pipeline)]
        content = [dataset_fingerprint(dataset), _file_stamps(undecoded, self.layout)]
        options = asdict(self.options) | ({} if self.options.draws else {"seed": 0})
        # What the options leave to the pipeline is in its config, not in its weights.
        samples = [self.family.modality, self.preparation.shape, self.preparation.key, sorted(shapes.items())]
        # Columns of numbers are among the shapes, as far as this data set has them.
        layout = [self.layout.media, len(self.layout.samples), self.layout.samples_per_cell]
        return Hasher.hash(
            [_ENCODING_VERSION, self.family.pipeline_class, content, encoders, options, samples, layout]
        )

    def _shapes(self, scalars: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of the columns that encoding makes, by name."""
        count, shapes = self.layout.num_samples, {}
        if count:
            shapes = dict.fromkeys((MEAN, STD), (count, *self.latent_shape))
            for name, tensor in self.uncropped_conditioning.items():
                shapes[SAMPLE + name] = (count, *tensor.shape)
        shapes |= {CONDITION + column: self.latent_shape for column in self.layout.conditions}
        per_row = () if self.layout.samples_per_cell is None else (self.layout.samples_per_cell,)
        return shapes | {SCALAR + column: per_row for column in scalars}

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

    def _mapped(self, undecoded: Any, encode: RowEncoder, shapes: dict[str, tuple[int, ...]], **caching: Any) -> Any:
        encoded = undecoded.map(
            encode,
            batched=True,
            with_indices=True,
            batch_size=self.batch_size,
            remove_columns=["prompt", *self.layout.media, *encode.scalars],
            features=array_features(shapes, prompt="string", row="int64"),
            **caching,
        )
        return encoded.with_format("torch")


def _file_stamps(undecoded: Dataset, layout: Layout) -> list[tuple[str, int, int]]:
    """Path, time of change and size of samples in files of their own, which a data set's fingerprint misses.

    Looks at the whole Arrow table, also where the data set is a selection of it: that copies no bytes.
    """
    stamps = []
    for column in layout.media:
        for path in paths_outside(undecoded.data.column(column)):
            if os.path.isfile(path):
                status = os.stat(path)
                stamps.append((path, status.st_mtime_ns, status.st_size))
    return stamps

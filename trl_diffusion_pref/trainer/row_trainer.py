"""Trainers on rows of prompts and samples: encodes them, and keys the random numbers of each sample. Knows no loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from ..data import (
    EncodingOptions,
    PromptTable,
    RowCollator,
    check_columns,
    encode_prompt_table,
    encode_rows,
    latent_columns,
    preparation_for,
    stream_rows,
    truncation_report,
)
from ..randomness import EVALUATION, TRAINING
from .base_config import DiffusionPreferenceConfig
from .base_trainer import DiffusionPreferenceTrainer
from .eval_datasets import all_datasets


logger = get_logger(__name__)


class RowTrainer(DiffusionPreferenceTrainer):
    """Trainer on rows with a prompt and the images, clips or sound that `image_columns` names."""

    image_columns: tuple[str, ...] = ()
    prompt_table: PromptTable | None = None
    # Step, and how many of its samples have been drawn for, since the micro-batches of a step share its count.
    _drawn: tuple[int, int] = (-1, 0)

    # ---- Data ----------------------------------------------------------------------------------------------------

    def check_dataset(self, dataset: Any, what: str) -> None:
        check_columns(dataset, what, ("prompt", *self.image_columns))

    def _prepare_encoding(self, args: DiffusionPreferenceConfig, train_dataset: Any, eval_dataset: Any) -> None:
        prompts: list[Any] = []
        for dataset in all_datasets(train_dataset, eval_dataset):
            if isinstance(dataset, Dataset):
                prompts += [prompt for prompt in dataset["prompt"] if isinstance(prompt, str)]
        if self.prompt_table is not None:
            prompts = [prompt for prompt in prompts if prompt not in self.prompt_table]
            if not prompts:
                return
        report = truncation_report(prompts, self.pipeline, self.family)
        if report:
            logger.warning(report)
        table = encode_prompt_table(
            prompts,
            self.pipeline,
            self.family,
            cache_folder=args.cache_folder(),
            batch_size=args.encode_batch_size,
        )
        if self.prompt_table is None:
            self.prompt_table = table
        else:
            self.prompt_table.add(table)

    def encode_dataset(
        self, dataset: Dataset | IterableDataset, args: DiffusionPreferenceConfig, what: str
    ) -> Dataset | IterableDataset:
        options = EncodingOptions(
            resolution=args.resolution,
            num_frames=args.num_frames,
            crop=args.crop,
            random_flip=args.random_flip,
            seed=args.data_seed,
            image_columns=self.image_columns,
        )
        common = {
            "what": what,
            "batch_size": args.encode_batch_size,
            "extra_columns": self.extra_columns(dataset, args),
        }
        if isinstance(dataset, IterableDataset):
            return stream_rows(dataset, self.pipeline, self.family, options, **common)
        return encode_rows(
            dataset,
            self.pipeline,
            self.family,
            options,
            cache_folder=args.cache_folder(),
            say=logger.warning,
            **common,
        )

    def sample_size(self, args: DiffusionPreferenceConfig) -> int | list[int]:
        """Side of square images in pixels; of all else the shape, as the VAE takes it without the batch."""
        shape = preparation_for(self.pipeline, self.family, args.resolution, args.num_frames).shape
        square = self.family.modality == "image" and shape[-1] == shape[-2]
        return shape[-1] if square else list(shape)

    def extra_columns(self, dataset: Dataset | IterableDataset, args: DiffusionPreferenceConfig) -> tuple[str, ...]:
        """Numeric columns that reach the batch besides prompt and images."""
        return ()

    def is_encoded(self, dataset: Dataset | IterableDataset) -> bool:
        columns = set(dataset.column_names or ())
        if not self.image_columns:
            # A user's data set may have a column `row` too.
            return columns == {"prompt", "row"} and isinstance(dataset, Dataset) and dataset.format["type"] == "torch"
        return set(latent_columns(self.image_columns)) <= columns

    def make_collator(self) -> Callable:
        return RowCollator(self.prompt_table, self.image_columns)

    # ---- One batch -----------------------------------------------------------------------------------------------

    def start_of_training(self, resumed_from: Path | None) -> None:
        self._drawn = (-1, 0)

    def positions_in_step(self, count: int) -> range:
        """Which of the step's samples in this process the next `count` are, counted over its micro-batches."""
        step = self.state.global_step
        first = self._drawn[1] if self._drawn[0] == step else 0
        self._drawn = (step, first + count)
        return range(first, first + count)

    def random_keys(self, inputs: dict[str, Tensor], training: bool) -> list[tuple[int, ...]]:
        rows = inputs["row"].tolist()
        if not training:
            return [(self.args.seed, EVALUATION, row) for row in rows]
        step, rank = self.state.global_step, self.args.process_index
        return [(self.args.seed, TRAINING, rank, step, position) for position in self.positions_in_step(len(rows))]

    def call(self, model: nn.Module, x_t: Tensor, model_time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """A denoiser's predictions, with latents in the dtype of its weights."""
        return self.family.predict(model, x_t.to(self.dtype_of(model)), model_time, conditioning)

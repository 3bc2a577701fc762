"""From what the user passes to what the loop reads: rows of a layout, encoded data sets, and loaders of batches."""

from collections.abc import Callable, Iterable
from typing import Any

from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from torch.utils.data import DataLoader

from ..data import (
    PAIRS,
    DatasetEncoder,
    EncodedDataset,
    EncodedStream,
    Layout,
    StreamLoader,
    as_pairs,
    as_resolution,
    check_columns,
)
from ..data.buckets import BucketBatchSampler
from ..data.layouts import labelled_datasets, named_datasets
from ..diffusion.noise import NoiseProcess, RectifiedFlow
from ..families import Family
from .config import DiffusionPreferenceConfig


Encoded = (EncodedDataset, EncodedStream)


def rows_of(
    train_dataset: Any, eval_dataset: Any, layout: Layout, args: DiffusionPreferenceConfig, *, training: bool = True
) -> tuple[Any, Any]:
    """Data sets with the columns of the layout: known layouts of pairs are recognised; encoded ones stay as they are.

    Args:
        training: Whether there must be a training data set.

    Raises:
        ValueError: A data set is missing or empty, its layout is not known, or labels cannot be used.
        TypeError: Not a data set.
    """

    def rows(dataset: Any, label: str) -> Any:
        if isinstance(dataset, Encoded):
            return dataset
        if layout.samples == PAIRS.samples and isinstance(dataset, (Dataset, IterableDataset)):
            # Rankings are rewritten, which one process does for all.
            with args.main_process_first():
                dataset = as_pairs(dataset, label, args.pair_options())
        check_columns(dataset, label, layout)
        return dataset

    if training:
        train_dataset = rows(train_dataset, "train_dataset")
    evaluated = [rows(dataset, label) for label, dataset in labelled_datasets(eval_dataset)]
    if isinstance(eval_dataset, dict):
        return train_dataset, dict(zip(eval_dataset, evaluated, strict=True))
    return train_dataset, evaluated[0] if evaluated else None


def encoded_for_evaluation(eval_dataset: Any, encoder: DatasetEncoder, args: DiffusionPreferenceConfig) -> Any:
    """What `evaluate` is given, encoded; the loop gives it each of several data sets once more."""
    if all(isinstance(dataset, Encoded) for _, dataset in named_datasets(eval_dataset)):
        return eval_dataset
    _, rows = rows_of(None, eval_dataset, encoder.layout, args, training=False)
    return encoder.encode_all(None, rows, args.device)[1]


def encoder_for(
    pipeline: DiffusionPipeline,
    family: Family,
    layout: Layout,
    args: DiffusionPreferenceConfig,
    datasets: Iterable[Any],
    several_sizes: bool,
) -> DatasetEncoder:
    """The encoder of a run.

    Args:
        datasets: For training and for evaluation, as the trainer got them.
        several_sizes: Whether the algorithm takes batches of other sizes than the square's.

    Raises:
        ValueError: Buckets were asked for and cannot be had.
    """
    if args.aspect_ratio_buckets and not several_sizes:
        raise ValueError(
            "aspect_ratio_buckets: this method keeps samples from one step to the next, which must have one size. "
            "Leave it out."
        )
    resolution = as_resolution(args.resolution)
    side = min(resolution) if isinstance(resolution, tuple) else resolution
    if side is None and family.modality != "audio":
        side = family.resolution(pipeline)
    streamed = any(isinstance(each, IterableDataset) for dataset in datasets for _, each in named_datasets(dataset))
    possible = several_sizes and bool(layout.places) and family.modality == "image" and not streamed
    options = args.encoding_options(family, side, buckets=possible and not isinstance(resolution, tuple))
    folder, batch_size = args.cache_folder(), args.encode_batch_size
    return DatasetEncoder(pipeline, family, layout, options, cache_folder=folder, batch_size=batch_size)


def sized_process(
    args: DiffusionPreferenceConfig, scheduler: Any, family: Family, encoder: DatasetEncoder
) -> NoiseProcess:
    """A flow whose times depend on the samples' size, for the sizes of this run."""

    def flow(shape: tuple[int, ...]) -> RectifiedFlow:
        process = args.noise_process(scheduler, family.image_tokens(shape))
        assert isinstance(process, RectifiedFlow)
        return process

    process = flow(encoder.latent_shape)
    process.by_size.update({shape: flow(shape) for shape in encoder.latent_shapes()})
    return process


def _in_buckets(
    dataset: EncodedDataset,
    batch_size: int,
    args: DiffusionPreferenceConfig,
    collate: Callable[..., Any],
    *,
    training: bool,
) -> DataLoader:
    """This process's batches, each of one size; shuffled for training."""
    sampler = BucketBatchSampler(
        dataset.buckets,
        batch_size,
        (args.process_index, args.world_size),
        seed=args.data_seed if training else None,
        drop_last=training and args.dataloader_drop_last,
        repeat=not training,
    )
    workers = args.dataloader_num_workers
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=bool(args.dataloader_pin_memory),
        persistent_workers=args.dataloader_persistent_workers and workers > 0,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def _has_buckets(dataset: Any) -> bool:
    """Whether the rows of a data set have several sizes."""
    return isinstance(dataset, EncodedDataset) and len(set(dataset.buckets.tolist())) > 1


def training_loader(dataset: Any, args: DiffusionPreferenceConfig, collate: Callable[..., Any]) -> Any:
    """Batches of a stream, without end, or of a data set with buckets; None for others, which transformers loads."""
    size = args.train_batch_size
    if not isinstance(dataset, EncodedStream):
        return _in_buckets(dataset, size, args, collate, training=True) if _has_buckets(dataset) else None
    options: dict[str, Any] = {
        "process": (args.process_index, args.world_size),
        "workers": args.dataloader_num_workers,
        "block": args.shuffle_buffer,
        "seed": args.data_seed,
    }
    return StreamLoader(dataset, lambda: dataset.training_batches(size, **options), size)


def evaluation_loader(
    dataset: Any, args: DiffusionPreferenceConfig, collate: Callable[..., Any], batch_size: int
) -> Any:
    """The same in the order of the rows; some rows come twice where processes cannot share them evenly."""
    if not isinstance(dataset, EncodedStream):
        return _in_buckets(dataset, batch_size, args, collate, training=False) if _has_buckets(dataset) else None
    process = (args.process_index, args.world_size)
    return StreamLoader(dataset, lambda: dataset.evaluation_batches(batch_size, process=process), batch_size)

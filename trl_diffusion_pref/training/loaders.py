"""From what the user passes to what the loop reads: rows of a layout, encoded data sets, and loaders of batches."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import (
    DatasetEncoder,
    EncodedDataset,
    EncodedStream,
    Encoders,
    Layout,
    StreamEvaluationLoader,
    StreamLoader,
    as_resolution,
    check_columns,
)
from ..data.buckets import BucketBatchSampler
from ..data.layouts import (
    check_ignored_columns,
    column_names,
    labelled_datasets,
    named_datasets,
    with_condition_column,
)
from ..data.pair_options import DEFAULT_OPTIONS
from ..data.pair_source import RowSource
from ..data.pairs import convert
from ..data.resolution import Resolution
from ..data.stored import list_lengths
from ..data.weighted_batches import WeightedBatchSampler
from ..diffusion.noise import NoiseProcess, RectifiedFlow
from ..families import Family
from .config import AnyDataset, DiffusionPreferenceConfig


logger = logging.getLogger(__name__)

Encoded = (EncodedDataset, EncodedStream)
# From a data set and what messages call it to rows of a layout, and what they were made of.
PrepareRows = Callable[[AnyDataset, str], tuple[AnyDataset, RowSource | None]]


def with_condition_columns(train_dataset: Any, eval_dataset: Any, family: Family) -> tuple[Any, Any]:
    """Both with `with_condition_column`, also where there are several for evaluation."""
    if isinstance(eval_dataset, dict):
        evaluated: Any = {name: with_condition_column(each, family) for name, each in eval_dataset.items()}
    else:
        evaluated = with_condition_column(eval_dataset, family)
    return with_condition_column(train_dataset, family), evaluated


def layout_of(
    layout: Layout, family: Family, train_dataset: Any, eval_dataset: Any, *, loss_on_mask: bool = False
) -> Layout:
    """A layout with the condition images of a run, which optional ones are where the training data have them.

    Args:
        loss_on_mask: Whether errors are taken over a mask, which is then a column also where the model sees none.

    Raises:
        ValueError: `loss_on_mask` of audio.
    """
    layout = layout.over_mask(family) if loss_on_mask else layout
    evaluated = [dataset for _, dataset in labelled_datasets(eval_dataset)]
    given = [dataset for dataset in (train_dataset, *evaluated) if dataset is not None]
    first = next(iter(given), None)
    if layout.fewest_per_cell is not None:
        layout = _as_long_as(layout, given)
    if isinstance(first, EncodedDataset):
        return layout.conditioned_on(family, [*first.record["samples"], *first.record["conditions"]])
    known = isinstance(first, (Dataset, IterableDataset))
    return layout.conditioned_on(family, column_names(first) if known else None)


def _as_long_as(layout: Layout, datasets: Sequence[Any]) -> Layout:
    """A layout of rankings whose places suffice for the longest; of a stream all are as long as its first one."""
    [column] = layout.samples
    lengths = []
    for dataset in datasets:
        if isinstance(dataset, EncodedDataset):
            lengths.append(dataset.most_samples)
        elif isinstance(dataset, IterableDataset):
            first: dict[str, Any] = next(iter(dataset), {})
            cell = first.get(column)
            if isinstance(cell, (list, tuple)):
                return replace(layout, samples_per_cell=len(cell), fewest_per_cell=None)
        # Other columns, and none, are reported with all that is wrong with them.
        elif isinstance(dataset, Dataset) and column in dataset.column_names and len(dataset):
            lengths.append(int(list_lengths(dataset, column, "the data set").max()))
    return replace(layout, samples_per_cell=max([layout.fewest_per_cell or 1, *lengths])) if lengths else layout


def pairs_of(dataset: AnyDataset, label: str, args: DiffusionPreferenceConfig) -> tuple[AnyDataset, RowSource | None]:
    """A data set in any known layout as pairs, and where they come from; see `data.as_pairs`."""
    # Rankings are rewritten, which one process does for all.
    with args.main_process_first():
        pairs, _, source = convert(dataset, label, args.pair_options())
    return pairs, source


def rows_of(
    train_dataset: Any,
    eval_dataset: Any,
    layout: Layout,
    family: Family,
    args: DiffusionPreferenceConfig,
    prepare: PrepareRows,
    *,
    training: bool = True,
) -> tuple[Any, Any, dict[str, RowSource]]:
    """Data sets with the columns of the layout; encoded ones stay as they are.

    Args:
        prepare: `DiffusionTrainer.prepare_rows`.
        training: Whether there must be a training data set.

    Returns:
        Data sets for training and for evaluation, and where rows come from by what messages call the data set:
        `DatasetEncoder` names the rows whose labels cannot be used together with all others.

    Raises:
        ValueError: A data set is missing or empty, its layout is not known, no label can be used, or it has a column
            that training would ignore.
        TypeError: Not a data set.
    """
    sources: dict[str, RowSource] = {}
    if training:
        train_dataset = rows_of_one(train_dataset, "train_dataset", layout, family, args, prepare, sources)
    evaluated = [
        rows_of_one(dataset, label, layout, family, args, prepare, sources)
        for label, dataset in labelled_datasets(eval_dataset)
    ]
    if isinstance(eval_dataset, dict):
        return train_dataset, dict(zip(eval_dataset, evaluated, strict=True)), sources
    return train_dataset, evaluated[0] if evaluated else None, sources


def rows_of_one(
    dataset: Any,
    label: str,
    layout: Layout,
    family: Family,
    args: DiffusionPreferenceConfig,
    prepare: PrepareRows,
    sources: dict[str, RowSource],
) -> Any:
    """`rows_of` one data set.

    Args:
        label: How messages call it.
        sources: Where its rows come from is added here.
    """
    if isinstance(dataset, Encoded):
        return dataset
    if isinstance(dataset, (Dataset, IterableDataset)):
        dataset, source = prepare(dataset, label)
        if source is not None:
            sources[label] = source
    check_columns(dataset, label, layout)
    check_ignored_columns(dataset, label, layout, family)
    if isinstance(dataset, Dataset):
        args.check_rows(dataset, label)
    return dataset


def encoded_for_evaluation(
    eval_dataset: Any, encoder: DatasetEncoder, args: DiffusionPreferenceConfig, prepare: PrepareRows
) -> Any:
    """What `evaluate` is given, encoded; the loop gives it each of several data sets once more, or their names."""
    if eval_dataset is None or isinstance(eval_dataset, str):
        return eval_dataset
    if all(encoder.is_encoded(dataset) for _, dataset in named_datasets(eval_dataset)):
        return eval_dataset
    _, rows, sources = rows_of(None, eval_dataset, encoder.layout, encoder.family, args, prepare, training=False)
    return encoder.encode_all(None, rows, args.device, sources)[1]


def encoder_for(
    encoders: Encoders,
    layout: Layout,
    args: DiffusionPreferenceConfig,
    datasets: Iterable[Any],
    several_sizes: bool,
) -> DatasetEncoder:
    """The encoder of a run.

    Args:
        encoders: Of the run's pipeline.
        datasets: For training and for evaluation, as the trainer got them.
        several_sizes: Whether the algorithm takes batches of other sizes than the square's.

    Raises:
        ValueError: Buckets were asked for and cannot be had, or options that have no effect without or with them.
    """
    pipeline, family = encoders.pipeline, encoders.family
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
    if streamed and _wanted_by_default(args, family, resolution, several_sizes):
        logger.warning(
            f"{type(pipeline).__name__}'s models were trained on images of several shapes, but a data set is "
            "streamed, and all images are cropped to one shape. Store the data for aspect_ratio_buckets, or set it to "
            "False."
        )
    if options.buckets.enabled:
        check_shuffling(args, "aspect_ratio_buckets makes batches of one shape each", "aspect_ratio_buckets=False")
    elif args.on_aspect_difference != "crop":
        raise ValueError(
            f"on_aspect_difference={args.on_aspect_difference!r} does nothing without buckets, which this run has "
            "not. Set aspect_ratio_buckets=True, or leave it out."
        )
    of_pairs = args.pair_options()
    # Rows that are no pairs say nothing of options at their defaults, so that other methods take them too.
    changed = replace(of_pairs, column_map=None, seed=DEFAULT_OPTIONS.seed) != DEFAULT_OPTIONS
    if layout.is_pairs or (layout.from_pairs and changed):
        options = replace(options, pairs=of_pairs)
    if layout.conditions and family.prompts_see_images:
        options = replace(options, keep_empty_prompt=args.reads_empty_prompt)
    where: dict[str, Any] = {"cache_folder": args.cache_folder(), "batch_size": args.encode_batch_size}
    return DatasetEncoder(pipeline, family, layout, options, encoders=encoders, **where)


def _wanted_by_default(
    args: DiffusionPreferenceConfig, family: Family, resolution: Resolution, several_sizes: bool
) -> bool:
    """Whether a stored data set would have buckets though nobody asked for them."""
    unset = args.aspect_ratio_buckets is None and not isinstance(resolution, tuple)
    return unset and several_sizes and family.aspect_ratio_buckets


def check_shuffling(args: DiffusionPreferenceConfig, batches: str, without: str) -> None:
    """Raises for options of loaders and samplers that the package's own samplers cannot follow.

    Args:
        batches: Which option makes what batches, for the message.
        without: That option with the value that makes others.

    Raises:
        ValueError: One of them is set.
    """
    given = args.accelerator_config
    options = given if isinstance(given, dict) else vars(given) if given else {}
    ignored = [f"accelerator_config.{name}" for name in ("split_batches", "dispatch_batches") if options.get(name)]
    # An option of newer versions of transformers.
    strategy = getattr(args, "train_sampling_strategy", "random")
    ignored += [f"train_sampling_strategy={strategy!r}"] if strategy != "random" else []
    if ignored:
        raise ValueError(f"{' and '.join(ignored)}: {batches}, in random order. Leave it out, or set {without}.")


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
    weights: Tensor | None = None,
) -> DataLoader:
    """This process's batches, each of one size; shuffled for training, or drawn by the weights of the rows."""
    process, drop_last = (args.process_index, args.world_size), training and args.dataloader_drop_last
    if weights is None:
        seed = args.data_seed if training else None
        sampler = BucketBatchSampler(dataset.buckets, batch_size, process, seed=seed, drop_last=drop_last)
    else:
        sampler = WeightedBatchSampler(
            dataset.buckets,
            batch_size,
            process,
            seed=cast(int, args.data_seed),
            weights=weights.numpy(),
            drop_last=drop_last,
        )
    if sampler.never_used:
        logger.warning(
            f"dataloader_drop_last=True leaves out {sampler.never_used} of {len(dataset)} rows in every epoch, since "
            f"fewer than {batch_size} rows have their shape."
        )
    workers = args.dataloader_num_workers
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=bool(args.dataloader_pin_memory),
        persistent_workers=training and args.dataloader_persistent_workers and workers > 0,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def _has_buckets(dataset: Any) -> bool:
    """Whether the rows of a data set have several sizes."""
    return isinstance(dataset, EncodedDataset) and len(set(dataset.buckets.tolist())) > 1


def training_loader(
    dataset: Any, args: DiffusionPreferenceConfig, collate: Callable[..., Any], weights: Tensor | None
) -> Any:
    """Batches of a data set with buckets, or with weights of its rows; None for others, which transformers loads."""
    if weights is None and not _has_buckets(dataset):
        return None
    return _in_buckets(dataset, args.train_batch_size, args, collate, training=True, weights=weights)


def check_one_size(dataset: Any, several_sizes: bool) -> None:
    """Raises where an algorithm keeps rows from one step to the next whose condition images have several sizes.

    Raises:
        ValueError: They have.
    """
    if not several_sizes and _has_buckets(dataset):
        raise ValueError(
            f"train_dataset has condition images of {len(set(dataset.buckets.tolist()))} sizes or numbers, and this "
            "method keeps rows from one step to the next, which must be alike. Bring the images to one shape, and "
            "give each row equally many."
        )


def stream_loader(dataset: Any, args: DiffusionPreferenceConfig) -> StreamLoader | None:
    """Batches of a stream, without end; None for other data sets."""
    if not isinstance(dataset, EncodedStream):
        return None
    return StreamLoader(
        dataset,
        args.train_batch_size,
        process=(args.process_index, args.world_size),
        workers=args.dataloader_num_workers,
        block=args.shuffle_buffer,
        seed=cast(int, args.data_seed),
        prefetch=args.dataloader_prefetch_factor,
    )


def evaluation_loader(
    dataset: Any, args: DiffusionPreferenceConfig, collate: Callable[..., Any], batch_size: int
) -> Any:
    """The same in the order of the rows, and batches of a stream; rows may come twice where processes cannot share
    them evenly."""
    if isinstance(dataset, EncodedStream):
        return StreamEvaluationLoader(dataset, batch_size, (args.process_index, args.world_size))
    return _in_buckets(dataset, batch_size, args, collate, training=False) if _has_buckets(dataset) else None

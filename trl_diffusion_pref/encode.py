"""Encoding of a data set without training, for other machines and later runs."""

import os

from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline

from .algorithms import trainer_of
from .algorithms.mapo.trainer import MaPOTrainer
from .data import EncodedDataset, Encoders
from .data.layouts import with_condition_column
from .data.pair_source import RowSource
from .families import Family
from .families.denoisers import parts_of
from .families.weightless import pipeline_from_configs
from .training import loaders, pipelines
from .training.config import DiffusionPreferenceConfig


_WHERE = ("revision", "cache_dir", "token", "local_files_only")


def encode_dataset(
    model: str | os.PathLike | DiffusionPipeline,
    dataset: Dataset,
    args: DiffusionPreferenceConfig | None = None,
    *,
    output: str | os.PathLike | None = None,
) -> EncodedDataset:
    """Encodes a data set as a trainer would, and keeps it in the same cache.

    All processes of `accelerate launch` encode, and a run that was killed goes on. Of a pipeline that is given by name
    the denoiser's weights are not loaded.

    Args:
        model: Hub id, folder or loaded pipeline.
        dataset: As for the trainer.
        args: The trainer's config, which says which columns are read and how. Default: pairs, and the default of each
            option.
        output: A folder, see [`EncodedDataset.save_to_disk`].

    Returns:
        What a trainer of the same model takes as `train_dataset` or `eval_dataset`, with the same options about data;
        it also has `save_to_disk` and `push_to_hub`.

    Raises:
        ValueError: Rows that cannot be used, options that do not suit the model, or a disk without room.
        TypeError: A stream, no data set, or no supported pipeline.

    Example:

    ```python
    from datasets import load_dataset
    from trl_diffusion_pref import MaPOConfig, encode_dataset

    pairs = load_dataset("imagefolder", data_dir="pairs", split="train")
    encoded = encode_dataset("stabilityai/stable-diffusion-xl-base-1.0", pairs, MaPOConfig(resolution=1024))
    encoded.save_to_disk("encoded_pairs")
    ```
    """
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            "dataset is streamed. Load it without streaming=True to encode it once; trainers encode streams as they "
            "read them."
        )
    args = DiffusionPreferenceConfig() if args is None else args.own_copy()
    family = pipelines.family_of(model, args.loading)
    # Without its constructor: the columns that it reads are said before it has a model.
    kind = MaPOTrainer if type(args) is DiffusionPreferenceConfig else trainer_of(args)
    trainer = kind.__new__(kind)
    vars(trainer).update(args=args, family=family)
    dataset = with_condition_column(dataset, family)
    trainer.layout = layout = loaders.layout_of(
        trainer.make_layout(), family, dataset, None, loss_on_mask=trainer.args.loss_on_mask
    )
    sources: dict[str, RowSource] = {}
    rows = loaders.rows_of_one(dataset, "dataset", layout, family, args, trainer.prepare_rows, sources)
    pipeline = _load(model, family, args)
    family.check_complete(pipeline)
    pipelines.check_not_offloaded(pipeline)
    encoders = Encoders(pipeline, family)
    encoder = loaders.encoder_for(encoders, layout, args, [rows], kind.several_sizes)
    with encoders.on_device(args.device):
        encoder.add_prompts([rows])
        encoded = encoder.encode(rows, "dataset", sources.get("dataset"))
    if output is not None:
        encoded.save_to_disk(output)
    return encoded


def _load(
    model: str | os.PathLike | DiffusionPipeline, family: Family, args: DiffusionPreferenceConfig
) -> DiffusionPipeline:
    options = args.loading
    if isinstance(model, (str, os.PathLike)) and family.denoiser_name not in options:
        where = {name: options[name] for name in _WHERE if name in options}
        # Only its config is read; its weights may be twenty times what encodes.
        denoiser = family.denoiser(pipeline_from_configs(model, **where))
        options = {**parts_of(denoiser, family.denoiser_name), **options}
    return pipelines.load_pipeline(model, options)

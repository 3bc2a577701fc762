"""Options about data: what is taken for a pair, how samples are prepared, and where encoded ones are kept."""

import logging
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import datasets
from datasets import Dataset
from trl.trainer.base_config import _BaseConfig

from ..data import EncodingOptions, PairOptions, as_resolution
from ..data.bad_rows import BadRowPolicy, OnBadRow
from ..data.buckets import BucketOptions, OnAspectDifference
from ..data.options import CacheDtype
from ..families import Family
from .documented import documented


logger = logging.getLogger(__name__)


@documented
@dataclass
class DataConfig(_BaseConfig):
    r"""
    Options about data, shared by all trainers of this package.

    > Parameters that say what is a pair; docs/dataset_formats.md has the layouts that are recognised

        column_map (`dict[str, str]`, *optional*):
            The data set's own names of columns, by ours or by those of a known layout: `{"prompt": "text", "chosen":
            "better", "rejected": "worse"}`. Default: columns are recognised by their names.
        ranking_pairs (`str`, *optional*, defaults to `"best_worst"`):
            Which pairs a ranking of several images gives: `"best_worst"`, `"all"`, or `"adjacent"` ones.
        min_score_difference (`float`, *optional*, defaults to `0.0`):
            Smallest difference of scores, at least 0, of two images of a ranking that make a pair.
        ties (`str`, *optional*, defaults to `"drop"`):
            What becomes of pairs without a preference: `"drop"` leaves them out, `"half"` gives them the soft label
            0.5, where the loss reads one, `"keep"` takes the first image as the chosen one. They are counted in the
            log.
        label_noise (`float`, *optional*, defaults to `0.0`):
            Share of the pairs, in [0, 1), whose order is exchanged, for experiments with wrong labels.

    > Parameters that control how samples are prepared

        resolution (`int` or `str`, *optional*):
            Side length in pixels of the square that every image is scaled and cropped to; for videos the shorter
            side. Or height and width, `"768x1360"`, of images and videos. Default: what the pipeline generates.
        aspect_ratio_buckets (`bool`, *optional*):
            Scales and crops images to the nearest of several shapes with about the area of `resolution` squared,
            instead of to a square. All images of a row get one shape, and a batch has rows of one shape. Default: True
            for models that were trained so, see docs/data.md, unless `resolution` has a height and a width; False for
            others, for streams, and where no samples are read.
        max_aspect_difference (`float`, *optional*, defaults to `1.5`):
            With buckets, how many times as wide, for its height, one image of a row may be as another; at least 1.
        on_aspect_difference (`str`, *optional*, defaults to `"crop"`):
            With buckets, what happens beyond: `"crop"` brings all images to the row's bucket, whatever that cuts
            away; `"raise"` stops before training and lists the rows; `"skip"` leaves them out and counts them in the
            log and in the run's record. It decides about these rows alone: `on_bad_row` and `max_bad_share` are for
            others.
        num_frames (`int`, *optional*):
            Frames that every video must have, at least 1. Default: what the pipeline generates. An error where it
            generates no videos.
        crop (`str`, *optional*, defaults to `"center"`):
            Where an image with another aspect ratio is cropped: `"center"`, which does not depend on the seed, or
            `"random"`, one relative place for all images of a row, chosen once at encoding.
        random_flip (`bool`, *optional*, defaults to `False`):
            Mirrors a row's images with probability 1/2, all alike, decided once at encoding. Off by default, since
            prompts that name left and right, and writing in the images, become wrong.
        latent_sampling (`str`, *optional*, defaults to `"sample"`):
            `"sample"` draws latents from the VAE's posterior at every step, as the authors' released code does;
            `"mean"` takes its mean, which needs half the room on disk.

    > Parameters that control what is done with rows that cannot be used

        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops before training and lists the first ten such rows; `"skip"` leaves them out, and counts
            them by kind in the log and in the run's record.
        max_bad_share (`float`, *optional*, defaults to `0.1`):
            With `on_bad_row="skip"`, the share of the rows, in [0, 1], above which it stops all the same.
        min_image_side (`int`, *optional*):
            Pixels that an image's shorter side must have, at least 1. Default: an eighth of the side that is trained
            at, below which there is next to nothing to learn from.
        max_aspect_ratio (`float`, *optional*, defaults to `8.0`):
            What an image's longer side may be, in shorter sides, at least 1. Of a longer image little would remain.

    > Parameters that control encoding

        encode_batch_size (`int`, *optional*, defaults to `8`):
            Rows that the VAE, and prompts that the text encoders, take at once before training; at least 1. Lower
            it if encoding runs out of memory.
        cache_dtype (`str`, *optional*, defaults to `"auto"`):
            In which latents and prompt embeddings are kept: `"float16"`, `"bfloat16"`, `"float32"`, or `"auto"`, the
            encoder's own half precision, or float16 where that is float32.
        dataset_cache_dir (`str`, *optional*):
            Folder of encoded data sets. Default: `trl_diffusion_pref` in the cache folder of `datasets`.
        shuffle_buffer (`int`, *optional*, defaults to `256`):
            Of a streamed data set, rows that each reader shuffles with each other, at least 0; 0 keeps their order.
            They are in memory undecoded.
    """

    _ranges: ClassVar[dict[str, str]] = {
        "min_score_difference": "[0, inf)",
        "label_noise": "[0, 1)",
        "max_aspect_difference": "[1, inf)",
        "num_frames": "[1, inf)",
        "max_bad_share": "[0, 1]",
        "min_image_side": "[1, inf)",
        "max_aspect_ratio": "[1, inf)",
        "encode_batch_size": "[1, inf)",
        "shuffle_buffer": "[0, inf)",
    }
    _effective_with: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        "max_aspect_difference": ("on_aspect_difference", ("raise", "skip")),
        "max_bad_share": ("on_bad_row", ("skip",)),
    }
    _VALID_DICT_FIELDS = [*_BaseConfig._VALID_DICT_FIELDS, "column_map"]

    column_map: dict[str, str] | str | None = None
    ranking_pairs: Literal["best_worst", "all", "adjacent"] = "best_worst"
    min_score_difference: float = 0.0
    ties: Literal["drop", "half", "keep"] = "drop"
    label_noise: float = 0.0
    resolution: int | str | None = None
    aspect_ratio_buckets: bool | None = None
    max_aspect_difference: float = 1.5
    on_aspect_difference: OnAspectDifference = "crop"
    num_frames: int | None = None
    crop: Literal["center", "random"] = "center"
    random_flip: bool = False
    latent_sampling: Literal["sample", "mean"] = "sample"
    on_bad_row: OnBadRow = "raise"
    max_bad_share: float = 0.1
    min_image_side: int | None = None
    max_aspect_ratio: float = 8.0
    encode_batch_size: int = 8
    cache_dtype: CacheDtype = "auto"
    dataset_cache_dir: str | None = None
    shuffle_buffer: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.resolution = as_resolution(self.resolution)  # type: ignore[assignment]  # a command line has no pairs
        if self.ties == "half" and not self.reads_soft_labels:
            raise ValueError(
                f"ties='half' gives ties the soft_label 0.5, which this {type(self).__name__} does not read, so that "
                "they would count as preferences. Use 'drop', or 'keep' to take the first one for the chosen one. "
                "DiffusionDPOConfig reads the column soft_label with loss_type='irepo'."
            )
        # They check themselves.
        self.pair_options()

    @property
    def reads_soft_labels(self) -> bool:
        """Whether the loss reads the column `soft_label`."""
        return False

    def check_rows(self, dataset: Dataset, label: str) -> None:
        """Checks rows that are read for training or evaluation, pairs where the layout is one of pairs.

        Warns of pairs that count as preferences and are none.

        Raises:
            ValueError: They have values that the loss cannot use, though they are no mistakes.
        """
        if self.reads_soft_labels or "soft_label" not in dataset.column_names:
            return
        none = sum(isinstance(value, Real) and value <= 0.5 for value in dataset["soft_label"])
        if none:
            logger.warning(
                f"{label}: {none} pairs have a soft_label of at most 0.5, so that chosen is not preferred, and "
                f"{type(self).__name__} trains on them as if it were: their soft labels are not read."
            )

    def pair_options(self) -> PairOptions:
        """What is taken for a pair."""
        return PairOptions(
            column_map=cast(dict[str, str] | None, self.column_map),
            ranking_pairs=self.ranking_pairs,
            min_score_difference=self.min_score_difference,
            ties=self.ties,
            label_noise=self.label_noise,
            seed=self.seed if self.data_seed is None else self.data_seed,
        )

    def encoding_options(self, family: Family, side: int | None, *, buckets: bool) -> EncodingOptions:
        """How samples are encoded.

        Args:
            side: The shorter side in pixels that is trained at; None for audio.
            buckets: Whether there may be buckets where the user did not ask for them.
        """
        enabled = self.aspect_ratio_buckets
        if enabled is None:
            enabled = buckets and family.aspect_ratio_buckets
        shortest = self.min_image_side or max((side or 0) // 8, 1)
        return EncodingOptions(
            resolution=as_resolution(self.resolution),
            num_frames=self.num_frames,
            crop=self.crop,
            random_flip=self.random_flip,
            seed=self.seed if self.data_seed is None else self.data_seed,
            cache_dtype=self.cache_dtype,
            keep_std=self.latent_sampling == "sample",
            buckets=BucketOptions(enabled, self.max_aspect_difference, self.on_aspect_difference),
            bad_rows=BadRowPolicy(self.on_bad_row, self.max_bad_share, shortest, self.max_aspect_ratio),
        )

    def cache_folder(self) -> Path:
        """The folder of encoded data sets, which is made if it does not exist."""
        folder = Path(self.dataset_cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "trl_diffusion_pref")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

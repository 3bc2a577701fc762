"""What an inspection found, by subject."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Spread:
    """How values are spread.

    Args:
        smallest, median, largest: Of all values.
        most: The value that 95 % of them do not exceed.
    """

    smallest: float
    median: float
    most: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "Spread | None":
        """Of values in any order; None where there are none."""
        if not len(values):
            return None
        levels = np.percentile(values, [0, 50, 95, 100], method="higher").tolist()
        return cls(*(int(level) if float(level).is_integer() else round(level, 3) for level in levels))

    def __str__(self) -> str:
        if self.smallest == self.largest:
            return f"{self.smallest:g}"
        return f"{self.smallest:g} to {self.largest:g}, median {self.median:g}, 95 % up to {self.most:g}"


@dataclass(frozen=True)
class Finding:
    """Samples or rows that were found.

    Args:
        count: How many: pairs of rows, groups or rows, as the name says.
        rows: All of their rows, ascending, for `dataset.select`.
        examples: The first ten; each is where the samples or rows are that belong together.
    """

    count: int = 0
    rows: list[int] = field(default_factory=list)
    examples: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class BadRows:
    """Rows that training would refuse, or leave out with `on_bad_row="skip"`.

    Args:
        count: How many.
        kinds: How many by the kind of their first problem, the most frequent one first.
        examples: The first ten problems, each with `row`, `place`, `reason` and `kind`.
        rows: All of them, ascending.
    """

    count: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Tokens:
    """Prompts as one tokenizer divides them.

    Args:
        limit: Tokens that are read, special ones included.
        lengths: Of the distinct prompts.
        cut: How many of the distinct prompts are longer.
        cut_rows: How many rows have a prompt that is longer.
        examples: The beginnings of the longest ones that are cut, ten at most.
    """

    limit: int
    lengths: Spread
    cut: int
    cut_rows: int
    examples: list[str]


@dataclass(frozen=True)
class Prompts:
    """The prompts of all rows that are used.

    Args:
        rows: Rows with a prompt.
        distinct: Different prompts; of a row with several captions, each counts.
        repeated: Prompts that more than one row has.
        most_repeated: The ten most frequent of them and how many rows have each.
        characters: Lengths of the distinct prompts.
        words: Likewise, as divided by spaces.
        tokens: By tokenizer; empty without a model.
    """

    rows: int
    distinct: int
    repeated: int
    most_repeated: dict[str, int]
    characters: Spread | None
    words: Spread | None
    tokens: dict[str, Tokens] = field(default_factory=dict)


@dataclass(frozen=True)
class Bucket:
    """Rows that are trained at one size.

    Args:
        height, width: In pixels.
        rows: How many.
    """

    height: int
    width: int
    rows: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of images and videos.

    Args:
        distinct: How many different ones.
        most_frequent: The ten most frequent ones, "1024x768" (width first), and how many samples have each.
        shorter_side: In pixels.
        resolution: The size, in pixels, that the rest of this was computed for: height and width.
        smaller: Samples that are scaled up for it.
        cropped: What is cut away to bring all of them to this one size: the mean share of a sample's pixels.
        cropped_most: The share of the sample that loses most.
        buckets: The sizes with aspect-ratio buckets, from tall to wide; empty for videos, and for a resolution that
            is no square.
        cropped_in_buckets, cropped_most_in_buckets: As above.
        different_shapes: Pairs of which one sample is, for its height, more than 1.5 times as wide as the other.
    """

    distinct: int
    most_frequent: dict[str, int]
    shorter_side: Spread
    resolution: list[int]
    smaller: int
    cropped: float
    cropped_most: float
    buckets: list[Bucket]
    cropped_in_buckets: float | None
    cropped_most_in_buckets: float | None
    different_shapes: Finding


@dataclass(frozen=True)
class Samples:
    """The samples that were read.

    Args:
        kind: "image", "video" or "audio", as the model generates or the first sample is.
        count: Samples that can be used, condition images included. One that is in several pairs of a ranking counts
            once.
        sizes: None for audio.
        frames: Of videos.
        seconds: Of videos, where their files say, and of audio.
        rates: How much audio has which samples per second.
        channels: How much audio has how many channels.
    """

    kind: str
    count: int
    sizes: Sizes | None = None
    frames: Spread | None = None
    seconds: Spread | None = None
    rates: dict[str, int] = field(default_factory=dict)
    channels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Duplicates:
    """What is there more than once; condition images aside.

    Args:
        equal: Groups of samples that are equal: JPEG files, videos and audio byte by byte, other images by their
            pixels.
        equal_across_prompts: Those of them whose samples belong to several prompts.
        similar: Groups of images, or videos' first frames, that look the same without being equal: in another size or
            compression, or slightly changed.
        blank: Images of a single colour; they have no perceptual hash.
        identical_pairs: Pairs whose two samples are equal; training refuses them.
        similar_pairs: Pairs whose two samples look the same.
        repeated_pairs: Groups of rows with equal prompts and equal samples, chosen and rejected alike.
        contradictory_pairs: Groups of rows with equal prompts and the same two samples in both orders.
        unedited_chosen: Pairs whose chosen sample is one of the row's condition images, so that nothing was edited;
            None where there are no condition images.
        unedited_rejected: Pairs whose rejected sample is: a preference for any edit over none.
    """

    equal: Finding
    equal_across_prompts: int
    similar: Finding
    blank: Finding
    identical_pairs: Finding
    similar_pairs: Finding
    repeated_pairs: Finding
    contradictory_pairs: Finding
    unedited_chosen: Finding | None = None
    unedited_rejected: Finding | None = None


@dataclass(frozen=True)
class EncodedSize:
    """What the data take on disk once a model has encoded them.

    Args:
        bytes_per_row: Of the samples, at the resolution without buckets.
        bytes_per_row_mean: The same with `latent_sampling="mean"`.
        rows: Rows that can be used.
        bytes_per_prompt: At most; padding that a mask covers is not stored. None where the family cannot say it.
        prompts: Distinct prompts, and the empty one.
    """

    bytes_per_row: int
    bytes_per_row_mean: int
    rows: int
    bytes_per_prompt: int | None
    prompts: int

    @property
    def total(self) -> int:
        """Samples and prompts."""
        return self.bytes_per_row * self.rows + (self.bytes_per_prompt or 0) * self.prompts

"""What a row may hold: which columns an algorithm reads, and what their cells must be."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline

from ..families import Family, all_families, editing_pipelines
from ..families.conditions import LOSS_REGION


class Between(NamedTuple):
    """Numbers from `least` to `most`, both included."""

    least: float
    most: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, Real) and self.least <= float(value) <= self.most

    def __str__(self) -> str:
        return f"in [{self.least:g}, {self.most:g}]"


class OneOf(frozenset[float]):
    """Some numbers; True and False are 1 and 0."""

    def __str__(self) -> str:
        return f"one of {', '.join(f'{value:g}' for value in sorted(self))}"


@dataclass(frozen=True)
class Layout:
    """The columns that an algorithm reads beside `prompt`.

    Args:
        samples: Columns of what the pipeline generates, encoded by the VAE: ("chosen", "rejected"), or ("image",).
            They are the first axis of a batch's latents, in this order.
        samples_per_cell: For rankings: `samples` is then one column, and each of its cells a list of so many samples,
            or of at most so many.
        fewest_per_cell: For rankings of several lengths: how many samples a cell must have; None if all have
            `samples_per_cell`. The rows of one batch have one length.
        conditions: Columns of images that the model is conditioned on, shared by the row's samples.
        mask: The one of `conditions` that is a mask of the one before it, and has its size; None without.
        images_per_cell: How many images a cell of the last of them may have: above 1, one image or a list.
        region: A column of masks of the samples, which the model does not see: errors are taken over what they mark.
        scalars: Columns of numbers, one per row or, for rankings, one per sample.
        optional_scalars: The same, read where the data set has them.
        ranges: What the numbers of a column may be: the least and the largest, or all that there are. Columns that are
            not named here may have any finite number.
        from_pairs: Whether rows may be made of pairs, so that options about these decide what rows there are.
    """

    samples: tuple[str, ...] = ()
    samples_per_cell: int | None = None
    fewest_per_cell: int | None = None
    conditions: tuple[str, ...] = ()
    mask: str | None = None
    images_per_cell: int = 1
    region: str | None = None
    scalars: tuple[str, ...] = ()
    optional_scalars: tuple[str, ...] = ()
    ranges: Mapping[str, Between | OneOf] = field(default_factory=dict)
    from_pairs: bool = False

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that every data set must have."""
        return ("prompt", *self.media, *self.scalars)

    @property
    def num_samples(self) -> int:
        """Samples that a row has at most."""
        return len(self.samples) * (self.samples_per_cell or 1)

    @property
    def is_pairs(self) -> bool:
        """Whether rows are pairs of chosen and rejected."""
        return self.samples == PAIRS.samples

    def conditioned_on(self, family: Family, columns: Sequence[str] | None = None) -> "Layout":
        """The same with the columns of condition images that a family's pipelines take; unchanged if they take none.

        Args:
            columns: Those of the data set, if it is known. Where condition images are optional and it has none, the
                pipeline generates from text alone, and samples called "edited_image" are in the column "image".
        """
        if not family.condition_images:
            return self
        plain = tuple(name.removeprefix("edited_") for name in self.samples)
        if family.condition_is_optional and plain != self.samples and not set(self.samples) <= set(columns or ()):
            return replace(self, samples=plain)
        if family.condition_is_optional and not set(family.condition_images) & set(columns or ()):
            return self
        return replace(
            self,
            conditions=family.condition_images,
            mask=family.mask_column,
            images_per_cell=family.max_condition_images,
        )

    def over_mask(self, family: Family) -> "Layout":
        """The same with the column of masks that errors are taken over, where the model is not conditioned on one.

        Raises:
            ValueError: Samples are audio.
        """
        if family.modality == "audio":
            raise ValueError(
                f"loss_on_mask=True: {family.pipeline_class} generates audio, of which there are no masks. Leave the "
                "option out."
            )
        return self if family.mask_column is not None else replace(self, region=REGION_COLUMN)

    def scalars_of(self, columns: Sequence[str]) -> tuple[str, ...]:
        """The columns of numbers that a data set with these columns has."""
        return (*self.scalars, *(name for name in self.optional_scalars if name in columns))

    @property
    def media(self) -> tuple[str, ...]:
        """Columns with samples, condition images and masks."""
        return (*self.samples, *self.conditions, *self._region)

    @property
    def _region(self) -> tuple[str, ...]:
        return () if self.region is None else (self.region,)

    @property
    def places(self) -> list[str]:
        """Where each sample of a row stands, then each condition image that it may have, then its region, in words."""

        def of(columns: Sequence[str], count: int | None) -> list[str]:
            names = [f"column '{name}'" for name in columns]
            return names if count is None else [*names[:-1], *(f"{names[-1]}, number {n}" for n in range(count))]

        several = self.images_per_cell if self.images_per_cell > 1 else None
        media = [*of(self.samples, self.samples_per_cell), *of(self.conditions, several)]
        return [*media, *of(self._region, None)]

    @property
    def region_place(self) -> int | None:
        """The region's number in `places`: the last; None without."""
        return None if self.region is None else len(self.places) - 1

    @property
    def mask_and_image(self) -> tuple[int, int] | None:
        """The numbers, in `places`, of the mask and of the image whose size it has; None without."""
        if self.mask is not None:
            mask = self.num_samples + self.conditions.index(self.mask)
            return mask, mask - 1
        # Of a trainer that generates its samples, the mask is all there is.
        return None if self.region_place is None or not self.samples else (self.region_place, 0)

    @property
    def condition_names(self) -> list[str]:
        """Of the condition images that a row may have, as `Family.encode_conditions` takes them."""
        if self.images_per_cell == 1:
            return list(self.conditions)
        *others, last = self.conditions
        return [*others, *(f"{last}/{number}" for number in range(self.images_per_cell))]

    def cells(self, row: dict[str, Any]) -> list[tuple[int, Any]]:
        """A row's samples, then its condition images, then its region, each with its number in `places`."""
        samples = [row[name] for name in self.samples]
        conditions = [row[name] for name in self.conditions]
        if self.samples_per_cell is not None:
            samples = list(row[self.samples[0]])
        if self.images_per_cell > 1 and isinstance(conditions[-1], (list, tuple)):
            conditions = [*conditions[:-1], *conditions[-1]]
        region = [] if self.region is None else [(len(self.places) - 1, row[self.region])]
        return [*enumerate(samples), *enumerate(conditions, start=self.num_samples), *region]

    def condition_shapes(
        self, pipeline: DiffusionPipeline, family: Family, sample_shape: tuple[int, ...], *, all_of_cell: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept of condition images and of the region, by name.

        Args:
            sample_shape: As `Family.encode_samples` takes a sample, without the batch dimension.
            all_of_cell: Whether a cell that may have several images has all of them, or one.
        """
        names = self.condition_names if all_of_cell else self.condition_names[: len(self.conditions)]
        region = {} if self.region is None else {LOSS_REGION: family.region_shape(pipeline, sample_shape)}
        return family.condition_shapes(pipeline, names, sample_shape) | region

    def problem(self, row: dict[str, Any]) -> tuple[str, str] | None:
        """Where a row's cell has a number of samples or condition images that it may not have; or None."""
        if self.images_per_cell > 1 and isinstance(cell := row[self.conditions[-1]], (list, tuple)):
            if not 1 <= len(cell) <= self.images_per_cell:
                message = f"found {len(cell)} images, and the pipeline takes 1 to {self.images_per_cell}"
                return f"column '{self.conditions[-1]}'", message
        for column in self.samples if self.samples_per_cell is not None else ():
            found, most = len(row[column]) if isinstance(row[column], (list, tuple)) else None, self.num_samples
            least = most if self.fewest_per_cell is None else self.fewest_per_cell
            if found is None or not least <= found <= most:
                what = f"a list of {found}" if found is not None else f"a {type(row[column]).__name__}"
                wanted = f"{least}" if least == most else f"{least} to {most}"
                return f"column '{column}'", f"found {what}, wanted a list of {wanted}"
        return None


# The name that inpainting pipelines have for it, so that one data set serves both.
REGION_COLUMN = "mask_image"
PAIRS = Layout(samples=("chosen", "rejected"))


def sample_column(family: Family) -> str:
    """The column of single samples: what the pipeline generates, or "edited_image" where "image" is what it edits."""
    edits = family.modality in family.condition_images
    return f"edited_{family.modality}" if edits else family.modality


def dataset_fingerprint(dataset: Dataset) -> str:
    """The fingerprint that `datasets` keeps of a data set's content and history; it has no public name for it."""
    return dataset._fingerprint


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns, from the first row where a stream does not know them before it is read."""
    return dataset.column_names or list(next(iter(dataset), {}))


def check_columns(
    dataset: Any, label: str, layout: Layout = PAIRS, encoded: Callable[[Any], bool] = lambda dataset: False
) -> None:
    """Raises unless a data set has the needed columns.

    Args:
        dataset: What the caller passed.
        label: "train_dataset" or "eval_dataset", for the message.
        layout: The columns that are needed.
        encoded: Whether a data set needs none of them, since it is encoded already.

    Raises:
        ValueError: No data set, an empty one, or missing columns.
        TypeError: Not a `datasets.Dataset` or `IterableDataset`.
    """
    needed = layout.needed
    if dataset is None:
        raise ValueError(
            f"{label} is missing: pass a datasets.Dataset with the column{'s' * (len(needed) > 1)} "
            f"{', '.join(needed)}."
        )
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"{label} is a {type(dataset).__name__}; pass a datasets.Dataset or IterableDataset (one split, not a "
            "dictionary of splits)."
        )
    if encoded(dataset):
        return
    columns = column_names(dataset)
    missing = [name for name in needed if name not in columns]
    if missing == [layout.region]:
        raise ValueError(
            f"{label} lacks the column {layout.region}, which loss_on_mask=True needs: a mask of the size of each "
            "row's samples, white where errors count and black where not. Found: "
            f"{', '.join(columns)}. Rename yours: dataset.rename_column('your_name', '{layout.region}'); or leave the "
            "option out."
        )
    if missing and set(missing) <= set(layout.conditions):
        needs = "the pipeline edits images, and each row needs the image that its samples were made from"
        if layout.mask is not None:
            image = layout.conditions[layout.conditions.index(layout.mask) - 1]
            needs = (
                f"the pipeline fills in a part of an image, and each row needs the {image} and its {layout.mask}, of "
                "the same size, white where the samples were generated and black where they show the image"
            )
        raise ValueError(
            f"{label} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: {needs}. "
            f"Found: {', '.join(columns)}. Rename yours: "
            f"dataset.rename_columns({{'your_name': '{missing[0]}'}}); or train a pipeline that generates from text."
        )
    if missing:
        raise ValueError(
            f"{label} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; found: "
            f"{', '.join(columns) or 'none'}. Rename yours: "
            f"dataset.rename_columns({{'your_name': '{missing[0]}'}}).{_labelled_pairs(columns)}"
        )
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{label} has no rows.")
    vote = next((name for name in ("label_0", "label_1") if name in columns), None)
    if vote is not None and layout.is_pairs:
        raise ValueError(
            f"{label} has the columns chosen and rejected beside {vote}, which says for each row which of two images "
            "was preferred. Put the preferred one into chosen row by row, leave ties out, and remove label_0 and "
            "label_1; renaming the columns trains on pairs in the wrong order."
        )


def with_condition_column(dataset: Any, family: Family) -> Any:
    """A data set whose condition images are in the family's column, also where that is called `images`."""
    if family.max_condition_images == 1 or not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    column, columns = family.condition_images[-1], column_names(dataset)
    # Beside scores or ranks they are the samples of rankings.
    ranked = any(name == "ranks" or name.split("/")[0] == "scores" for name in columns)
    found = "images" in columns and column not in columns and not ranked
    return dataset.rename_column("images", column) if found else dataset


def check_ignored_columns(dataset: Dataset | IterableDataset, label: str, layout: Layout, family: Family) -> None:
    """Raises if pairs have condition images or masks that an algorithm would not see: they are pairs for editing.

    Raises:
        ValueError: They have.
    """
    found = next((name for name in ("image", "images") if name in column_names(dataset)), None)
    if layout.is_pairs and not layout.conditions and found is not None:
        raise ValueError(
            f"{label} has the column {found}, from which chosen and rejected were edited, and the trained model sees "
            "the prompt alone. Train a pipeline that takes condition images "
            f"({editing_pipelines(family)}), or, to train on the prompts all the same, remove the column: "
            f"load_pairs(...).remove_columns('{found}')."
        )
    inpainting = [each for each in all_families() if each.mask_column in column_names(dataset)]
    mask = next((each.mask_column for each in inpainting if each.mask_column not in layout.media), None)
    if layout.is_pairs and mask is not None:
        raise ValueError(
            f"{label} has the column {mask}, with the part of each image that was generated, and the trained model "
            f"sees no mask. Train a pipeline that does ({', '.join(each.pipeline_class for each in inpainting)}), set "
            "loss_on_mask=True to take errors over that part alone, or remove the column: "
            f"load_pairs(...).remove_columns('{mask}')."
        )


def _labelled_pairs(columns: Sequence[str]) -> str:
    """What to know about Pick-a-Pic's columns, whose order is not the preference."""
    if not {"jpg_0", "jpg_1", "label_0"} <= set(columns):
        return ""
    return (
        " These are Pick-a-Pic's columns: jpg_0 is chosen where label_0 is 1, jpg_1 where it is 0, and 0.5 is a tie, "
        "so renaming alone would give pairs in the wrong order."
    )


def named_datasets(eval_dataset: Any) -> Iterator[tuple[str, Dataset | IterableDataset]]:
    """The data sets by the names under which the loop evaluates them; "" where there is one."""
    if isinstance(eval_dataset, dict):
        yield from eval_dataset.items()
    elif eval_dataset is not None:
        yield "", eval_dataset


def labelled_datasets(eval_dataset: Any) -> Iterator[tuple[str, Any]]:
    """The data sets by what messages call them."""
    for name, dataset in named_datasets(eval_dataset):
        yield (f"eval_dataset[{name!r}]" if isinstance(eval_dataset, dict) else "eval_dataset"), dataset

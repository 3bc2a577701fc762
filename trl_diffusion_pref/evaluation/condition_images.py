"""The images that a pipeline edits, one or several for each prompt."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, overload

from PIL import Image

from ..data.content import cell_key
from ..data.decode.cell import CellProblem
from ..data.decode.image import decode_image


# As they are given for a prompt: one image, or a list of them.
Edited: TypeAlias = Image.Image | list[Image.Image]


class ConditionImages(Sequence[Edited]):
    """Images to edit: for each prompt one, or a list of one or more.

    Each is decoded once when this is made, so that a damaged one is found before hours of sampling, and again whenever
    it is asked for: the images of a large data set do not fit into memory together.

    Args:
        cells: For each prompt a cell as `decode_image` takes it, or a list of cells.
        places: How messages call a prompt's images: a text with {} for its position, or one text for each prompt.

    Attributes:
        cells: As they were given.
        keys: For each prompt, a key of each of its images by their pixels.
        sizes: For each prompt, width and height of each of its images.

    Raises:
        ValueError: An image that cannot be decoded, or an empty list.
    """

    def __init__(self, cells: Sequence[Any], places: str | Sequence[str] = "images, number {}") -> None:
        self.cells = list(cells)
        self.keys: list[tuple[bytes, ...]] = []
        self.sizes: list[tuple[tuple[int, int], ...]] = []
        for number, cell in enumerate(self.cells):
            several = _several(cell)
            place = places.format(number) if isinstance(places, str) else places[number]
            if not several:
                raise ValueError(f"{place}: the list of images is empty; pass one image at least.")
            images = []
            for index, one in enumerate(several):
                try:
                    images.append(decode_image(one))
                except CellProblem as problem:
                    which = f", image {index}" * (len(several) > 1)
                    raise ValueError(f"{place}{which}: {problem}.") from problem
            self.keys.append(tuple(map(cell_key, images)))
            self.sizes.append(tuple(image.size for image in images))

    def select(self, numbers: Sequence[int]) -> "ConditionImages":
        """The images of some prompts, in the order of `numbers`, which may repeat them; nothing is decoded."""
        chosen = ConditionImages(())
        chosen.cells = [self.cells[number] for number in numbers]
        chosen.keys = [self.keys[number] for number in numbers]
        chosen.sizes = [self.sizes[number] for number in numbers]
        return chosen

    def of(self, number: int) -> list[Image.Image]:
        """A prompt's images, RGB, in a list also where it is one."""
        return [decode_image(cell) for cell in _several(self.cells[number])]

    @property
    def in_lists(self) -> bool:
        """Whether a column of a data set has to hold lists of images, since one of the prompts has a list."""
        return any(isinstance(cell, (list, tuple)) for cell in self.cells)

    def column(self) -> list[Any]:
        """The cells of a data set's column, undecoded: all of them images, or all of them lists."""
        return [_several(cell) for cell in self.cells] if self.in_lists else self.cells

    def __len__(self) -> int:
        return len(self.cells)

    @overload
    def __getitem__(self, index: int) -> Edited: ...

    @overload
    def __getitem__(self, index: slice) -> list[Edited]: ...

    def __getitem__(self, index: int | slice) -> Edited | list[Edited]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        images = self.of(index)
        return images if isinstance(self.cells[index], (list, tuple)) else images[0]


# By the column that they are in, which is also the argument of the pipeline's call.
Conditions: TypeAlias = dict[str, ConditionImages]
GivenImages: TypeAlias = Sequence[Any] | Mapping[str, Sequence[Any]] | None


def condition_images(images: GivenImages, count: int) -> Conditions:
    """The images of as many prompts by their column; those that are `ConditionImages` already are not decoded again.

    Args:
        images: For each prompt a cell, or a list of cells, of the column "image"; or such a sequence for each column;
            or None for none.

    Raises:
        ValueError: Another number of them, or see `ConditionImages`.
    """
    by_column = {} if images is None else images if isinstance(images, Mapping) else {"image": images}
    found: Conditions = {}
    for column, cells in by_column.items():
        named = "images" if column == "image" else f"images[{column!r}]"
        if len(cells) != count:
            raise ValueError(f"{len(cells)} {named} for {count} prompts; pass one image, or a list, for each prompt.")
        found[column] = (
            cells if isinstance(cells, ConditionImages) else ConditionImages(cells, f"{named}, number {{}}")
        )
    return found


def select(images: Conditions, numbers: Sequence[int]) -> Conditions:
    """The images of some prompts, see `ConditionImages.select`."""
    return {column: cells.select(numbers) for column, cells in images.items()}


def keys(images: Conditions, count: int) -> list[tuple[bytes, ...]]:
    """Of each of so many prompts, a key of each of its images; empty where there are no images."""
    return [tuple(key for cells in images.values() for key in cells.keys[number]) for number in range(count)]


def images_of(images: Conditions, number: int) -> list[Image.Image]:
    """All images of a prompt."""
    return [image for cells in images.values() for image in cells.of(number)]


def _several(cell: Any) -> list[Any]:
    return list(cell) if isinstance(cell, (list, tuple)) else [cell]

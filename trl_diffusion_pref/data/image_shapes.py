"""What the sizes of images say before any is decoded: which cannot be used, and how much is cropped away."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .bad_rows import BadRowPolicy, RowProblem
from .buckets import BucketOptions, aspect_differences
from .decode.image import cropped_share
from .layouts import Layout


logger = logging.getLogger(__name__)

# More than this is cut from a 4:3 image on its way to a square.
_NOTEWORTHY_CROP = 0.25


def shape_problems(
    sizes: np.ndarray,
    layout: Layout,
    policy: BadRowPolicy,
    buckets: BucketOptions | None,
    lengths: np.ndarray | None = None,
) -> list[RowProblem]:
    """Images that are too small or too thin, masks of another size, rows whose samples differ too much in shape.

    Args:
        sizes: `(N, M, 2)` widths and heights in pixels of each row's images as they are shown, samples first; 0 where
            they are not known.
        buckets: None without.
        lengths: `(N,)`, how many samples each row has. Default: as many as the layout has places.
    """
    sizes, count, problems = sizes.astype(np.int64), layout.num_samples, []
    known: np.ndarray = np.all(sizes > 0, axis=2)
    there = np.ones_like(known)
    if lengths is not None:
        there[:, :count] = np.arange(count) < lengths[:, None]
    short, long = sizes.min(axis=2), sizes.max(axis=2)

    def report(wrong: np.ndarray, allowed: str, kind: str) -> None:
        for row, index in np.argwhere(known & wrong).tolist():
            width, height = sizes[row, index].tolist()
            reason = f"an image of {width}x{height} pixels; {allowed}"
            problems.append(RowProblem(row, layout.places[index], reason, kind))

    report(short < policy.min_image_side, f"min_image_side is {policy.min_image_side}", "too small")
    report(
        long > policy.max_aspect_ratio * short, f"max_aspect_ratio is {policy.max_aspect_ratio:g}", "too long and thin"
    )
    if layout.mask_and_image is not None:
        mask, image = layout.mask_and_image
        both = known[:, [image, mask]].all(axis=1)
        for row in np.flatnonzero(both & (sizes[:, mask] != sizes[:, image]).any(axis=1)).tolist():
            (width, height), (of_mask_width, of_mask_height) = sizes[row, [image, mask]].tolist()
            reason = (
                f"a mask of {of_mask_width}x{of_mask_height} pixels, but the image in {layout.places[image]} has "
                f"{width}x{height}; scale the mask to the image's size"
            )
            problems.append(RowProblem(row, layout.places[mask], reason, "different sizes"))
    if buckets is not None and count > 1 and buckets.on_aspect_difference != "crop":
        rows = np.flatnonzero((known | ~there)[:, :count].all(axis=1))
        filled = np.where(there[:, :, None], sizes, sizes[:, :1])
        differences = aspect_differences(filled[rows, :count])
        for row in rows[differences > buckets.max_aspect_difference].tolist():
            of_row = sizes[row, :count][there[row, :count]]
            shapes = " and ".join(f"{width}x{height}" for width, height in of_row.tolist())
            reason = f"images of {shapes} pixels; max_aspect_difference is {buckets.max_aspect_difference:g}"
            places = " and ".join(layout.places[: len(of_row)])
            problems.append(RowProblem(row, places, reason, "different shapes", buckets.on_aspect_difference))
    return problems


@dataclass(frozen=True)
class CroppingReport:
    """What bringing images to their shapes cuts away.

    Args:
        images: Those whose size is known.
        unknown: The others, such as images behind URLs.
        mean_share: Mean of the shares of its pixels that each image loses, in [0, 1).
        largest_share: Of the image that loses most.
        largest_size: Its width and height in pixels.
        largest_shape: Height and width that it is brought to.
        noteworthy: Images that lose more than a quarter.
        shapes: How many shapes there are to choose from.
    """

    images: int
    unknown: int
    mean_share: float
    largest_share: float
    largest_size: tuple[int, int]
    largest_shape: tuple[int, int]
    noteworthy: int
    shapes: int

    @property
    def is_noteworthy(self) -> bool:
        """Whether an image loses more than a quarter."""
        return self.noteworthy > 0

    def __str__(self) -> str:
        (width, height), (to_height, to_width) = self.largest_size, self.largest_shape
        text = (
            f"cropping removes {self.mean_share:.1%} of an image's pixels on average, at most "
            f"{self.largest_share:.1%} (of {width}x{height} pixels, brought to {to_width}x{to_height})"
        )
        if self.is_noteworthy:
            text += f"; {self.noteworthy} of {self.images} images lose more than {_NOTEWORTHY_CROP:.0%}"
        return text + (f". The sizes of {self.unknown} images are not known" if self.unknown else "")


def cropping_report(
    sizes: np.ndarray, buckets: np.ndarray, shapes: Sequence[tuple[int, int]]
) -> CroppingReport | None:
    """How much of images cropping removes; None where no image's size is known.

    Args:
        sizes: As in `shape_problems`.
        buckets: `(N,)`, which of `shapes` each row is brought to.
        shapes: Heights and widths in pixels.
    """
    of_images = np.repeat(buckets[:, None], sizes.shape[1], axis=1)
    flat = np.concatenate([sizes, of_images[:, :, None]], axis=2).reshape(-1, 3)
    known = flat[(flat[:, :2] > 0).all(axis=1)]
    if not len(known):
        return None
    # Few sizes are distinct.
    distinct, counts = np.unique(known, axis=0, return_counts=True)
    shares = np.asarray(
        [cropped_share((width, height), shapes[bucket]) for width, height, bucket in distinct.tolist()]
    )
    width, height, bucket = distinct[int(shares.argmax())].tolist()
    return CroppingReport(
        images=len(known),
        unknown=len(flat) - len(known),
        mean_share=float(np.average(shares, weights=counts)),
        largest_share=float(shares.max()),
        largest_size=(width, height),
        largest_shape=shapes[bucket],
        noteworthy=int(counts[shares > _NOTEWORTHY_CROP].sum()),
        shapes=len(shapes),
    )


def log_cropping(report: CroppingReport, label: str) -> None:
    """Logs a report; as a warning where an image loses more than a quarter of its pixels."""
    advice = ""
    if report.is_noteworthy:
        advice = (
            " on_aspect_difference='skip' leaves out pairs of different shapes, and a lower max_aspect_ratio takes "
            "longer images for rows that cannot be used."
            if report.shapes > 1
            else " aspect_ratio_buckets=True trains images in their own shapes."
        )
    logger.log(logging.WARNING if report.is_noteworthy else logging.INFO, f"{label}: {report}.{advice}")

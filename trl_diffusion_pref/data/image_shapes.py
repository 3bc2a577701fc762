"""What the sizes of images say before any is decoded: which cannot be used, and how much is cropped away."""

import logging
from collections.abc import Sequence

import numpy as np

from .bad_rows import BadRowPolicy, RowProblem
from .buckets import BucketOptions, aspect_differences
from .decode.image import cropped_share
from .layouts import Layout


logger = logging.getLogger(__name__)

# More than this is cut from a 4:3 image on its way to a square.
_NOTEWORTHY_CROP = 0.25


def shape_problems(
    sizes: np.ndarray, layout: Layout, policy: BadRowPolicy, buckets: BucketOptions | None
) -> list[RowProblem]:
    """Images that are too small or too thin, and rows whose images differ too much in shape.

    Args:
        sizes: `(N, M, 2)` widths and heights in pixels of each row's images; 0 where they are not known.
        buckets: None without.
    """
    sizes, count, problems = sizes.astype(np.int64), layout.num_samples, []
    known: np.ndarray = np.all(sizes > 0, axis=2)
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
    if buckets is not None and count > 1 and buckets.on_aspect_difference != "crop":
        rows = np.flatnonzero(known[:, :count].all(axis=1))
        differences = aspect_differences(sizes[rows, :count])
        for row in rows[differences > buckets.max_aspect_difference].tolist():
            shapes = " and ".join(f"{width}x{height}" for width, height in sizes[row, :count].tolist())
            reason = f"images of {shapes} pixels; max_aspect_difference is {buckets.max_aspect_difference:g}"
            problems.append(RowProblem(row, " and ".join(layout.places[:count]), reason, "different shapes"))
    return problems


def report_cropping(sizes: np.ndarray, buckets: np.ndarray, shapes: Sequence[tuple[int, int]], label: str) -> None:
    """Logs which share of the pixels cropping removes; a warning where an image loses more than a quarter.

    Args:
        sizes: As in `shape_problems`.
        buckets: `(N,)`, which of `shapes` each row is brought to.
        shapes: Heights and widths in pixels.
    """
    of_images = np.repeat(buckets[:, None], sizes.shape[1], axis=1)
    flat = np.concatenate([sizes, of_images[:, :, None]], axis=2).reshape(-1, 3)
    distinct, counts = np.unique(flat[flat[:, 0] > 0], axis=0, return_counts=True)
    if not len(distinct):
        return
    shares = np.asarray(
        [cropped_share((width, height), shapes[bucket]) for width, height, bucket in distinct.tolist()]
    )
    mean, most = float(np.average(shares, weights=counts)), float(shares.max())
    advice = " aspect_ratio_buckets=True trains images in their own shapes." if len(shapes) == 1 else ""
    logger.log(
        logging.WARNING if most > _NOTEWORTHY_CROP else logging.INFO,
        f"{label}: cropping removes {mean:.1%} of the pixels of all images, and {most:.0%} of the image that loses "
        f"most.{advice if most > _NOTEWORTHY_CROP else ''}",
    )

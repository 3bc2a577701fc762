"""Whether a disk has room for what encoding is about to write, which is known before it starts."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path


_FLOAT32_BYTES = 4


def check_space(file: Path, rows: int, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Refuses to fill a disk after hours of encoding.

    Args:
        file: To be written, in a folder that is there. Nothing is checked where it exists.
        rows: How many.
        shapes: Of one row's float32 arrays.
        what: What is written, for the message.

    Raises:
        ValueError: It needs more bytes than the disk has free.
    """
    if file.exists():
        return
    needed = _FLOAT32_BYTES * rows * sum(math.prod(shape) for shape in shapes.values())
    free = shutil.disk_usage(file.parent).free
    if needed > free:
        raise ValueError(
            f"{what} would take {needed / 1e9:.1f} GB, and {file.parent} has {free / 1e9:.1f} GB free. Set "
            "dataset_cache_dir (of preference_accuracy: cache_folder) to a folder on a larger disk, or train on a "
            "streamed data set, which keeps nothing: load_dataset(..., streaming=True)."
        )

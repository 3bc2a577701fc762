"""Arrow features for tensors of fixed shape."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from datasets import Array2D, Array3D, Array4D, Array5D, Features, List, Value


_BY_DIMENSIONS = {2: Array2D, 3: Array3D, 4: Array4D, 5: Array5D}


def array_features(shapes: Mapping[str, tuple[int, ...]], **scalars: str) -> Features:
    """Features with one float32 column per shape, `()` included, and one scalar column per dtype name."""
    columns = {name: Value(dtype) for name, dtype in scalars.items()}
    for name, shape in shapes.items():
        shape = tuple(shape)
        if not shape:
            columns[name] = Value("float32")
        elif len(shape) == 1:
            columns[name] = List(Value("float32"), length=shape[0])
        else:
            columns[name] = _BY_DIMENSIONS[len(shape)](shape=shape, dtype="float32")
    return Features(columns)


_FLOAT32_BYTES = 4


def check_space(file: Path, rows: int, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises before hours of encoding would fill a disk.

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

"""Arrow features for tensors of fixed shape."""

from collections.abc import Mapping

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

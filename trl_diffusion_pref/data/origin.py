"""Where a data set came from, for the model card."""

import re
from typing import Any

from datasets import Dataset, IterableDataset

from .encoded import EncodedDataset
from .layouts import Layout


# What `datasets` calls local files of these formats, instead of a data set's name.
_FORMATS = ("arrow", "csv", "imagefolder", "json", "parquet", "text", "videofolder", "audiofolder", "webdataset")


def origin_of(dataset: Any) -> dict[str, str]:
    """What is known of where a data set came from.

    Returns:
        `id`, on the Hub, or else `name`; empty for one that was made in memory.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return {}
    info = dataset.info
    for url in info.download_checksums or {}:
        if match := re.match(r"hf://datasets/([^/@]+/[^/@]+)@", url):
            return {"id": match.group(1)}
    name = info.dataset_name or info.builder_name
    if not name:
        return {}
    return {"name": f"local files ({name})" if name in _FORMATS else name}


def data_record(dataset: Any, encoded: Any, layout: Layout) -> dict[str, Any]:
    """What a run's record says of the training data.

    Args:
        dataset: As it was before it was encoded.
        encoded: As it is trained on.

    Returns:
        `id` or `name`, `columns` that were read, `rows` (None for streams), and `left_out`, how many by kind.
    """
    stored = isinstance(encoded, EncodedDataset)
    return {
        **origin_of(dataset),
        "columns": list(layout.needed),
        "rows": len(encoded) if stored else None,
        "left_out": encoded.left_out,
    }

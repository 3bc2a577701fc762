"""What is in a data set, before anything is encoded or trained: one pass that reads and changes nothing."""

from .dataset import inspect_dataset
from .result import DatasetInspection


__all__ = ["DatasetInspection", "inspect_dataset"]

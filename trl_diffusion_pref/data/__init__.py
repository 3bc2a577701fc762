"""From rows with a prompt and samples to batches of latents and prompt embeddings, encoded once."""

from .batch import Batch, Collator, Mode, NoisyBatch, Posterior, corrupt, drop_prompts, halves
from .dataset_encoder import DatasetEncoder, on_device
from .encoding import EncodingOptions
from .layouts import PAIRS, Layout, check_columns, column_names, dataset_fingerprint
from .preparation import preparation_for
from .prompts import PromptTable, encode_prompt_table
from .resolution import as_resolution


__all__ = [
    "PAIRS",
    "Batch",
    "Collator",
    "DatasetEncoder",
    "EncodingOptions",
    "Layout",
    "Mode",
    "NoisyBatch",
    "Posterior",
    "PromptTable",
    "as_resolution",
    "check_columns",
    "column_names",
    "corrupt",
    "dataset_fingerprint",
    "drop_prompts",
    "encode_prompt_table",
    "halves",
    "on_device",
    "preparation_for",
]

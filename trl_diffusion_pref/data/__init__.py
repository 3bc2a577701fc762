"""From rows with a prompt and samples to batches of latents and prompt embeddings, encoded once."""

from .batch import Batch, Collator, Mode, NoisyBatch, Posterior, corrupt, halves, with_dropout
from .dataset_encoder import DatasetEncoder
from .encoded import EncodedDataset, load_encoded_dataset
from .encoders import Encoders, on_device
from .layouts import PAIRS, Layout, check_columns, column_names, dataset_fingerprint
from .load import load_pairs
from .options import EncodingOptions
from .origin import data_record
from .pair_options import PairOptions, PairReport
from .pairs import as_pairs, pair_report, pairs_and_report
from .preparation import preparation_for
from .prompts import PromptTable, encode_prompt_table
from .resolution import as_resolution
from .stream_loaders import StreamEvaluationLoader, StreamLoader
from .streams import EncodedStream


__all__ = [
    "PAIRS",
    "Batch",
    "Collator",
    "DatasetEncoder",
    "EncodedDataset",
    "EncodedStream",
    "Encoders",
    "EncodingOptions",
    "Layout",
    "Mode",
    "NoisyBatch",
    "PairOptions",
    "PairReport",
    "Posterior",
    "PromptTable",
    "StreamEvaluationLoader",
    "StreamLoader",
    "as_pairs",
    "as_resolution",
    "check_columns",
    "column_names",
    "corrupt",
    "dataset_fingerprint",
    "encode_prompt_table",
    "halves",
    "load_encoded_dataset",
    "load_pairs",
    "data_record",
    "on_device",
    "pair_report",
    "pairs_and_report",
    "preparation_for",
    "with_dropout",
]

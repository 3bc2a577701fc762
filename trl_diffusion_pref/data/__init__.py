"""From rows with a prompt and two samples to batches of latents and prompt embeddings, encoded once."""

from .collator import RowCollator, conditioning_of
from .columns import PAIR_COLUMNS, check_columns, column_names, dataset_fingerprint
from .encoding import (
    CONDITIONING_PREFIX,
    EncodingOptions,
    encode_rows,
    image_conditioning_prefix,
    latent_columns,
    latent_shape,
    on_device,
    stream_rows,
    uncropped_conditioning,
)
from .noisy import NoisyPairs, corrupt_pairs, drop_prompts, pair_conditioning, pair_latents
from .preparation import preparation_for
from .prompts import PromptTable, cut_prompts, encode_prompt_table, text_fingerprint, truncation_report
from .resolution import as_resolution


__all__ = [
    "CONDITIONING_PREFIX",
    "PAIR_COLUMNS",
    "NoisyPairs",
    "EncodingOptions",
    "RowCollator",
    "PromptTable",
    "as_resolution",
    "check_columns",
    "column_names",
    "conditioning_of",
    "corrupt_pairs",
    "cut_prompts",
    "dataset_fingerprint",
    "drop_prompts",
    "encode_rows",
    "encode_prompt_table",
    "image_conditioning_prefix",
    "latent_columns",
    "latent_shape",
    "on_device",
    "pair_conditioning",
    "pair_latents",
    "preparation_for",
    "stream_rows",
    "text_fingerprint",
    "truncation_report",
    "uncropped_conditioning",
]

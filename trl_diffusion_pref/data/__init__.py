"""From rows with a prompt and two images to batches of latents and prompt embeddings, encoded once."""

from .collator import PairCollator
from .columns import PAIR_COLUMNS, check_pair_columns, column_names, dataset_fingerprint
from .encoding import (
    CONDITIONING_PREFIX,
    LATENT_COLUMNS,
    EncodingOptions,
    encode_pairs,
    on_device,
    stream_pairs,
)
from .noisy import NoisyPairs, corrupt_pairs, pair_conditioning, pair_latents
from .prompts import PromptTable, encode_prompt_table


__all__ = [
    "CONDITIONING_PREFIX",
    "LATENT_COLUMNS",
    "PAIR_COLUMNS",
    "NoisyPairs",
    "EncodingOptions",
    "PairCollator",
    "PromptTable",
    "check_pair_columns",
    "column_names",
    "corrupt_pairs",
    "dataset_fingerprint",
    "encode_pairs",
    "encode_prompt_table",
    "on_device",
    "pair_conditioning",
    "pair_latents",
    "stream_pairs",
]

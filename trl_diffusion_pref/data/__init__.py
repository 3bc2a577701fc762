"""From rows with a prompt and two images to batches of latents and prompt embeddings, encoded once."""

from .collator import PairCollator
from .columns import PAIR_COLUMNS, check_pair_columns
from .encoding import (
    CONDITIONING_PREFIX,
    LATENT_COLUMNS,
    EncodingOptions,
    encode_pairs,
    on_device,
    stream_pairs,
)
from .prompts import PromptTable, encode_prompt_table


__all__ = [
    "CONDITIONING_PREFIX",
    "LATENT_COLUMNS",
    "PAIR_COLUMNS",
    "EncodingOptions",
    "PairCollator",
    "PromptTable",
    "check_pair_columns",
    "encode_pairs",
    "encode_prompt_table",
    "on_device",
    "stream_pairs",
]

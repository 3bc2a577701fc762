"""Prompt embeddings, computed once per distinct prompt and kept on disk."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..families import Family
from ..fingerprint import weights_fingerprint
from .cache import array_features, check_space


# Part of the cache's key: raise it when encoded values change for the same inputs.
_PROMPTS_VERSION = 3
# Cleaned by families that clean prompts, as far as the packages for it are installed: mended by ftfy, stripped by bs4.
_CLEANED_IF_POSSIBLE = "<b>A &amp;amp; B</b> \u00e2\u20ac\u201c C"


class PromptTable:
    """Looks up the conditioning of prompts.

    Args:
        dataset: One row per distinct prompt: `prompt` and one array column per named conditioning tensor.
        encoded_with: `text_fingerprint` of what encoded them.
    """

    def __init__(self, dataset: Dataset, encoded_with: str) -> None:
        self.encoded_with = encoded_with
        self.names = [name for name in dataset.column_names if name != "prompt"]
        self._dataset = dataset.with_format("torch", columns=self.names)
        self._row = {prompt: row for row, prompt in enumerate(dataset["prompt"])}

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._row

    def add(self, other: "PromptTable") -> None:
        """Takes in another table's prompts, in place, so that whoever holds this one can look them up."""
        both = concatenate_datasets([self._dataset.with_format(None), other._dataset.with_format(None)])
        PromptTable.__init__(self, both, self.encoded_with)

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning tensors `(len(prompts), ...)` float32 on the CPU."""
        batch = self._dataset[[self._row[prompt] for prompt in prompts]]
        return {name: torch.as_tensor(batch[name]) for name in self.names}


def text_fingerprint(pipeline: DiffusionPipeline, family: Family) -> str:
    """Of all that `encode_prompts` depends on, prompts aside.

    Encoders, tokenizers, how prompts are cleaned, how family, pipeline and denoiser are configured, and the versions
    of diffusers and transformers. Ask for it after prompts were encoded once: Sana's pipeline sets up its tokenizer
    only then.
    """
    own = set(pipeline.config) - set(pipeline.components)
    configs = [
        {key: value for key, value in config.items() if not key.startswith("_")}
        for config in ({key: pipeline.config[key] for key in own}, family.denoiser(pipeline).config)
    ]
    return Hasher.hash(
        [
            family.pipeline_class,
            [weights_fingerprint(module) for module in family.encoders(pipeline)],
            [
                _tokenizer_description(part)
                for part in pipeline.components.values()
                if isinstance(part, PreTrainedTokenizerBase)
            ],
            json.dumps(configs, sort_keys=True, default=str),
            family.tokenized_text(pipeline, _CLEANED_IF_POSSIBLE),
            vars(family),
            (diffusers.__version__, transformers.__version__),
        ]
    )


def _tokenizer_description(tokenizer: PreTrainedTokenizerBase) -> str:
    """Vocabulary, merges and what else decides a text's tokens."""
    described: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "length": tokenizer.model_max_length,
        "side": [tokenizer.padding_side, tokenizer.truncation_side],
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        described |= json.loads(tokenizer.backend_tokenizer.to_str())
        # What the last call asked for, not part of the tokenizer.
        described["truncation"] = described["padding"] = None
    else:
        described["vocabulary"] = tokenizer.get_vocab()
    return json.dumps(described, sort_keys=True, default=str)


def encode_prompt_table(
    prompts: Iterable[str], pipeline: DiffusionPipeline, family: Family, *, cache_folder: Path, batch_size: int
) -> PromptTable:
    """Encodes the distinct prompts, or finds them in the cache. The empty one is `Family.encode_unconditional`.

    Args:
        prompts: With repetitions, in any order.
        pipeline: Its text encoders are used where they are.
        cache_folder: Holds one Arrow file per key: `text_fingerprint` and set of prompts.

    Raises:
        ValueError: The disk has no room for the embeddings.
    """
    # The empty prompt is always there: prompt dropout and guidance need it.
    distinct = list(dict.fromkeys(["", *prompts]))
    # First, because a pipeline may set up its tokenizers when it encodes, and they are part of the cache's key.
    unconditional = family.encode_unconditional(pipeline)
    encoded_with = text_fingerprint(pipeline, family)
    fingerprint = Hasher.hash([_PROMPTS_VERSION, encoded_with, distinct])

    def encode(batch: dict[str, list]) -> dict[str, np.ndarray]:
        texts = [prompt for prompt in batch["prompt"] if prompt]
        encoded = family.encode_prompts(pipeline, texts) if texts else {}
        # Only the very first row is the empty prompt.
        parts = [unconditional] * ("" in batch["prompt"]) + [encoded] * bool(texts)
        return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in unconditional}

    shapes = {name: tuple(tensor[0].shape) for name, tensor in unconditional.items()}
    file = cache_folder / f"prompts-{fingerprint}.arrow"
    check_space(file, len(distinct), shapes, f"The embeddings of {len(distinct)} distinct prompts")
    with without_truncation_messages(pipeline):
        table = Dataset.from_dict({"prompt": distinct}).map(
            encode,
            batched=True,
            batch_size=batch_size,
            features=array_features(shapes, prompt="string"),
            new_fingerprint=fingerprint,
            cache_file_name=str(file),
            desc="Encoding prompts",
        )
    return PromptTable(table, encoded_with)


def cut_prompts(prompts: Sequence[str], pipeline: DiffusionPipeline, family: Family) -> dict[str, tuple[int, int]]:
    """How many of the prompts are longer than a tokenizer's limit, and that limit, by the tokenizer's attribute.

    Tokenizers that cut none are left out.
    """
    texts = [family.tokenized_text(pipeline, prompt) for prompt in prompts]
    cut = {}
    for name, limit in family.token_limits(pipeline).items():
        tokens = getattr(pipeline, name)(texts, verbose=False)["input_ids"] if texts else []
        count = sum(len(row) > limit for row in tokens)
        if count:
            cut[name] = (count, limit)
    return cut


def truncation_report(prompts: Iterable[str], pipeline: DiffusionPipeline, family: Family) -> str | None:
    """A sentence on the distinct prompts that `cut_prompts` counts; None where there are none."""
    distinct = list(dict.fromkeys(prompts))
    cut = cut_prompts(distinct, pipeline, family)
    if not cut:
        return None
    counts = ", ".join(f"{count} at the {limit} tokens of {name}" for name, (count, limit) in cut.items())
    return (
        f"Of {len(distinct)} distinct prompts some are too long: {counts}. Tokens past the limit are ignored, in "
        "training and in sampling; shorten the prompts if it matters."
    )


@contextmanager
def without_truncation_messages(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Keeps diffusers and transformers from naming each prompt that is cut; `truncation_report` counts them."""
    names = {kind.__module__ for kind in type(pipeline).__mro__ if kind.__module__.startswith("diffusers.")}
    loggers = [logging.getLogger(name) for name in (*names, PreTrainedTokenizerBase.__module__)]
    for logger in loggers:
        logger.addFilter(_says_something_else)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_says_something_else)


def _says_something_else(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "was truncated because" not in message and "Token indices sequence length" not in message

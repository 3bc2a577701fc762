"""Prompt embeddings, computed once per distinct prompt and kept on disk."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from datasets.fingerprint import Hasher
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..families import Family
from ..fingerprint import weights_fingerprint
from .cache import Part, encode_missing, rows_per_shard, stored_bytes
from .options import EncodingOptions, as_stored
from .shards import ShardedTensors, as_keys, key_of


# Part of the cache's key: raise it when encoded values change for the same inputs.
_PROMPTS_VERSION = 4
# Cleaned by families that clean prompts, as far as the packages for it are installed: mended by ftfy, stripped by bs4.
_CLEANED_IF_POSSIBLE = "<b>A &amp;amp; B</b> \u00e2\u20ac\u201c C"


class PromptTable:
    """Looks up the conditioning of prompts.

    Args:
        folder: Its shards.
        lengths: Of the tensors that are padded, how long they are with their padding, by name.
        encoded_with: `text_fingerprint` of what encoded them.
    """

    def __init__(self, folder: Path, lengths: Mapping[str, int], encoded_with: str) -> None:
        self.lengths, self.encoded_with = dict(lengths), encoded_with
        self.shards = ShardedTensors(folder)
        self._numbers: dict[str, int] = {}
        self._places = np.empty((0, 2), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._numbers

    def add(self, prompts: Iterable[str]) -> None:
        """Takes in prompts that are stored, in place, so that whoever holds this table can look them up."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._numbers]
        if not new:
            return
        self.shards.refresh()
        places = self.shards.locate(as_keys(map(prompt_key, new)))
        if (places < 0).any():
            missing = new[int(np.argmin(places[:, 0]))]
            raise KeyError(f"the prompt {missing!r} was not encoded")
        # Earlier places are found again too, since shards are counted in the order of their names.
        known = list(self._numbers)
        self._places = np.concatenate([self.shards.locate(as_keys(map(prompt_key, known))), places])
        self._numbers |= {prompt: number for number, prompt in enumerate(new, start=len(known))}

    def numbers(self, prompts: Sequence[str]) -> np.ndarray:
        """Of each prompt, for `conditioning`, `(len(prompts),)` int32."""
        return np.asarray([self._numbers[prompt] for prompt in prompts], dtype=np.int32)

    def conditioning(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Conditioning tensors `(len(numbers), ...)` on the CPU, in the dtypes that they are kept in."""
        distinct = list(dict.fromkeys(int(number) for number in numbers))
        read = {number: self._padded(self.shards.read(self._places[number])) for number in distinct}
        rows = [read[int(number)] for number in numbers]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`conditioning` of prompts by their text."""
        return self.conditioning(self.numbers(prompts).tolist())

    def _padded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, length in self.lengths.items():
            missing = length - len(tensors[name])
            if missing:
                padding = tensors[name].new_zeros(missing, *tensors[name].shape[1:])
                tensors[name] = torch.cat([tensors[name], padding])
        return tensors


def prompt_key(prompt: str) -> bytes:
    """By which a prompt is stored; the empty one is the unconditional side."""
    return key_of("prompt", prompt)


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
    prompts: Iterable[str],
    pipeline: DiffusionPipeline,
    family: Family,
    *,
    cache_folder: Path,
    batch_size: int,
    options: EncodingOptions | None = None,
) -> PromptTable:
    """Encodes the distinct prompts, or finds them in the cache. The empty one is `Family.encode_unconditional`.

    All processes encode their share, in shards that count when they are whole.

    Args:
        prompts: With repetitions, in any order.
        pipeline: Its text encoders are used where they are.
        cache_folder: Has one folder of shards for each `text_fingerprint` and dtype.
        batch_size: Prompts that the text encoders take at once.
        options: Their dtype is taken.

    Raises:
        ValueError: The disk has no room for the embeddings.
    """
    options = options or EncodingOptions()
    # The empty prompt is always there: prompt dropout and guidance need it.
    distinct = list(dict.fromkeys(["", *prompts]))
    # First, because a pipeline may set up its tokenizers when it encodes, and they are part of the cache's key.
    unconditional = family.encode_unconditional(pipeline)
    encoded_with = text_fingerprint(pipeline, family)
    dtype = options.stored_dtype(family.text_dtype(pipeline))
    folder = cache_folder / f"prompts-{key_of(_PROMPTS_VERSION, encoded_with, str(dtype)).hex()}"
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in unconditional.items()}
    lengths = {name: shape[0] for name, shape in shapes.items() if len(shape) >= 2}
    table = PromptTable(folder, lengths, encoded_with)

    def encode(rows: np.ndarray) -> Part:
        encoded: list[dict[str, Tensor]] = []
        for start in range(0, len(rows), batch_size):
            texts = [distinct[row] for row in rows[start : start + batch_size]]
            asked = [text for text in texts if text]
            given = family.encode_prompts(pipeline, asked) if asked else {}
            # Only the very first of all is the empty prompt.
            parts = [unconditional] * ("" in texts) + [given] * bool(asked)
            both = {name: torch.cat([part[name] for part in parts]) for name in unconditional}
            encoded += [
                _without_padding({name: tensor[row] for name, tensor in both.items()}, family, dtype)
                for row in range(len(texts))
            ]
        return Part(rows, encoded)

    # An estimate from above: padding is not stored.
    bytes_per_row = stored_bytes(shapes, dtype)
    size = rows_per_shard(bytes_per_row, batch_size)
    with without_truncation_messages(pipeline):
        encode_missing(
            table.shards,
            as_keys(map(prompt_key, distinct)),
            np.arange(len(distinct)),
            lambda rows: [rows[start : start + size] for start in range(0, len(rows), size)],
            encode,
            label="prompts",
            bytes_per_row=bytes_per_row,
        )
    table.add(distinct)
    return table


def _without_padding(tensors: Mapping[str, Tensor], family: Family, dtype: torch.dtype) -> dict[str, Tensor]:
    """A prompt's tensors as they are kept: without trailing zeros, and without what the denoiser masks."""
    kept = {}
    for name, value in tensors.items():
        if value.ndim >= 2:
            used = value.flatten(1).any(dim=1)
            if name in family.prompt_masks:
                used = tensors[family.prompt_masks[name]].bool()
                value = value * used.to(value).reshape(-1, *[1] * (value.ndim - 1))
            positions = used.nonzero()
            value = value[: int(positions.max()) + 1 if len(positions) else 0]
        kept[name] = as_stored(value, dtype)
    return kept


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

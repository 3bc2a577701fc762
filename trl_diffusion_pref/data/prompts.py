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
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

from ..families import Family
from ..families.denoisers import CHOICE
from ..fingerprint import weights_fingerprint
from .cache import Part, encode_missing, rows_per_shard, stored_bytes
from .options import EncodingOptions, as_stored
from .shards import ShardedTensors, as_keys, key_of


# Part of the cache's key: raise it when encoded values change for the same inputs.
_PROMPTS_VERSION = 5
_TOKENIZED_AT_ONCE = 1000
# Relative difference of embeddings up to which they are the same, computed in another precision or on another device.
_ROUNDING = 0.05
# Cleaned by families that clean prompts, as far as the packages for it are installed: mended by ftfy, stripped by bs4.
_CLEANED_IF_POSSIBLE = "<b>A &amp;amp; B</b> \u00e2\u20ac\u201c C"


class PromptTable:
    """Looks up the conditioning of prompts.

    Args:
        shards: Where they are.
        lengths: Of the tensors that are padded, how long they are with their padding, by name.
        record: `text_record` of what encoded them.

    Attributes:
        encoded_with: The fingerprint of the record.
    """

    def __init__(self, shards: ShardedTensors, lengths: Mapping[str, int], record: dict[str, Any]) -> None:
        self.lengths, self.record, self.encoded_with = dict(lengths), record, key_of(record).hex()
        self._sources = [shards]
        self._numbers: dict[str, int] = {}
        # Number of the source and place in it.
        self._places = np.empty((0, 3), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._numbers

    @property
    def texts(self) -> list[str]:
        """The prompts in the order of their numbers."""
        return list(self._numbers)

    def add(self, prompts: Iterable[str]) -> None:
        """Takes in prompts that are stored, in place, so that whoever holds this table can look them up.

        Raises:
            KeyError: One is not stored.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._numbers]
        if not new:
            return
        self.shards.refresh()
        places = self.shards.locate(as_keys(map(prompt_key, new)))
        if (places < 0).any():
            missing = new[int(np.argmin(places[:, 0]))]
            raise KeyError(f"the prompt {missing!r} was not encoded")
        self._append(new, 0, places)

    def absorb(self, other: "PromptTable") -> None:
        """Takes in all prompts of another table where they are."""
        if other is self:
            return
        for source, shards in enumerate(other._sources):
            texts = [text for text, number in other._numbers.items() if other._places[number, 0] == source]
            new = [text for text in texts if text not in self._numbers]
            if new:
                if shards not in self._sources:
                    self._sources.append(shards)
                places = other._places[other.numbers(new), 1:]
                self._append(new, self._sources.index(shards), places)

    def _append(self, prompts: Sequence[str], source: int, places: np.ndarray) -> None:
        first = len(self._numbers)
        self._numbers |= {prompt: number for number, prompt in enumerate(prompts, start=first)}
        sources = np.full((len(places), 1), source, dtype=np.int32)
        self._places = np.concatenate([self._places, np.concatenate([sources, places], axis=1)])

    def numbers(self, prompts: Iterable[str]) -> np.ndarray:
        """Of each prompt, for `conditioning`, `(len(prompts),)` int32."""
        return np.fromiter((self._numbers[prompt] for prompt in prompts), dtype=np.int32)

    def conditioning(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Conditioning tensors `(len(numbers), ...)` on the CPU, in the dtypes that they are kept in."""
        read = {number: self._padded(self._read(number)) for number in dict.fromkeys(map(int, numbers))}
        rows = [read[int(number)] for number in numbers]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`conditioning` of prompts by their text."""
        return self.conditioning(self.numbers(prompts).tolist())

    def copy_to(self, folder: Path, numbers: np.ndarray) -> list[Path]:
        """Puts the embeddings of prompts into another folder, see `ShardedTensors.copy_rows`; returns the files."""
        files = []
        for source, shards in enumerate(self._sources):
            places = self._places[numbers]
            own = places[places[:, 0] == source, 1:]
            files += shards.copy_rows(own, folder) if len(own) else []
        return files

    def differs_from(self, prompts: Sequence[str], pipeline: DiffusionPipeline, family: Family) -> list[str]:
        """Which tensors of some prompts a pipeline gives otherwise than they are stored, beyond rounding."""
        if not prompts:
            return []
        stored, given = self(prompts), family.encode_prompts(pipeline, list(prompts))
        rows = [{name: tensor[row] for name, tensor in given.items()} for row in range(len(prompts))]
        kept = [self._padded(_without_padding(row, family, torch.float32)) for row in rows]
        computed = {name: torch.stack([row[name] for row in kept]) for name in given}
        return [
            name
            for name, values in computed.items()
            if name not in stored or not _nearly_equal(stored[name].float(), values.float())
        ]

    @property
    def shards(self) -> ShardedTensors:
        """Where new prompts come."""
        return self._sources[0]

    def _read(self, number: int) -> dict[str, Tensor]:
        source, *place = self._places[number].tolist()
        return self._sources[source].read(np.asarray(place))

    def _padded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, length in self.lengths.items():
            missing = length - len(tensors[name])
            if missing:
                padding = tensors[name].new_zeros(missing, *tensors[name].shape[1:])
                tensors[name] = torch.cat([tensors[name], padding])
        return tensors


def _nearly_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).norm() <= _ROUNDING * other.norm())


def prompt_key(prompt: str) -> bytes:
    """By which a prompt is stored; the empty one is the unconditional side."""
    return key_of("prompt", prompt)


def text_record(pipeline: DiffusionPipeline, family: Family) -> dict[str, Any]:
    """All that `encode_prompts` depends on, prompts aside, by name; what JSON can hold.

    Encoders, tokenizers, how prompts are cleaned, how family, pipeline and denoiser are configured, and the versions
    of diffusers and transformers. Ask for it after prompts were encoded once: Sana's pipeline sets up its tokenizer
    only then.
    """
    own = sorted(set(pipeline.config) - set(pipeline.components))
    configs = {
        "pipeline": {key: pipeline.config[key] for key in own},
        (family.denoiser_names or (family.denoiser_name,))[0]: dict(family.denoiser_config(pipeline)),
    }
    record = {
        "text encoders": {
            name: weights_fingerprint(module)
            for name in family.encoder_names
            if name != "vae" and (module := getattr(pipeline, name, None)) is not None
        },
        "tokenizers": {
            name: key_of(_tokenizer_description(part)).hex()
            for name, part in ((name, _tokenizer_of(part)) for name, part in pipeline.components.items())
            if isinstance(part, PreTrainedTokenizerBase)
        },
        # How images are prepared for an encoder that sees them.
        **{
            name: json.loads(part.to_json_string())
            for name, part in pipeline.components.items()
            if isinstance(part, ProcessorMixin) and family.prompts_see_images
        },
        "configs": {
            name: {key: value for key, value in config.items() if not key.startswith("_")}
            for name, config in configs.items()
        },
        "cleaned prompt": family.tokenized_text(pipeline, _CLEANED_IF_POSSIBLE),
        # Which denoiser is trained changes no prompt.
        "family": {name: value for name, value in vars(family).items() if name not in CHOICE},
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    return json.loads(json.dumps(record, default=str))


def text_fingerprint(pipeline: DiffusionPipeline, family: Family) -> str:
    """Of `text_record`."""
    return key_of(text_record(pipeline, family)).hex()


def _tokenizer_of(part: Any) -> Any:
    """A pipeline's tokenizer itself, where what it calls its tokenizer is a processor of texts and images."""
    return part.tokenizer if isinstance(part, ProcessorMixin) else part


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
        cache_folder: Has one folder of shards for each `text_record` and dtype.
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
    record = text_record(pipeline, family)
    dtype = options.stored_dtype(family.text_dtype(pipeline))
    folder = cache_folder / f"prompts-{key_of(_PROMPTS_VERSION, record, str(dtype)).hex()}"
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in unconditional.items()}
    lengths = {name: shape[0] for name, shape in shapes.items() if len(shape) >= 2}
    shards = ShardedTensors(folder)
    table = PromptTable(shards, lengths, record)

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
            shards,
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
    limits = family.token_limits(pipeline)
    counts = dict.fromkeys(limits, 0)
    # In parts: the tokens of a million prompts are gigabytes of Python numbers.
    for start in range(0, len(prompts), _TOKENIZED_AT_ONCE):
        texts = [family.tokenized_text(pipeline, prompt) for prompt in prompts[start : start + _TOKENIZED_AT_ONCE]]
        for name, limit in limits.items():
            tokenized = _tokenizer_of(getattr(pipeline, name))(texts, verbose=False)
            counts[name] += sum(len(row) > limit for row in tokenized["input_ids"])
    return {name: (count, limits[name]) for name, count in counts.items() if count}


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

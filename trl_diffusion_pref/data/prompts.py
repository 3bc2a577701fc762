"""Prompt embeddings, computed once per distinct prompt and kept on disk."""

from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..families import Family
from ..fingerprint import weights_fingerprint
from .arrays import array_features


class PromptTable:
    """Looks up the conditioning of prompts.

    Args:
        dataset: One row per distinct prompt: `prompt` and one array column per named conditioning tensor.
    """

    def __init__(self, dataset: Dataset) -> None:
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
        self.__init__(both)

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning tensors `(len(prompts), ...)` float32 on the CPU."""
        batch = self._dataset[[self._row[prompt] for prompt in prompts]]
        return {name: torch.as_tensor(batch[name]) for name in self.names}


def encode_prompt_table(
    prompts: Iterable[str], pipeline: DiffusionPipeline, family: Family, *, cache_folder: Path, batch_size: int
) -> PromptTable:
    """Encodes the distinct prompts and the empty one, or finds them in the cache.

    Args:
        prompts: With repetitions, in any order.
        pipeline: Its text encoders are used where they are.
        cache_folder: Holds one Arrow file per (text encoders, set of prompts).
    """
    # The empty prompt is always there: prompt dropout and guidance need it.
    distinct = list(dict.fromkeys(["", *prompts]))
    encoders = [weights_fingerprint(module) for module in family.encoders(pipeline)]
    tokenizers = [
        part.get_vocab() for part in pipeline.components.values() if isinstance(part, PreTrainedTokenizerBase)
    ]
    fingerprint = Hasher.hash([family.pipeline_class, encoders, Hasher.hash(tokenizers), distinct])
    probe = family.encode_prompts(pipeline, [""])

    def encode(batch: dict[str, list]) -> dict:
        return {
            name: tensor.cpu().numpy() for name, tensor in family.encode_prompts(pipeline, batch["prompt"]).items()
        }

    table = Dataset.from_dict({"prompt": distinct}).map(
        encode,
        batched=True,
        batch_size=batch_size,
        features=array_features({name: tensor[0].shape for name, tensor in probe.items()}, prompt="string"),
        new_fingerprint=fingerprint,
        cache_file_name=str(cache_folder / f"prompts-{fingerprint}.arrow"),
        desc="Encoding prompts",
    )
    return PromptTable(table)

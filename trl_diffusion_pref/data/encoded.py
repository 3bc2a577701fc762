"""A data set of which samples and prompts are encoded, with its rows on disk; and its form for other machines.

A saved data set is a folder: shards of samples and of prompts, the rows' numbers as safetensors, and one JSON file
with the rest, which is written last. Only safetensors and JSON are read.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..export.files import write_whole
from .batch import MEAN, PROMPT_NUMBER, SCALAR
from .cells import caption_number
from .prompts import PromptTable
from .shards import KEY, ShardedTensors, key_of


# Part of a saved data set: raise it when older versions of this package cannot read it.
_FORMAT = 1
_DOCUMENT, _ROWS, _SAMPLES, _PROMPTS = "encoded_dataset.json", "rows.safetensors", "samples", "prompts"
_AGAIN = "Save or download the encoded data set again."
# Of which other versions are compared by what they compute.
LIBRARIES = ("diffusers", "transformers")


@dataclass
class EncodedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of latents and prompt embeddings, read from disk when they are asked for.

    `dataset[i]` is a dictionary with `row` (int), `prompt` (the number of its prompt in the table), tensors by the
    names of `Batch`'s parts (`latents/mean` `(S, C, ...)`, `latents/std`, and names that begin with `sample/` and
    `condition/`) in the dtypes that they are kept in, and numbers whose names begin with `scalar/`.

    Args:
        rows: `(N,)` int64, positions in the data set that it was made from; those that were left out are missing.
        samples: Encoded samples, or None for data sets of prompts alone.
        places: `(N, 2)`, where each row is in `samples`.
        prompts: Embeddings.
        captions: `(M,)` int32, numbers of prompts, row after row. Of several, one is drawn for each epoch.
        first_captions: `(N + 1,)` int64, where each row's begin.
        scalars: Columns of numbers, `(N,)` or `(N, S)` float32.
        buckets: `(N,)`, which of `sizes` each row has.
        sizes: Heights and widths in pixels; empty where all rows are alike.
        record: What the values depend on, by name.
        fingerprint: Of the rows' content and of the record.
        left_out: How many rows were left out, by kind.
        seed: Of the choice among captions.
    """

    rows: np.ndarray
    samples: ShardedTensors | None
    places: np.ndarray
    prompts: PromptTable
    captions: np.ndarray
    first_captions: np.ndarray
    scalars: Mapping[str, np.ndarray]
    buckets: np.ndarray
    sizes: Sequence[tuple[int, int]]
    record: dict[str, Any]
    fingerprint: str
    left_out: dict[str, int] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        # In memory that the workers of a loader share, which have copies of everything else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Chooses among several captions of a row."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, (first, end) = int(self.rows[index]), self.first_captions[index : index + 2].tolist()
        first += caption_number(end - first, self.seed, row, int(self._epoch))
        values: dict[str, Any] = {} if self.samples is None else self.samples.read(self.places[index])
        for name, column in self.scalars.items():
            numbers = torch.as_tensor(column[index])
            # Of rankings, as many as the row has samples.
            values[SCALAR + name] = numbers[: len(values[MEAN])] if numbers.ndim else numbers
        return {"row": row, PROMPT_NUMBER: int(self.captions[first]), **values}

    def subset(self, indices: np.ndarray) -> "EncodedDataset":
        """Some of the rows, in the order of the indices."""
        counts = np.diff(self.first_captions)[indices]
        captions = [self.captions[self.first_captions[i] : self.first_captions[i + 1]] for i in indices.tolist()]
        return replace(
            self,
            rows=self.rows[indices],
            places=self.places[indices],
            captions=np.concatenate([self.captions[:0], *captions]),
            first_captions=np.cumsum([0, *counts.tolist()]),
            scalars={name: column[indices] for name, column in self.scalars.items()},
            buckets=self.buckets[indices],
            fingerprint=key_of(self.fingerprint, np.ascontiguousarray(indices).tobytes()).hex(),
        )

    def latent_shapes(self) -> dict[int, tuple[int, ...]]:
        """The shape of one sample's latents in each bucket that has rows."""
        return {bucket: shape[1:] for bucket, shape in self._shapes().items()}

    @property
    def most_samples(self) -> int:
        """Samples of the row that has most."""
        return max((shape[0] for shape in self._shapes().values()), default=0)

    def _shapes(self) -> dict[int, tuple[int, ...]]:
        """Of a row's latents, `(S, ...)`, in each bucket that has rows."""
        if self.samples is None:
            return {}
        firsts = {bucket: int(np.argmax(self.buckets == bucket)) for bucket in np.unique(self.buckets).tolist()}
        return {bucket: self.samples.shapes(self.places[row])[MEAN] for bucket, row in firsts.items()}

    # ---- For another machine -------------------------------------------------------------------------------------

    def check_fits(self, record: Mapping[str, Any], label: str, required: Sequence[str] = ()) -> None:
        """Raises where a run would have encoded the rows otherwise.

        Args:
            record: The run's, as `record`.
            label: How messages call the data set.
            required: Columns of numbers that the run needs.

        Raises:
            ValueError: Names each thing that differs, as it was made and as the run has it.
        """
        made, own = dict(_flat(self.record)), dict(_flat(record))
        different = [
            f"{name}: made with {made.get(name)!r}, this run has {own.get(name)!r}"
            for name in [*own, *(made.keys() - own.keys())]
            if made.get(name) != own.get(name) and name not in {f"prompts, {library}" for library in LIBRARIES}
        ]
        # What was made for drawing from the posterior has its mean too.
        if made.get("latent_sampling") == "sample":
            different = [line for line in different if not line.startswith("latent_sampling: ")]
        missing = [name for name in required if name not in self.scalars]
        different += [f"column {name}: it has none, and this run needs it" for name in missing]
        if different:
            listed = "\n  ".join(different)
            raise ValueError(
                f"{label} was encoded for something else:\n  {listed}\nGive this run the model and the options that "
                "it was made with, or encode it again with encode_dataset."
            )

    def save_to_disk(self, folder: str | os.PathLike) -> None:
        """Writes the data set, for `load_encoded_dataset` on any machine; of several processes the main one does.

        Files of the cache are linked where the folder is on the same disk, and copied elsewhere. A save that was
        interrupted goes on.

        Raises:
            ValueError: The folder has another encoded data set.
        """
        state = PartialState()
        if state.is_main_process:
            self._save(Path(folder))
        state.wait_for_everyone()

    def _save(self, folder: Path) -> None:
        document = folder / _DOCUMENT
        if document.is_file():
            if _read_document(document)["fingerprint"] == self.fingerprint:
                return
            raise ValueError(f"{folder} has another encoded data set. Remove it, or give another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        # The empty prompt is the unconditional side, which is always kept.
        used = np.union1d(self.captions, self.prompts.numbers([""]))
        files = self.prompts.copy_to(folder / _PROMPTS, used)
        arrays = {
            "rows": self.rows,
            "captions": np.searchsorted(used, self.captions).astype(np.int32),
            "first_captions": self.first_captions,
            "buckets": self.buckets,
            **{SCALAR + name: column for name, column in self.scalars.items()},
        }
        if self.samples is not None:
            files += self.samples.copy_rows(self.places, folder / _SAMPLES)
            arrays["keys"] = self.samples.keys_at(self.places).view(np.uint8).reshape(len(self), KEY.itemsize)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        write_whole(folder / _ROWS, save(tensors))
        texts = self.prompts.texts
        listed = {file.relative_to(folder).as_posix(): file.stat().st_size for file in [*files, folder / _ROWS]}
        whole = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "record": self.record,
            "sizes": [list(size) for size in self.sizes],
            "left_out": self.left_out,
            "prompt_lengths": self.prompts.lengths,
            "prompts": [texts[number] for number in used.tolist()],
            "files": dict(sorted(listed.items())),
        }
        write_whole(folder / "README.md", self._card().encode())
        write_whole(document, json.dumps(whole, indent=1, ensure_ascii=False).encode())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload encoded data set",
    ) -> CommitInfo | None:
        """Uploads the data set, for `load_encoded_dataset(repo_id)`; of several processes the main one does.

        For more than some hundred gigabytes `save_to_disk`, and `hf upload-large-folder`, which goes on where it was
        interrupted, suit better.

        Args:
            repo_id: Of a data set, which is made where it does not exist.
            private: Whether it is made private; None for the owner's default.
            token: Default: the one that `hf auth login` stored.
            revision: A branch.

        Returns:
            The commit, in the main process.
        """
        state, commit = PartialState(), None
        if state.is_main_process:
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
            # On the disk of the cache files can be linked.
            beside = (self.samples or self.prompts.shards).folder.parent
            with tempfile.TemporaryDirectory(dir=beside if os.access(beside, os.W_OK) else None) as folder:
                self._save(Path(folder))
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    repo_type="dataset",
                    revision=revision,
                    commit_message=commit_message,
                    delete_patterns=[f"{_SAMPLES}/*", f"{_PROMPTS}/*"],
                )
        state.wait_for_everyone()
        return commit

    def _card(self) -> str:
        made = {name: value for name, value in self.record.items() if name != "prompts"}
        lines = [f"| {name} | {value} |" for name, value in made.items()]
        return "\n".join(
            [
                "---",
                "tags: [trl-diffusion-pref, encoded]",
                "viewer: false",
                "---",
                "",
                "# Encoded data set",
                "",
                f"{len(self)} rows and {len(set(self.captions.tolist()))} prompts, encoded for a "
                f"{self.record['pipeline']} by trl-diffusion-pref. Latents show nearly all that the images showed.",
                "",
                "```python",
                "from trl_diffusion_pref import load_encoded_dataset",
                "",
                'dataset = load_encoded_dataset("<this repository or a folder>")',
                "```",
                "",
                "It is passed to a trainer as `train_dataset` or `eval_dataset`, with the model and the options that "
                "it was made with:",
                "",
                "| option | value |",
                "|---|---|",
                *lines,
                "",
            ]
        )


def is_encoded_dataset(source: str | os.PathLike) -> bool:
    """Whether a path is a folder that [`EncodedDataset.save_to_disk`] wrote."""
    return (Path(source) / _DOCUMENT).is_file()


def load_encoded_dataset(
    source: str | os.PathLike, *, revision: str | None = None, token: str | None = None
) -> EncodedDataset:
    """Loads what [`EncodedDataset.save_to_disk`] or [`EncodedDataset.push_to_hub`] wrote.

    Args:
        source: A folder, or a data set on the Hub, which is downloaded whole.
        revision, token: Of the Hub.

    Returns:
        For a trainer's `train_dataset` or `eval_dataset`.

    Raises:
        ValueError: The folder has no encoded data set, or one with a file that is missing, cut off or damaged, or one
            that a newer version of this package wrote.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or str(source).startswith("."):
            raise ValueError(f"{source} is no folder.")
        state = PartialState()
        # One process of each machine downloads; the others find the files.
        with state.local_main_process_first():
            folder = Path(snapshot_download(str(source), repo_type="dataset", revision=revision, token=token))
    document = _read_document(folder / _DOCUMENT)
    if document["format"] > _FORMAT:
        raise ValueError(f"{folder} was written by a newer version of trl-diffusion-pref. Upgrade it.")
    for name, size in document["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder} lacks {name}. {_AGAIN}")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes instead of {size}. {_AGAIN}")
    try:
        arrays = {name: tensor.numpy() for name, tensor in load_file(folder / _ROWS).items()}
    except SafetensorError as error:
        raise ValueError(f"{folder / _ROWS} is damaged ({error}). {_AGAIN}") from error
    record = document["record"]
    prompts = PromptTable(ShardedTensors(folder / _PROMPTS, _AGAIN), document["prompt_lengths"], record["prompts"])
    prompts.add(document["prompts"])
    samples, places = None, np.zeros((len(arrays["rows"]), 2), dtype=np.int32)
    if "keys" in arrays:
        samples = ShardedTensors(folder / _SAMPLES, _AGAIN)
        places = samples.locate(arrays["keys"].view(KEY).reshape(-1))
        if (places < 0).any():
            raise ValueError(f"{folder / _SAMPLES} lacks {int((places[:, 0] < 0).sum())} rows. {_AGAIN}")
    return EncodedDataset(
        rows=arrays["rows"],
        samples=samples,
        places=places,
        prompts=prompts,
        captions=prompts.numbers(document["prompts"])[arrays["captions"]],
        first_captions=arrays["first_captions"],
        scalars={name.removeprefix(SCALAR): array for name, array in arrays.items() if name.startswith(SCALAR)},
        buckets=arrays["buckets"],
        sizes=[(height, width) for height, width in document["sizes"]],
        record=record,
        fingerprint=document["fingerprint"],
        left_out=document["left_out"],
    )


def _read_document(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{file.parent} has no {file.name}, which is written last: it is no encoded data set, or an unfinished "
            f"one. {_AGAIN}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). {_AGAIN}") from error


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a record of records, each by the names that lead to it."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}, ")
        else:
            yield prefix + name, value

"""Tensors by key in files of many rows: written whole or not at all, found again by content, read row by row.

A shard is a safetensors file. What the rows have in common in shape is stacked; what differs in length along the first
dimension is joined, with the lengths beside it. Its metadata has the keys of the rows, and its name is made from them,
so that two processes that write the same rows write the same file, byte by byte.
"""

import json
import math
import os
import shutil
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from xxhash import xxh3_128


# What a row is found by: 16 bytes, which numpy sorts as bytes.
KEY = np.dtype("V16")
# safetensors writes several entries of the metadata in an order that changes from process to process, so there is one.
_METADATA = "rows"
_SUFFIX, _UNFINISHED = ".safetensors", ".unfinished"
_LENGTHS = "lengths/"
_REMOVE = "Remove it; its rows are then encoded again."
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def key_of(*parts: Any) -> bytes:
    """A key from parts, bytes or what JSON can hold; other parts, or the same divided otherwise, give another key."""
    digest = xxh3_128()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part).encode()
        digest.update(struct.pack("<Q", len(data)))
        digest.update(data)
    return digest.digest()


def as_keys(keys: Iterable[bytes]) -> np.ndarray:
    """An array `(N,)` of dtype `KEY`."""
    return np.frombuffer(b"".join(keys), dtype=KEY)


def write_shard(
    folder: Path, keys: np.ndarray, rows: Sequence[Mapping[str, Tensor]], notes: Mapping[str, Any] | None = None
) -> Path:
    """Writes the tensors of some rows.

    Args:
        folder: Is made if it does not exist.
        keys: `(N,)` of dtype `KEY`.
        rows: N mappings with the same names. Tensors of one name agree in all dimensions but the first; where their
            dtypes differ, float32 is taken.
        notes: What to know about these rows, for `ShardedTensors.notes`; JSON.

    Returns:
        The file, which appears under its name only when it is whole.
    """
    tensors: dict[str, Tensor] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if len({value.dtype for value in values}) > 1:
            values = [value.float() for value in values]
        if len({value.shape for value in values}) == 1:
            tensors[name] = torch.stack(values)
        else:
            tensors[_LENGTHS + name] = torch.tensor([len(value) for value in values], dtype=torch.int32)
            tensors[name] = torch.cat(values)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{key_of(keys.tobytes()).hex()}{_SUFFIX}"
    unfinished = folder / f"{file.stem}.{socket.gethostname()}-{os.getpid()}{_UNFINISHED}"
    metadata = json.dumps({"keys": keys.tobytes().hex(), "notes": dict(notes or {})}, sort_keys=True)
    try:
        with open(unfinished, "wb") as opened:
            opened.write(save(tensors, metadata={_METADATA: metadata}))
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return file


def remove_unfinished(folder: Path) -> None:
    """Removes what processes of this machine that are gone left unfinished."""
    for file in folder.glob(f"*{_UNFINISHED}"):
        host, _, process = file.name.removesuffix(_UNFINISHED).partition(".")[2].rpartition("-")
        if host == socket.gethostname() and process.isdigit() and not _is_alive(int(process)):
            # In a folder that this user may only read, somebody else will.
            with suppress(OSError):
                file.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@dataclass(frozen=True)
class _Stored:
    """Where a tensor of a shard begins in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    # For joined tensors, where each row begins, in elements along the first dimension.
    offsets: np.ndarray | None


class _Shard:
    """The header of one file; values are read on demand and nothing is mapped into memory.

    Args:
        remedy: What to do about a damaged file, as a sentence.

    Raises:
        ValueError: The file is damaged.
    """

    def __init__(self, file: Path, remedy: str) -> None:
        self.file, self.remedy = file, remedy
        try:
            with open(file, "rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                if length > file.stat().st_size:
                    raise ValueError("its header is longer than the file")
                header: dict[str, Any] = json.loads(opened.read(length))
                metadata = json.loads(header.pop("__metadata__")[_METADATA])
                self.keys = np.frombuffer(bytes.fromhex(metadata["keys"]), dtype=KEY)
                self.notes: dict[str, Any] = metadata["notes"]
                if max((entry["data_offsets"][1] for entry in header.values()), default=0) + 8 + length > (
                    file.stat().st_size
                ):
                    raise ValueError("it is cut off")
                lengths = {
                    name.removeprefix(_LENGTHS): self._read(opened, entry, 8 + length).numpy()
                    for name, entry in header.items()
                    if name.startswith(_LENGTHS)
                }
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise ValueError(f"{file} is damaged ({error}). {remedy}") from error
        self.tensors: dict[str, _Stored] = {}
        for name, entry in header.items():
            if not name.startswith(_LENGTHS):
                offsets = np.concatenate([[0], np.cumsum(lengths[name])]) if name in lengths else None
                start = 8 + length + entry["data_offsets"][0]
                self.tensors[name] = _Stored(_DTYPES[entry["dtype"]], tuple(entry["shape"]), start, offsets)

    @staticmethod
    def _read(opened: Any, entry: Mapping[str, Any], base: int) -> Tensor:
        begin, end = entry["data_offsets"]
        opened.seek(base + begin)
        return torch.frombuffer(bytearray(opened.read(end - begin)), dtype=_DTYPES[entry["dtype"]])

    def read(self, row: int) -> dict[str, Tensor]:
        """The tensors of a row."""
        tensors = {}
        with open(self.file, "rb", buffering=0) as opened:
            for name, stored in self.tensors.items():
                inner = stored.shape[1:]
                first, count = row, 1
                if stored.offsets is not None:
                    first, count = int(stored.offsets[row]), int(stored.offsets[row + 1] - stored.offsets[row])
                size = math.prod(inner) * stored.dtype.itemsize
                buffer = bytearray(count * size)
                opened.seek(stored.start + first * size)
                if buffer and opened.readinto(buffer) != len(buffer):
                    raise ValueError(f"{self.file} is cut off. {self.remedy}")
                flat = torch.frombuffer(buffer, dtype=stored.dtype) if buffer else torch.empty(0, dtype=stored.dtype)
                tensors[name] = flat.reshape(inner if stored.offsets is None else (count, *inner))
        return tensors


class ShardedTensors:
    """All shards of a folder.

    Args:
        folder: May not exist yet.
        remedy: What to do about a damaged file, as a sentence.

    Attributes:
        keys: `(N,)` of dtype `KEY`, of all rows, sorted.
    """

    def __init__(self, folder: Path, remedy: str = _REMOVE) -> None:
        self.folder, self.remedy = folder, remedy
        self._shards: list[_Shard] = []
        self.refresh()

    def refresh(self) -> None:
        """Looks for shards that were written since. Places of before stay what they are."""
        known = {shard.file for shard in self._shards}
        self._shards += [
            _Shard(file, self.remedy) for file in sorted(self.folder.glob(f"*{_SUFFIX}")) if file not in known
        ]
        keys = np.concatenate([shard.keys for shard in self._shards]) if self._shards else np.empty(0, dtype=KEY)
        counts = [len(shard.keys) for shard in self._shards]
        places = np.stack([np.repeat(np.arange(len(counts)), counts), _ranges(counts)], axis=1).astype(np.int32)
        order = np.argsort(keys, kind="stable")
        self.keys, self._places = keys[order], places[order]

    def __len__(self) -> int:
        return len(self.keys)

    def locate(self, keys: np.ndarray) -> np.ndarray:
        """Places `(N, 2)` int32 of keys, for `read`; -1 where a key is not stored."""
        places = np.full((len(keys), 2), -1, dtype=np.int32)
        if len(self.keys) and len(keys):
            found = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
            same = self.keys[found] == keys
            places[same] = self._places[found[same]]
        return places

    def read(self, place: np.ndarray) -> dict[str, Tensor]:
        """The tensors of one row, by its place."""
        return self._shards[place[0]].read(int(place[1]))

    def keys_at(self, places: np.ndarray) -> np.ndarray:
        """The keys `(N,)` of the rows at these places."""
        keys = np.empty(len(places), dtype=KEY)
        for index in np.unique(places[:, 0]).tolist():
            own = places[:, 0] == index
            keys[own] = self._shards[index].keys[places[own, 1]]
        return keys

    def file(self, index: int) -> Path:
        """The file that places with this first number are in."""
        return self._shards[index].file

    def notes(self, places: np.ndarray) -> dict[str, Any]:
        """The notes of all shards that these places are in."""
        return {name: note for index in np.unique(places[:, 0]) for name, note in self._shards[index].notes.items()}

    def shapes(self, place: np.ndarray) -> dict[str, tuple[int, ...]]:
        """The shapes of one row's tensors, without reading them; the first dimension of joined ones is left out."""
        return {name: stored.shape[1:] for name, stored in self._shards[place[0]].tensors.items()}

    def copy_rows(self, places: np.ndarray, folder: Path) -> list[Path]:
        """Puts the rows at these places into another folder; files of which all rows are wanted as they are.

        Files are linked where both folders are on one disk, and copied elsewhere.

        Returns:
            The files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        copies = []
        for index in np.unique(places[:, 0]).tolist():
            shard, wanted = self._shards[index], np.unique(places[places[:, 0] == index, 1])
            if len(wanted) < len(shard.keys):
                # The others may be rows that are nobody else's business.
                rows = [shard.read(row) for row in wanted.tolist()]
                copies.append(write_shard(folder, shard.keys[wanted], rows, shard.notes))
                continue
            copies.append(folder / shard.file.name)
            if not copies[-1].exists():
                _link_or_copy(shard.file, copies[-1])
        return copies


def _link_or_copy(source: Path, target: Path) -> None:
    # A cache may hold links, as that of huggingface_hub does.
    source = source.resolve()
    with suppress(OSError):
        os.link(source, target)
        return
    unfinished = target.with_suffix(_UNFINISHED)
    try:
        shutil.copyfile(source, unfinished)
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _ranges(counts: Sequence[int]) -> np.ndarray:
    """0..n-1 for each count, joined."""
    return np.concatenate([np.arange(count) for count in counts]) if counts else np.empty(0, dtype=np.int64)

"""Files that are there whole or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from safetensors.torch import save_file
from torch import Tensor


UNFINISHED = ".unfinished"


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file under a temporary name, then renames it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_name(file)
    try:
        save_file(dict(tensors), unfinished, metadata=metadata)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it; folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_name(file)
    try:
        write_to_disk(unfinished, content)
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_to_disk(file: Path, content: bytes) -> None:
    """Writes a file that is on the disk afterwards, also if the machine stops."""
    with open(file, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def unfinished_name(path: Path) -> Path:
    """A name beside a file or folder for what is being written, which no other process takes."""
    return path.with_name(f".{path.name}.{uuid4().hex}{UNFINISHED}")

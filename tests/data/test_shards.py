"""Files of encoded rows: whole or absent, equal whoever writes them, and checked when they are read."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from trl_diffusion_pref.data import shards as module
from trl_diffusion_pref.data.shards import ShardedTensors, as_keys, key_of, remove_unfinished, write_shard


def keys(*names: str) -> np.ndarray:
    return as_keys([key_of(name) for name in names])


def row(value: float, length: int = 2) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2, 3), value).half(), "words": torch.full((length, 4), value).bfloat16()}


def write(folder: Path, *names: str) -> Path:
    return write_shard(folder, keys(*names), [row(float(ord(name[0])), 1 + ord(name[0]) % 3) for name in names])


def test_rows_come_back_as_they_were_written(tmp_path):
    write(tmp_path, "x", "y", "z")
    stored = ShardedTensors(tmp_path)
    for name, place in zip("zxy", stored.locate(keys("z", "x", "y")), strict=True):
        expected, found = row(ord(name), 1 + ord(name) % 3), stored.read(place)
        assert found.keys() == expected.keys()
        for part, tensor in found.items():
            assert tensor.dtype == expected[part].dtype and torch.equal(tensor, expected[part])
    assert stored.locate(keys("other")).tolist() == [[-1, -1]]


def test_the_same_rows_give_the_same_bytes_every_time(tmp_path):
    """safetensors orders entries of the metadata at random, in one process too: with two, one in two files differs."""
    rows = [{name: torch.full((2, 3), float(number)) for name in ("z", "a", "latents/std")} for number in range(2)]
    written = set()
    for number in range(16):
        notes = {"crop": "b", "rate": "a"} if number % 2 else {"rate": "a", "crop": "b"}
        written.add(write_shard(tmp_path / str(number), keys("x", "y"), rows, notes).read_bytes())
    assert len(written) == 1


def test_others_read_a_shard_as_plain_safetensors(tmp_path):
    with safe_open(write(tmp_path, "x", "y"), "pt") as opened:
        assert torch.equal(opened.get_tensor("a")[1], row(ord("y"))["a"])
        (description,) = opened.metadata().values()
    assert json.loads(description)["keys"] == keys("x", "y").tobytes().hex()


def test_places_stay_when_shards_are_added(tmp_path):
    """Names of later files sort before and after those of earlier ones."""
    write(tmp_path, "m")
    stored = ShardedTensors(tmp_path)
    place = stored.locate(keys("m"))[0]
    for number in range(8):
        write(tmp_path, f"n{number}")
    stored.refresh()
    assert len(stored) == 9
    assert torch.equal(stored.read(place)["a"], row(ord("m"))["a"])
    assert (stored.locate(keys("m"))[0] == place).all()


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [4, 200, -1, -40])
def test_a_shard_that_is_cut_off_is_named_when_it_is_opened(cut, tmp_path):
    file = write(tmp_path, "x", "y")
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"{file.name} is damaged .*Remove it; its rows are then encoded again"):
        ShardedTensors(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + data[8:].replace(b'"dtype"', b'"dtyp\xff"', 1),
        lambda data: data[:8] + data[8:].replace(b"data_offsets", b"data_offsetz", 1),
        lambda data: data[:8] + data[8:].replace(b"__metadata__", b"__metadatb__", 1),
        lambda data: b"not a shard",
    ],
)
def test_a_damaged_header_is_named(damage, tmp_path):
    file = write(tmp_path, "x", "y")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        ShardedTensors(tmp_path)


def test_a_shard_that_is_cut_off_while_it_is_used_is_named(tmp_path):
    file = write(tmp_path, "x", "y")
    stored = ShardedTensors(tmp_path)
    os.truncate(file, file.stat().st_size - 30)
    with pytest.raises(ValueError, match=f"{file.name} is cut off"):
        [stored.read(place) for place in stored.locate(keys("x", "y"))]


def test_leftovers_of_processes_that_are_gone_are_removed_and_of_others_kept(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host, files = socket.gethostname(), {}
    for name, owner in {"gone": f"{host}-{gone.pid}", "here": f"{host}-{os.getpid()}", "far": "other-1"}.items():
        files[name] = tmp_path / f"abc.{owner}.unfinished"
        files[name].touch()
    remove_unfinished(tmp_path)
    assert {name for name, file in files.items() if file.exists()} == {"here", "far"}


def test_whole_shards_are_linked_and_of_others_only_the_wanted_rows_are_copied(tmp_path):
    write(tmp_path / "a", "w", "x")
    write(tmp_path / "a", "y", "z")
    stored = ShardedTensors(tmp_path / "a")
    wanted = keys("x", "y", "z")
    copies = stored.copy_rows(stored.locate(wanted), tmp_path / "b")
    copied = ShardedTensors(tmp_path / "b")
    assert len(copies) == 2 and len(copied) == 3
    assert (copied.locate(keys("w")) < 0).all()
    assert sorted(file.stat().st_nlink for file in copies) == [1, 2]
    for key in wanted:
        one, other = (table.read(table.locate(key[None])[0]) for table in (stored, copied))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_hundred_thousand_keys_are_found(tmp_path):
    names = [str(number) for number in range(100_000)]
    every = keys(*names)
    for start in range(0, len(names), 20_000):
        part = every[start : start + 20_000]
        write_shard(tmp_path, part, [{"n": torch.tensor([float(start + index)])} for index in range(len(part))])
    stored = ShardedTensors(tmp_path)
    for number in (0, 1, 77_777, 99_999):
        assert stored.read(stored.locate(every[number : number + 1])[0])["n"].item() == number
    assert (stored.locate(every) >= 0).all()

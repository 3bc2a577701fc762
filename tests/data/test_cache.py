"""What is encoded and by whom: each row once, whatever was there, went missing, or is written beside."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.processes import Processes

from trl_diffusion_pref.data import cache
from trl_diffusion_pref.data.bad_rows import RowProblem
from trl_diffusion_pref.data.cache import Part, encode_missing, rows_per_shard, stored_bytes, with_twins
from trl_diffusion_pref.data.shards import ShardedTensors, as_keys, key_of


ROWS_PER_SHARD = 4


class Encoding:
    """Encodes rows whose tensor is their content; counts each, and finds those in `bad` unusable."""

    def __init__(self, folder: Path, contents: list[int], bad: tuple[int, ...] = ()) -> None:
        self.folder, self.contents, self.bad = folder, contents, bad
        self.encoded: list[int] = []
        self.keys = as_keys([key_of(content) for content in contents])

    def run(self, rows: np.ndarray | None = None) -> list[RowProblem]:
        self.shards = ShardedTensors(self.folder)
        rows = np.arange(len(self.contents)) if rows is None else rows
        return encode_missing(self.shards, self.keys, rows, self.divide, self.encode, label="rows", bytes_per_row=4)

    def divide(self, rows: np.ndarray) -> list[np.ndarray]:
        return [rows[start : start + ROWS_PER_SHARD] for start in range(0, len(rows), ROWS_PER_SHARD)]

    def encode(self, rows: np.ndarray) -> Part:
        self.encoded += rows.tolist()
        good = np.asarray([row for row in rows if self.contents[row] not in self.bad], dtype=np.int64)
        problems = [RowProblem(row, "column 'a'", "is bad", "bad") for row in rows.tolist() if row not in good]
        return Part(good, [{"content": torch.tensor([self.contents[row]])} for row in good], problems=problems)

    def stored(self) -> list[int | None]:
        """What is stored for each row."""
        places = self.shards.locate(self.keys)
        return [None if place[0] < 0 else int(self.shards.read(place)["content"]) for place in places]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_equal_rows_are_encoded_once_and_all_found(tmp_path):
    encoding = Encoding(tmp_path / "s", [1, 2, 1, 3, 2, 1])
    assert encoding.run() == []
    assert sorted(encoding.encoded) == [0, 1, 3]
    assert encoding.stored() == encoding.contents


def test_a_bad_row_s_twins_are_bad_too(tmp_path):
    """They are not read, and would otherwise be looked up at place -1, which is somebody else's row."""
    encoding = Encoding(tmp_path / "s", [1, 7, 2, 7, 3, 7], bad=(7,))
    problems = encoding.run()
    assert sorted(problem.row for problem in problems) == [1, 3, 5]
    assert {problem.reason for problem in problems} == {"is bad"}
    assert encoding.encoded.count(1) == 1 and not {3, 5} & set(encoding.encoded)


def test_twins_are_found_among_the_rows_that_are_wanted():
    keys = as_keys([key_of(content) for content in "abab"])
    found = with_twins([RowProblem(0, "x", "y", "z")], keys, np.asarray([0, 1]))
    assert [problem.row for problem in found] == [0]


def test_what_is_there_is_not_encoded_again(tmp_path):
    Encoding(tmp_path / "s", [1, 2, 3]).run()
    again = Encoding(tmp_path / "s", [3, 4, 1])
    again.run()
    assert again.encoded == [1] and again.stored() == [3, 4, 1]


@pytest.mark.parametrize("bad", [(), (2, 9)], ids=["all rows good", "two bad"])
def test_a_run_that_goes_on_writes_the_files_of_one_that_was_not_stopped(bad, tmp_path):
    contents = list(range(18))
    Encoding(tmp_path / "whole", contents, bad).run()
    whole = files(tmp_path / "whole")
    for kept in range(1 << len(whole)):
        folder = tmp_path / f"part-{kept}"
        folder.mkdir()
        there = [name for index, name in enumerate(sorted(whole)) if kept >> index & 1]
        for name in there:
            shutil.copy(tmp_path / "whole" / name, folder / name)
        before = {name: (folder / name).stat().st_mtime_ns for name in there}
        encoding = Encoding(folder, contents, bad)
        stored = len(ShardedTensors(folder))
        assert sorted({problem.row for problem in encoding.run()}) == list(bad)
        assert files(folder) == whole
        assert before == {name: (folder / name).stat().st_mtime_ns for name in there}
        assert len(encoding.encoded) == len(contents) - stored


def test_three_processes_share_the_rows_and_write_the_same_files(tmp_path, monkeypatch):
    contents = list(range(30))
    Encoding(tmp_path / "one", contents).run()
    processes = Processes(monkeypatch, cache)
    encodings = [Encoding(tmp_path / "three", contents, bad=()) for _ in range(3)]
    processes.run(lambda index: encodings[index].run(), 3, per_node=3)
    assert files(tmp_path / "three") == files(tmp_path / "one")
    assert sorted(row for encoding in encodings for row in encoding.encoded) == contents
    assert all(len(encoding.encoded) >= 8 for encoding in encodings)


def test_nodes_that_do_not_see_each_other_s_disk_end_with_all_rows(tmp_path, monkeypatch):
    contents = list(range(30))
    Encoding(tmp_path / "one", contents, bad=(5,)).run()
    processes = Processes(monkeypatch, cache)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    encodings = [Encoding(tmp_path / f"node-{index // 2}", contents, bad=(5,)) for index in range(4)]
    problems = processes.run(lambda index: encodings[index].run(), 4, per_node=2)
    for node in (0, 1):
        assert files(tmp_path / f"node-{node}") == files(tmp_path / "one")
    assert all({problem.row for problem in found} == {5} for found in problems)
    assert all(encoding.stored() == [None if row == 5 else row for row in contents] for encoding in encodings)


def test_a_node_whose_disk_has_everything_does_not_encode_for_one_that_has_nothing(tmp_path, monkeypatch):
    contents = list(range(12))
    Encoding(tmp_path / "node-0", contents).run()
    processes = Processes(monkeypatch, cache)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    encodings = [Encoding(tmp_path / f"node-{index}", contents) for index in range(2)]
    processes.run(lambda index: encodings[index].run(), 2, per_node=1)
    assert encodings[0].encoded == [] and sorted(encodings[1].encoded) == contents
    assert files(tmp_path / "node-1") == files(tmp_path / "node-0")


def test_two_runs_may_write_into_one_folder_at_once(tmp_path, monkeypatch):
    """The second starts when the first has written one shard, and both end with the same files."""
    contents = list(range(16))
    Encoding(tmp_path / "one", contents).run()
    first, second = (Encoding(tmp_path / "two", contents) for _ in range(2))
    encode = first.encode

    def interrupted(rows: np.ndarray) -> Part:
        if len(first.encoded) == ROWS_PER_SHARD:
            second.run()
        return encode(rows)

    monkeypatch.setattr(first, "encode", interrupted)
    first.run()
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert sorted(second.encoded) == contents[ROWS_PER_SHARD:]
    assert first.stored() == second.stored() == contents


def test_a_disk_that_fills_while_encoding_keeps_what_is_whole_and_the_run_goes_on(tmp_path, monkeypatch):
    contents, written = list(range(16)), []
    Encoding(tmp_path / "one", contents).run()
    write = cache.write_shard

    def full(folder: Path, *args) -> Path:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(write(folder, *args))
        return written[-1]

    monkeypatch.setattr(cache, "write_shard", full)
    with pytest.raises(OSError, match="is full while rows is encoded, which takes 64 bytes.* make room"):
        Encoding(tmp_path / "s", contents).run()
    assert len(files(tmp_path / "s")) == 2
    monkeypatch.setattr(cache, "write_shard", write)
    again = Encoding(tmp_path / "s", contents)
    again.run()
    assert sorted(again.encoded) == contents[8:] and files(tmp_path / "s") == files(tmp_path / "one")


def test_a_disk_without_room_is_refused_with_the_bytes_that_are_missing(tmp_path, monkeypatch):
    Encoding(tmp_path / "s", [1, 2]).run()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=7))
    with pytest.raises(ValueError, match="rows, encoded, would take 8 bytes, and .* has 7 bytes free"):
        Encoding(tmp_path / "s", [1, 2, 3, 4]).run()


def test_a_cache_that_may_only_be_read_serves_what_is_there(tmp_path, monkeypatch):
    Encoding(tmp_path / "s", [1, 2]).run()
    (tmp_path / "s" / "x.here-999999.unfinished").touch()

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "unlink", "write_bytes"):
        monkeypatch.setattr(Path, name, refuse)
    encoding = Encoding(tmp_path / "s", [2, 1])
    encoding.run()
    assert encoding.stored() == [2, 1]


def test_what_will_be_written_is_said_before_the_first_row(tmp_path, capfd):
    Encoding(tmp_path / "s", [1, 2, 3]).run()
    assert "Encoding rows: 3 of 4 bytes each, 12 bytes in all, to " in capfd.readouterr().err
    Encoding(tmp_path / "s", [1, 2, 3, 4]).run()
    expected = "Encoding rows: 4 of 4 bytes each, 16 bytes in all; 3 are there, 4 bytes to write, to "
    assert expected in capfd.readouterr().err
    Encoding(tmp_path / "s", [1, 2, 3, 4]).run()
    assert capfd.readouterr().err == ""


def test_bytes_of_a_row_count_vectors_in_float32():
    shapes = {"mean": (2, 4, 8, 8), "sizes": (2,), "number": ()}
    assert stored_bytes(shapes, torch.float16) == 2 * 4 * 64 * 2 + 2 * 4 + 4


@pytest.mark.parametrize(("row_bytes", "batch", "expected"), [(131_072, 8, 256), (2_100_000, 8, 120), (10**9, 8, 8)])
def test_shards_are_whole_batches_of_bounded_size(row_bytes, batch, expected):
    assert rows_per_shard(row_bytes, batch) == expected

"""An encoding that is killed at any moment goes on: nothing whole is made again, and the result is the same."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.encoding import encoder_of
from helpers.pipelines import RESOLUTION, build_tiny_pipeline

from trl_diffusion_pref.data import EncodingOptions, cache
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.shapes import preference_pairs


KILLS, ROWS, ROWS_PER_SHARD = 10, 80, 4


def encode(rows: Dataset, folder: Path, log: Path) -> None:
    """Encodes in this process, and notes each batch of samples that the VAE sees."""
    torch.set_num_threads(1)
    pipeline = build_tiny_pipeline()
    original = pipeline.vae.encode

    def counted(pixels):
        with log.open("a") as opened:
            opened.write(f"{len(pixels)}\n")
        return original(pixels)

    pipeline.vae.encode = counted
    options = EncodingOptions(resolution=RESOLUTION)
    encoder = encoder_of(pipeline, family_for(pipeline), options, cache_folder=folder, batch_size=ROWS_PER_SHARD)
    encoder.encode_all(rows, None, torch.device("cpu"))


def forked(rows: Dataset, folder: Path, log: Path) -> int:
    """The number of a process that encodes: a copy of this one, since imports take longer than the encoding."""
    process = os.fork()
    if process == 0:
        # A fork that hangs on a lock of another thread would hang the test.
        signal.alarm(60)
        try:
            encode(rows, folder, log)
            os._exit(0)
        finally:
            os._exit(1)
    return process


def files(folder: Path) -> dict[str, Path]:
    return {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
def test_ten_kills_encode_no_shard_twice_and_change_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_SHARD_ROWS", ROWS_PER_SHARD)
    rows, whole, killed = preference_pairs(ROWS), tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert os.waitpid(forked(rows, whole, tmp_path / "whole.log"), 0)[1] == 0
    duration, rng = time.monotonic() - began, random.Random(0)
    seen: dict[str, tuple[int, int]] = {}
    stopped = 0
    for number in range(KILLS + 1):
        process = forked(rows, killed, tmp_path / f"killed-{number}.log")
        if number < KILLS:
            # The runs become shorter as more is there.
            time.sleep(rng.uniform(0, duration / 2))
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        stopped += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        for name, file in files(killed).items():
            if file.suffix == ".safetensors" and file.parent != killed:
                identity = (file.stat().st_ino, file.stat().st_mtime_ns)
                assert seen.setdefault(name, identity) == identity, f"{name} was written twice"
    assert stopped >= 3, "hardly any run was killed while it worked"
    expected, result = files(whole), files(killed)
    assert result.keys() == expected.keys()
    assert all(file.read_bytes() == expected[name].read_bytes() for name, file in result.items())
    encoded = sum(int(line) for log in tmp_path.glob("killed-*.log") for line in log.read_text().split())
    probes = len(list(tmp_path.glob("killed-*.log")))
    # What a killed run had not written: one shard of pairs at most, of each run.
    assert 2 * ROWS <= encoded - probes <= 2 * ROWS + 2 * ROWS_PER_SHARD * KILLS

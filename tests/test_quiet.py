"""What the demo and an example print, in a process of its own: what this package says on purpose, and nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
EXAMPLE = str(ROOT / "examples" / "mapo_shapes.py")
# Lines as a terminal shows them. Nothing of other libraries' notices about torchvision, kernels or image processors,
# no warnings, no bars that count the parts of a pipeline.
INTENDED = (
    r"",
    r"\{'(loss|train_runtime)': .*\}",  # the log
    r" *\d+%\|.*\| \d+/\d+ \[.*\]",  # progress of training
    r"Encoding \w+: \d+ of .* each, .* in all, to .*",  # what is written, how much and where
    r"Encoding \w+: +\d+%\|.*rows/s\]",
    r"(before|after) .*",  # the table of an example, with a header
    r" *outlined +colour +shape +clean",
    r"figure: .*before_after\.png",
)


def printed(arguments: list[str], tmp_path: Path) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV_"))}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    # A bar overwrites its line.
    return [line.rstrip() for line in re.split(r"[\r\n]", done.stdout)]


@pytest.mark.newest
@pytest.mark.parametrize(
    "program",
    [
        # `make demo` runs it too, and shows what it prints.
        pytest.param(["-m", "trl_diffusion_pref.cli", "demo", "--comparison", "false"], marks=pytest.mark.slow),
        pytest.param([EXAMPLE, "--no-comparison", "--lora"], marks=pytest.mark.slow),
        pytest.param([EXAMPLE, "--no-comparison"], marks=pytest.mark.slow),
    ],
    ids=["demo", "example, lora", "example"],
)
def test_demo_and_example_print_only_what_is_meant_for_their_user(program, tmp_path):
    lines = printed([*program, "--max_steps", "2"], tmp_path)
    unexpected = [line for line in lines if not any(re.fullmatch(one, line) for one in INTENDED)]
    assert not unexpected

"""benchmarks/gpu.py: the whole of it with small models on a CPU, and what it does where something fails."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn


FOLDER = Path(__file__).parents[1] / "benchmarks"
NUMBERS = {"seconds_per_pair", "bare_seconds_per_pair", "of_bare", "tflop_per_pair", "share_of_rate"}
NUMBERS |= {"recipe_seconds_per_pair", "times_the_recipe"}
OF_A_GPU = {"held_before_gib", "peak_gib", "bare_peak_gib", "recipe_peak_gib"}


@pytest.fixture
def gpu(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import gpu

    return gpu


def test_small_models_on_a_cpu_give_every_row_its_numbers(gpu, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, str(FOLDER / "gpu.py"), "--tiny", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["machine"]["torch"] == torch.__version__ and result["matrix_tflop_per_second"] > 0
    assert [row["name"] for row in result["rows"]] == [case.name for case in gpu.CASES]
    for row in result["rows"]:
        assert "error" not in row and "recipe_error" not in row, row
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in NUMBERS), row
        assert all(row[name] is None for name in OF_A_GPU)
    printed = (tmp_path / "gpu.md").read_text()
    assert done.stdout.strip() == printed.strip() and all(f"| {case.name} |" in printed for case in gpu.CASES)


def failing(error: Exception, deadline: float = math.inf) -> SimpleNamespace:
    def measure(case):
        raise error

    return SimpleNamespace(measure=measure, deadline=deadline, device=torch.device("cpu"))


def test_a_case_that_fails_is_a_row_with_its_error(gpu):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried | to allocate 9 GiB.\nOther lines.")
    row = gpu.row_of(gpu.CASES[0], failing(error))
    assert row["error"] == "OutOfMemoryError: CUDA out of memory. Tried | to allocate 9 GiB."
    shown = gpu.table({"machine": {}, "matrix_tflop_per_second": 1.0, "rows": [row]}).splitlines()[-1]
    assert "out of memory" in shown and shown.count("|") == 10


def test_no_case_begins_when_the_time_is_over(gpu):
    row = gpu.row_of(gpu.CASES[0], failing(AssertionError("measured"), deadline=-math.inf))
    assert row["name"] == gpu.CASES[0].name and row["error"] == "skipped: the time was over"


@pytest.mark.parametrize(
    ("options", "problem"), [([], "there is no CUDA device"), (["--tiny", "--only", "SD 4"], "'SD 4': no case")]
)
def test_what_cannot_be_measured_is_an_error_at_once(gpu, options, problem, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit):
        gpu.main()
    assert problem in capsys.readouterr().err


def test_models_have_the_published_numbers_of_parameters(gpu):
    published = {"SDXL": 2.567e9, "SD 3.5-medium": 2.470e9, "Flux-dev": 11.901e9}
    for make in (gpu.stable_diffusion_xl, gpu.stable_diffusion_3_5_medium, gpu.flux_dev):
        model = make(False)
        denoiser: nn.Module = model.denoiser(torch.device("meta"), torch.bfloat16)
        # The published file of SD 3.5's has its table of positions too.
        count = sum(tensor.numel() for tensor in denoiser.state_dict().values())
        assert count == pytest.approx(published[model.name], rel=5e-4)


def test_4_bit_weights_are_the_rounded_weights(gpu):
    from bitsandbytes.functional import dequantize_4bit

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(64, 64, bias=False)))
    before = [model[0].weight.detach().clone(), model[1][1].weight.detach().clone()]
    gpu.in_4_bit(model)
    for layer, weight in zip((model[0], model[1][1]), before, strict=True):
        kept = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        # nf4's widest gap is 0.31 of a block's largest value.
        assert layer.weight.nbytes * 8 == weight.nbytes and 0 < (kept - weight).abs().max() < 0.16 * weight.abs().max()
    assert type(model[1][0]) is nn.Conv1d

"""FSDP2 in processes with gloo on a CPU: what is refused, and checkpoints that go from shards to whole and back."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.pipelines import build_tiny_pipeline
from helpers.processes import run_helper
from safetensors.torch import load_file
from torch.distributed.fsdp import StateDictType

from trl_diffusion_pref.training.sharded import check_sharding


def run(name: str, folder: Path, weights: str, kind: str, processes: int, *resume: str) -> None:
    done = run_helper("sharded_run.py", name, str(folder), weights, kind, *resume, processes=processes)
    assert done.returncode == 0, done.stderr[-4000:]


def trained(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    output = folder / "output"
    if kind == "lora":
        pipeline = build_tiny_pipeline()
        pipeline.load_lora_weights(output)
        return load_file(output / "pytorch_lora_weights.safetensors")
    return StableDiffusionPipeline.from_pretrained(output).unet.state_dict()


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert list(first) == list(second)
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_four_processes_saved_in_shards_is_gone_on_from_by_two_by_one_and_the_reverse(kind, tmp_path):
    run("diffusion-dpo", tmp_path / "one", "whole", kind, 1)
    run("diffusion-dpo", tmp_path / "four", "fsdp", kind, 4)
    whole = trained(tmp_path / "one", kind)
    assert_close(trained(tmp_path / "four", kind), whole)
    losses = json.loads((tmp_path / "one" / "losses.json").read_text())
    for saved, weights, processes in (("four", "fsdp", 2), ("four", "whole", 1), ("one", "fsdp", 2)):
        folder = tmp_path / f"{saved} to {weights} {processes}"
        shutil.copytree(tmp_path / saved, folder)
        run("diffusion-dpo", folder, weights, kind, processes, "resume")
        assert_close(trained(folder, kind), whole)
        # The log of the steps before comes from the checkpoint.
        assert json.loads((folder / "losses.json").read_text()) == pytest.approx(losses, rel=1e-3), folder.name


def test_asking_for_shards_where_there_will_be_none_is_an_error():
    args = SimpleNamespace(fsdp=True)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None), num_processes=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="fsdp=True has no effect here: .* this run has 2 on cpu. Leave it out"):
        check_sharding(args, accelerator)
    check_sharding(SimpleNamespace(fsdp=None), accelerator)
    accelerator.state.fsdp_plugin = SimpleNamespace(state_dict_type=StateDictType.SHARDED_STATE_DICT)
    with pytest.raises(ValueError, match="SHARDED_STATE_DICT writes weights in shards.* Set FULL_STATE_DICT"):
        check_sharding(args, accelerator)

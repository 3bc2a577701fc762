"""The pipeline that a trainer is given: what it is called, and what cannot be trained as it is."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from helpers.pipelines import build_tiny_pipeline

from trl_diffusion_pref import MaPOTrainer
from trl_diffusion_pref.training.pipelines import hub_id


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("/folders/that/are/gone", None),
        ("a/b/c", None),
        (None, None),
    ],
)
def test_a_folder_is_no_hub_id_also_when_it_is_gone(name, expected, tmp_path):
    pipeline = build_tiny_pipeline()
    pipeline.register_to_config(_name_or_path=name)
    assert hub_id(pipeline) == expected
    assert hub_id(str(tmp_path)) is None


def one_by_one(module: torch.nn.Module) -> None:
    """What enable_sequential_cpu_offload does to each part."""
    cpu_offload(module, execution_device=torch.device("cpu"))


def as_a_whole(module: torch.nn.Module) -> None:
    """What enable_model_cpu_offload does."""
    cpu_offload_with_hook(module, execution_device=torch.device("cpu"))


def in_groups(module: torch.nn.Module) -> None:
    module.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize(
    "offload",
    [one_by_one, as_a_whole, pytest.param(in_groups, marks=pytest.mark.newest)],
    ids=lambda offload: offload.__name__,
)
def test_a_pipeline_that_offloads_is_refused_by_part(offload, part, config, pairs):
    pipeline = build_tiny_pipeline()
    offload(getattr(pipeline, part))
    with pytest.raises(
        ValueError, match=f"The pipeline offloads {part} .*except for group offloading, call pipeline.rem"
    ):
        MaPOTrainer(pipeline, config(), pairs)
    pipeline.remove_all_hooks()
    if offload is in_groups:
        with pytest.raises(ValueError, match=f"The pipeline offloads {part} "):
            MaPOTrainer(pipeline, config(), pairs)
    else:
        MaPOTrainer(pipeline, config(), pairs).train()

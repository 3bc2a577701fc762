"""What a LoRA file says of its adapter: enough to compute the same, and nothing that an older PEFT does not know."""

import json

import pytest
from helpers import tiny
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from trl_diffusion_pref.export.weights import lora_metadata, write_lora
from trl_diffusion_pref.families import family_for


ALWAYS = {"r": 8, "lora_alpha": 4, "target_modules": ["to_k", "to_q"], "rank_pattern": {}, "alpha_pattern": {}}


def lora(**options) -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=4, target_modules=["to_q", "to_k"], **options)


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({}, {}),
        ({"lora_dropout": 0.3, "init_lora_weights": "gaussian", "inference_mode": True}, {}),
        ({"use_rslora": True}, {"use_rslora": True}),
        ({"use_dora": True}, {"use_dora": True}),
        ({"lora_bias": True}, {"lora_bias": True}),
        ({"rank_pattern": {"to_q": 2}}, {"rank_pattern": {"to_q": 2}}),
        ({"alpha_pattern": {"to_q": 2}}, {"alpha_pattern": {"to_q": 2}}),
    ],
)
def test_metadata_holds_only_what_changes_the_computation(options, written):
    assert lora_metadata(lora(**options)) == {**ALWAYS, **written}


def test_a_pattern_of_target_modules_is_kept():
    assert lora_metadata(LoraConfig(target_modules=r".*\.to_q"))["target_modules"] == r".*\.to_q"


def test_a_diffusers_file_holds_no_other_field(tmp_path):
    pipeline = tiny.build("stable_diffusion")
    family = family_for(pipeline)
    write_lora(pipeline, family, get_peft_model(family.denoiser(pipeline), lora()), tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata == {f"unet.{name}": value for name, value in ALWAYS.items()}


def test_peft_s_own_config_file_holds_no_other_field(tmp_path):
    pipeline = tiny.build("pixart_sigma")
    family = family_for(pipeline)
    write_lora(pipeline, family, get_peft_model(family.denoiser(pipeline), lora()), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {**ALWAYS, "peft_type": "LORA"}

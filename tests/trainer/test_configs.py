import dataclasses
import warnings

import pytest
import torch
from trl import TrlParser

from trl_diffusion_pref import MaPOConfig
from trl_diffusion_pref.trainer.base_config import DiffusionPreferenceConfig


def test_the_defaults_run_on_this_machine_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = MaPOConfig(output_dir=str(tmp_path))
    assert config.bf16 is (torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False))
    assert config.dataloader_pin_memory is torch.cuda.is_available()
    assert config.activation_checkpointing is True


def test_checkpointing_can_be_switched_off_by_either_name(tmp_path):
    assert MaPOConfig(output_dir=str(tmp_path), activation_checkpointing=False).activation_checkpointing is False
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        assert MaPOConfig(output_dir=str(tmp_path), gradient_checkpointing=False).activation_checkpointing is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "left"}, "crop='left' is none of center, random"),
        ({"latent_sampling": "mode"}, "latent_sampling='mode' is none of sample, mean"),
        ({"resolution": 0}, "resolution=0"),
        ({"prompt_dropout": 1.0}, "prompt_dropout=1.0 is outside"),
        ({"encode_batch_size": 0}, "encode_batch_size=0"),
        ({"loss_type": "orpo"}, "none of mapo, mapo_v2"),
        ({"beta": -1.0}, "negative"),
        ({"beta": 0.0, "loss_type": "mapo_v2"}, "divides by beta"),
        ({"snr_value": 0.0}, "snr_value=0.0"),
    ],
)
def test_bad_options_are_refused_by_name(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MaPOConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize("config_class", [DiffusionPreferenceConfig, MaPOConfig])
def test_every_own_field_has_help_and_stands_in_the_docstring(config_class):
    inherited = {field.name for field in dataclasses.fields(config_class.__mro__[1])}
    for field in dataclasses.fields(config_class):
        if field.name in config_class.__annotations__:
            assert field.metadata.get("help"), field.name
            if field.name not in inherited:
                assert f"{field.name} (`" in config_class.__doc__, field.name


def test_options_parse_from_a_command_line(tmp_path):
    parser = TrlParser((MaPOConfig,))
    (config,) = parser.parse_args_and_config(
        ["--output_dir", str(tmp_path), "--beta", "0.25", "--random_flip", "False", "--model_init_kwargs", '{"a": 1}']
    )
    assert (config.beta, config.random_flip, config.model_init_kwargs) == (0.25, False, {"a": 1})

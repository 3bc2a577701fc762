"""What can be wrong is raised before anything is encoded, and where possible before weights are loaded."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from helpers.pipelines import build_tiny_pipeline
from peft import LoraConfig
from torch import nn

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer, SelfNPOTrainer
from trl_diffusion_pref.shapes import pipeline_folder


@pytest.fixture
def nothing_is_encoded(tiny_pipeline, monkeypatch):
    """A pipeline whose encoders must not be called."""

    def fail(*args, **kwargs):
        raise AssertionError("something was encoded")

    monkeypatch.setattr(tiny_pipeline.vae, "encode", fail)
    monkeypatch.setattr(tiny_pipeline, "encode_prompt", fail)
    return tiny_pipeline


@pytest.fixture
def no_weights_are_loaded(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)


def dpo(tmp_path, **options) -> DiffusionDPOConfig:
    return DiffusionDPOConfig(output_dir=str(tmp_path), max_steps=1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "adapter_off"}, "reference='adapter_off' needs a LoRA"),
        ({"beta_schedule": "flow"}, "beta_schedule='flow' is for flow models"),
        ({"timestep_sampling": "mode"}, "is for flow models.*Leave it out"),
    ],
)
def test_options_that_do_not_suit_the_model(options, message, nothing_is_encoded, pairs, tmp_path):
    with pytest.raises(ValueError, match=message):
        DiffusionDPOTrainer(nothing_is_encoded, dpo(tmp_path, **options), pairs)


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"eval_strategy": "steps", "eval_steps": 1}, "stored", "eval_strategy='steps' needs an eval_dataset"),
        ({"reference": "precomputed"}, "streamed", "needs data sets of known rows, and train_dataset is streamed"),
        ({"aspect_ratio_buckets": True}, "streamed", "aspect_ratio_buckets=True: train_dataset is streamed"),
        ({}, "without prompt", "train_dataset has no known layout.*it lacks the column prompt"),
    ],
)
def test_data_that_do_not_suit_the_options(options, data, message, no_weights_are_loaded, pairs, tmp_path):
    given = {
        "stored": pairs,
        "streamed": pairs.to_iterable_dataset(),
        "without prompt": pairs.remove_columns("prompt"),
    }
    with pytest.raises(ValueError, match=message):
        DiffusionDPOTrainer(str(pipeline_folder()), dpo(tmp_path, **options), given[data])


@pytest.mark.parametrize(
    ("trainer_class", "options", "message"),
    [
        (DiffusionDPOTrainer, {"reference": "copy", "sync_ref_model": True}, "sync_ref_model is not supported"),
        (DiffusionDPOTrainer, {"reference": "precomputed"}, "needs the whole model before training"),
        (SelfNPOTrainer, {}, "teacher='ema' is not supported"),
    ],
)
def test_options_that_sharded_weights_do_not_allow(
    trainer_class, options, message, nothing_is_encoded, pairs, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = trainer_class.config_class(output_dir=str(tmp_path), max_steps=1, **options)
    with pytest.raises(ValueError, match=message):
        trainer_class(nothing_is_encoded, args, pairs)


def test_a_reference_of_another_architecture(nothing_is_encoded, pairs, tmp_path):
    other = build_tiny_pipeline().vae
    with pytest.raises(ValueError, match="AutoencoderKL.* has another architecture"):
        DiffusionDPOTrainer(nothing_is_encoded, dpo(tmp_path), pairs, ref_model=other)


def test_fsdp_in_one_process(no_weights_are_loaded, pairs, tmp_path):
    with pytest.raises(ValueError, match="fsdp=.* shards weights over several processes, and there is one"):
        DiffusionDPOTrainer(str(pipeline_folder()), dpo(tmp_path, fsdp="full_shard"), pairs)


def test_a_missing_sample_column_is_found_without_weights(no_weights_are_loaded, pairs, config):
    with pytest.raises(ValueError, match="lacks the column rejected"):
        MaPOTrainer(str(pipeline_folder()), config(), pairs.remove_columns("rejected"))


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file. Choose another folder"):
        MaPOConfig(output_dir=str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ("processing_class", "brings its own tokenizers"),
        ("compute_metrics", "computes its own metrics"),
        ("preprocess_logits_for_metrics", "no logits"),
        ("quantization_config", "load the pipeline quantised"),
        ("ref_model", "no reference model"),
        ("max_length", "no argument of this trainer"),
    ],
)
def test_arguments_of_trl_s_trainers_say_what_to_do(argument, advice, tiny_pipeline, pairs, config):
    with pytest.raises(TypeError, match=f"MaPOTrainer does not take '{argument}': .*{advice}"):
        MaPOTrainer(tiny_pipeline, config(), pairs, **{argument: None})


def test_the_positional_order_of_trl_s_dpo_trainer_is_explained(tiny_pipeline, pairs, tmp_path):
    with pytest.raises(TypeError, match="takes a DiffusionDPOConfig as its second argument.*ref_model"):
        DiffusionDPOTrainer(tiny_pipeline, build_tiny_pipeline(), dpo(tmp_path), pairs)


def test_a_config_of_another_method_is_named(tiny_pipeline, pairs, config):
    with pytest.raises(TypeError, match="args is a MaPOConfig; SelfNPOTrainer takes a SelfNPOConfig"):
        SelfNPOTrainer(tiny_pipeline, config(), pairs)


class Params4bit(nn.Parameter):
    """Called like bitsandbytes' parameter of 4-bit weights, of which only the name is looked at."""


def quantised(pipeline):
    layer = pipeline.unet.conv_in
    layer.weight = Params4bit(layer.weight.data.to(torch.uint8), requires_grad=False)
    return pipeline


def test_all_weights_of_a_quantised_denoiser_cannot_be_trained(nothing_is_encoded, pairs, config):
    with pytest.raises(ValueError, match="unet is quantised.*Train a LoRA with peft_config"):
        MaPOTrainer(quantised(nothing_is_encoded), config(), pairs)


def test_four_bits_in_bfloat16_are_an_error_on_a_cpu(nothing_is_encoded, pairs, config):
    with pytest.raises(ValueError, match="4-bit weights cannot be trained through with bf16=True on a CPU"):
        MaPOTrainer(quantised(nothing_is_encoded), config(bf16=True, use_cpu=True), pairs, peft_config=LoraConfig(r=2))


def test_fsdp2_says_that_evaluation_needs_training_before_it(tiny_pipeline, pairs, config):
    trainer = MaPOTrainer(tiny_pipeline, config(), pairs, pairs)
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=2)
    try:
        with pytest.raises(RuntimeError, match="With FSDP2 evaluate.. needs train.. before it"):
            trainer.evaluate()
    finally:
        trainer.accelerator.state.fsdp_plugin = None


def test_an_unsupported_pipeline_is_found_without_weights(no_weights_are_loaded, tmp_path, config):
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline", "_diffusers_version": "0.42.1"}')
    with pytest.raises(TypeError, match="KandinskyPipeline is not supported"):
        MaPOTrainer(str(tmp_path), config(), Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}))

"""What a trainer does to the pipeline that it is given, and that a refusal leaves it as it was."""

import math

import pytest
import torch
from helpers.pipelines import build_tiny_pipeline, image_pairs, png
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import TrainerCallback

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, DivergenceError, MaPOTrainer
from trl_diffusion_pref.training.references import REFERENCE_ADAPTER


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["to_q", "to_k"], "init_lora_weights": "gaussian", **options})


@pytest.mark.parametrize("refused", ["peft_config", "row"])
def test_a_refusal_gives_a_wrapped_denoiser_back(refused, config, pairs):
    pipeline = build_tiny_pipeline()
    pipeline.unet = get_peft_model(pipeline.unet, lora(), adapter_name="old")
    pipeline.unet.add_adapter("new", lora())
    pipeline.unet.set_adapter("new")
    wrapper, rows, peft_config = pipeline.unet, pairs, lora()
    if refused == "row":
        same = png(Image.new("RGB", (16, 16), "red"))
        rows, peft_config = image_pairs([("a", same, same)]), None
    with pytest.raises(ValueError, match="already carries an adapter" if refused == "peft_config" else "row 0"):
        MaPOTrainer(pipeline, config(), rows, peft_config=peft_config)
    assert pipeline.unet is wrapper
    # The adapter that is active is still known.
    trained = MaPOTrainer(pipeline, config(), pairs).model
    names = {name.split(".")[-2] for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert names == {"new"}


def test_an_adapter_that_is_called_like_a_part_of_the_model_is_trained_alone(config, pairs):
    pipeline = build_tiny_pipeline()
    pipeline.unet = get_peft_model(pipeline.unet, lora(), adapter_name="to_q")
    model = MaPOTrainer(pipeline, config(), pairs).model
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert len(trained) == sum("lora_" in name for name, _ in model.named_parameters())


def test_a_second_trainer_without_checkpointing_switches_it_off(config, pairs):
    pipeline = build_tiny_pipeline()
    assert MaPOTrainer(pipeline, config(activation_checkpointing=True), pairs).model.is_gradient_checkpointing
    assert not MaPOTrainer(pipeline, config(activation_checkpointing=False), pairs).model.is_gradient_checkpointing


def test_a_denoiser_that_has_no_checkpointing_trains_without(config, pairs, monkeypatch):
    pipeline = build_tiny_pipeline()
    monkeypatch.setattr(type(pipeline.unet), "_supports_gradient_checkpointing", False)
    with pytest.raises(
        ValueError,
        match="unet of StableDiffusionPipeline does not support activation checkpointing. Set activation_checkp",
    ):
        MaPOTrainer(pipeline, config(activation_checkpointing=True), pairs)
    assert not MaPOTrainer(pipeline, config(activation_checkpointing=None), pairs).model.is_gradient_checkpointing


def test_a_peft_model_is_what_is_trained_on(config, pairs):
    pipeline = build_tiny_pipeline()
    pipeline.unet = get_peft_model(pipeline.unet, lora())
    wrapper = pipeline.unet
    assert isinstance(wrapper, PeftModel) and MaPOTrainer(pipeline, config(), pairs).model is wrapper


def test_the_frozen_copy_of_an_adapter_that_is_called_like_a_part_is_the_adapter_s(tmp_path, pairs):
    pipeline = build_tiny_pipeline()
    pipeline.unet = get_peft_model(pipeline.unet, lora(), adapter_name="to_q")
    config = DiffusionDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    reference = DiffusionDPOTrainer(pipeline, config, pairs).reference.live
    parameters = dict(pipeline.unet.named_parameters())
    kept = reference.parameters()
    assert len(kept) == sum("lora_" in name and name.split(".")[-2] == "to_q" for name in parameters)
    for name, frozen in kept.items():
        layer, _, rest = name.rpartition(f".{REFERENCE_ADAPTER}.")
        trained = parameters[f"{layer}.to_q.{rest}".removeprefix("base_model.model.")]
        assert torch.equal(frozen, trained)


def test_modules_that_a_carried_adapter_trains_besides_are_in_its_frozen_copy(tmp_path, pairs):
    """The loss starts at ln 2 with them as well."""
    pipeline = build_tiny_pipeline()
    carried = lora(target_modules=["to_q"], modules_to_save=["conv_out"], init_lora_weights=False)
    pipeline.unet = get_peft_model(pipeline.unet, carried)
    with torch.no_grad():
        pipeline.unet.get_parameter("base_model.model.conv_out.modules_to_save.default.weight").mul_(1.5)
    config = DiffusionDPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1, logging_steps=1, save_strategy="no"
    )
    trainer = DiffusionDPOTrainer(pipeline, config, pairs)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_several_adapters_are_refused_before_anything_is_encoded(config, pairs, monkeypatch):
    pipeline = build_tiny_pipeline()
    for name in ("one", "two"):
        pipeline.unet.add_adapter(lora(), adapter_name=name)
    monkeypatch.setattr(pipeline.vae, "encode", lambda *args: pytest.fail("encoded"))
    before = {name: parameter.requires_grad for name, parameter in pipeline.unet.named_parameters()}
    with pytest.raises(ValueError, match=r"carries 2 adapters that can be found \(one, two\)"):
        MaPOTrainer(pipeline, config(), pairs)
    assert {name: parameter.requires_grad for name, parameter in pipeline.unet.named_parameters()} == before


@pytest.mark.newest
def test_weights_are_stored_in_a_dtype_that_is_not_computed_in(config, pairs):
    pipeline = build_tiny_pipeline()
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    trainer = MaPOTrainer(pipeline, config(max_steps=1), pairs, pairs, peft_config=lora())
    assert trainer.denoise._dtype(trainer.model) == torch.bfloat16
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    try:
        trainer.train()
    except RuntimeError as error:
        # diffusers casts the weights back before the backward pass, which only some CPUs' kernels accept.
        assert "Float8_e4m3fn" in str(error)
        pytest.skip(f"no backward pass of these kernels: {error}")


def test_a_model_that_is_cast_says_its_new_dtype(config, pairs):
    trainer = MaPOTrainer(build_tiny_pipeline(), config(), pairs)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        trainer.model.to(dtype)
        assert trainer.denoise._dtype(trainer.model) == dtype


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt, DivergenceError])
def test_a_run_that_is_stopped_leaves_no_dropout(stopped_by, config, pairs):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            assert model.training
            raise stopped_by

    trainer = MaPOTrainer(build_tiny_pipeline(), config(), pairs, callbacks=[Stop()])
    with pytest.raises(stopped_by):
        trainer.train()
    assert not trainer.model.training


def test_a_stream_s_encoders_have_no_dropout(config, pairs):
    pipeline = build_tiny_pipeline()
    pipeline.text_encoder.train()
    MaPOTrainer(pipeline, config(), pairs.to_iterable_dataset())
    assert not pipeline.text_encoder.training


def test_rectangles_reach_the_denoiser_and_the_records(config, pairs):
    trainer = MaPOTrainer(build_tiny_pipeline(), config(resolution="16x24", max_steps=1), pairs)
    shapes = []
    trainer.model.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    trainer.train()
    assert {tuple(shape[1:]) for shape in shapes} == {(4, 8, 12)}
    assert trainer.encoder.preparation.shape == (3, 16, 24)

"""A LoRA on a base with quantised weights: loading, references, saving, resuming, guidance, memory, errors."""

import gc
import math

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.algorithms import config_for, rows
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from helpers.quantised import load_on_cpu, load_quantised, stored_bytes
from helpers.tensor_memory import PeakMemory
from peft import LoraConfig, get_peft_model_state_dict

from trl_diffusion_pref import TRAINERS, MaPOConfig, MaPOTrainer, estimate_memory
from trl_diffusion_pref.export import merge_lora
from trl_diffusion_pref.guidance import negative_guidance


@pytest.fixture(scope="module", autouse=True)
def quantises_on_a_cpu():
    with pytest.MonkeyPatch.context() as patch:
        load_on_cpu(patch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    build_tiny_pipeline().save_pretrained(path / "pipeline")
    return path


def make(name, model, folder, lora=True, evaluated=False, **options):
    config = config_for(name, folder, **{"max_steps": 2, "learning_rate": 1e-2, "use_cpu": True, **options})
    data = rows(name).select(range(4))
    peft_config = LoraConfig(r=2, lora_alpha=4) if lora else None
    return TRAINERS[name][1](model, config, data, data if evaluated else None, peft_config=peft_config)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("nf4", "adapter_off"),
        ("nf4", "copy"),
        ("nf4", "precomputed"),
        ("int8", "adapter_off"),
        pytest.param("nf4", "frozen_adapter", marks=pytest.mark.slow),
        pytest.param("nf4, nested", "adapter_off", marks=pytest.mark.slow),
        pytest.param("int8", "copy", marks=pytest.mark.slow),
        pytest.param("int8, alike", "precomputed", marks=pytest.mark.slow),
    ],
)
def test_the_reference_is_the_model_at_its_start(kind, reference, folder, tmp_path):
    pipeline = load_quantised(folder / "pipeline", kind)
    trainer = make("diffusion-dpo", pipeline, tmp_path, reference=reference)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/margins"] == first["rewards/chosen"] == 0
    assert second["rewards/margins"] != 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_activations_are_in_half_precision_under_autocast_as_with_other_layers(kind, folder):
    plain, quantised = (
        pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        for pipeline in (build_tiny_pipeline(), load_quantised(folder / "pipeline", kind))
    )
    x = torch.randn(2, 4, plain.in_features)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert quantised(x).dtype == plain(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert quantised(x).dtype == plain(x).dtype == torch.float32


@pytest.mark.parametrize("name", ["self-npo", "diffusion-kto", "diffusion-nft"])
def test_other_methods_train_on_four_bits(name, folder, tmp_path):
    trainer = make(name, load_quantised(folder / "pipeline", "nf4"), tmp_path)
    trainer.train()
    assert len(losses(trainer)) == 2 and all(map(math.isfinite, losses(trainer)))


# Eight bits differ in the layers alone, and run in `make test-all`.
BOTH = ["nf4", pytest.param("int8", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=BOTH)
def run(request, folder, tmp_path_factory):
    """A run of four steps on a quantised base with an evaluation and a checkpoint in the middle."""
    path = tmp_path_factory.mktemp("run")
    pipeline = load_quantised(folder / "pipeline", request.param)
    before = weights_of(pipeline.unet)
    trainer = make("diffusion-dpo", pipeline, path, evaluated=True, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    return request.param, path, before, trainer


def adapter(trainer):
    return get_peft_model_state_dict(trainer.model)


def test_the_base_s_weights_stay_as_they_are(run):
    _, _, before, trainer = run
    after = weights_of(trainer.model.get_base_model())
    after = {key.replace(".base_layer", ""): value for key, value in after.items() if ".lora_" not in key}
    assert_equal_weights(after, before)


def test_a_resumed_run_ends_as_if_it_had_not_stopped(run, folder):
    kind, path, _, trainer = run
    again = make("diffusion-dpo", load_quantised(folder / "pipeline", kind), path, max_steps=4)
    again.train(resume_from_checkpoint=str(path / "output" / "checkpoint-2"))
    assert_equal_weights(adapter(again), adapter(trainer))


def test_an_evaluation_says_how_the_lora_has_changed_preferences(run):
    *_, trainer = run
    found = trainer.evaluate()
    assert found["eval_rewards/margins"] != 0 and 0 <= found["eval_preference_accuracy"] <= 1


def sample(pipeline, scale=4.0):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "guidance_scale": scale, "output_type": "latent", "generator": generator}
    return pipeline("a red circle", **options).images


def test_the_lora_acts_on_the_unquantised_pipeline(run, folder):
    _, path, _, trainer = run
    pipeline = build_tiny_pipeline()
    before = sample(pipeline)
    pipeline.load_lora_weights(path / "output")
    assert not torch.equal(sample(pipeline), before)
    layers = get_peft_model_state_dict(pipeline.unet, adapter_name="default_0")
    assert_equal_weights(layers, {key.removeprefix("base_model.model."): v for key, v in adapter(trainer).items()})


def test_the_lora_merges_into_the_unquantised_pipeline_alone(run, folder, tmp_path):
    kind, path, *_ = run
    merged = merge_lora(path / "output", tmp_path / "merged", folder / "pipeline")
    pipeline = build_tiny_pipeline()
    pipeline.load_lora_weights(path / "output")
    torch.testing.assert_close(sample(DiffusionPipeline.from_pretrained(merged)), sample(pipeline), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="is quantised, and merged weights would be rounded"):
        merge_lora(path / "output", tmp_path / "other", load_quantised(folder / "pipeline", kind))


def test_negative_guidance_on_the_quantised_pipeline(run, folder, caplog):
    """Each side by itself: the guided sample is that of predictions combined by hand, with the LoRA on one side."""
    kind, path, *_ = run
    negative, plain = (load_quantised(folder / "pipeline", kind) for _ in range(2))
    negative.load_lora_weights(path / "output")
    unet, sides = plain.unet.forward, []

    def by_hand(sample, *args, **kwargs):
        states = kwargs.pop("encoder_hidden_states").chunk(2)
        sides.append((plain.unet, negative.unet))
        first = negative.unet(sample.chunk(2)[0], *args, encoder_hidden_states=states[0], **kwargs)[0]
        return (torch.cat([first, unet(sample.chunk(2)[1], *args, encoder_hidden_states=states[1], **kwargs)[0]]),)

    plain.unet.forward = by_hand
    expected = sample(plain)
    guided = load_quantised(folder / "pipeline", kind)
    unguided = sample(guided)
    with caplog.at_level("WARNING"), negative_guidance(guided, path / "output"):
        found = sample(guided)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert sides and not torch.allclose(found, unguided, rtol=0, atol=1e-4)
    assert "whose weights differ" not in caplog.text
    torch.testing.assert_close(sample(guided), unguided, rtol=0, atol=0)


def test_the_base_is_recognised_with_and_without_quantization(run, folder, caplog):
    kind, path, *_ = run
    for pipeline, warned in ((build_tiny_pipeline(), False), (build_tiny_pipeline(seed=1), True)):
        caplog.clear()
        with caplog.at_level("WARNING"), negative_guidance(pipeline, path / "output"):
            pass
        assert ("whose weights differ" in caplog.text) == warned


def test_full_weights_are_no_negative_of_a_quantised_pipeline(folder):
    pipeline = load_quantised(folder / "pipeline", "nf4")
    with (
        pytest.raises(ValueError, match="Quantised weights .* cannot be merged.*Use a LoRA"),
        negative_guidance(pipeline, build_tiny_pipeline(seed=1).unet),
    ):
        pass


@pytest.mark.parametrize("kind", BOTH)
def test_gradient_checkpointing_changes_no_loss(kind, folder, tmp_path):
    found = []
    for checkpointing in (False, True):
        pipeline = load_quantised(folder / "pipeline", kind)
        trainer = make("mapo", pipeline, tmp_path, activation_checkpointing=checkpointing)
        trainer.train()
        found.append((losses(trainer), adapter(trainer)))
    assert found[0][0] == found[1][0]
    assert_equal_weights(found[0][1], found[1][1])


def test_the_option_quantises_the_denoiser_alone(run, folder, tmp_path):
    kind, _, _, loaded = run
    trainer = make("diffusion-dpo", str(folder / "pipeline"), tmp_path, quantize=kind)
    trainer.train()
    assert losses(trainer) == losses(loaded)[:2]
    # The encoders left memory, and come back as they were.
    kinds = {type(parameter).__name__ for parameter in trainer.pipeline.text_encoder.parameters()}
    assert kinds == {"Parameter"} and trainer.pipeline.text_encoder.dtype == torch.float32


@pytest.mark.slow
def test_four_micro_batches_of_one_are_one_batch_of_four(folder, tmp_path):
    found = []
    for size, number in ((4, 1), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": number, "learning_rate": 1e-3}
        trainer = make("mapo", load_quantised(folder / "pipeline", "nf4"), tmp_path, optim="sgd", **options)
        trainer.train()
        found.append(adapter(trainer))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [*BOTH, pytest.param("nf4, nested", marks=pytest.mark.slow)])
def test_the_memory_estimate_counts_what_is_stored_and_held(kind, folder, tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2}
    config, lora = (
        MaPOConfig(report_to="none", save_strategy="no", **options),
        LoraConfig(r=2, init_lora_weights="gaussian"),
    )
    pipeline = load_quantised(folder / "pipeline", kind)
    parameters = sum(each.numel() for each in build_tiny_pipeline().unet.parameters())
    stored = stored_bytes(pipeline.unet)
    estimate = estimate_memory(pipeline, config, lora)
    trainer = MaPOTrainer(pipeline, config, rows("mapo").select(range(4)), peft_config=lora)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert estimate.weights == stored + sum(each.nbytes for each in trained)
    assert estimate.parameters == parameters + estimate.trained_parameters
    scales = stored_bytes(trainer.model) - sum(each.nbytes for each in trainer.model.parameters())
    gc.collect()
    with PeakMemory(trainer.model) as measured:
        trainer.train()
    assert estimate.total == pytest.approx(measured.peak + scales, rel=0.03)
    if kind in ("nf4", "int8"):
        by_option = MaPOConfig(quantize=kind, **options)
        assert estimate_memory(str(folder / "pipeline"), by_option, lora) == estimate


@pytest.mark.parametrize(
    ("options", "lora", "message"),
    [
        ({"quantize": "nf4"}, False, "quantize='nf4': quantised weights have no gradients.*peft_config"),
        (
            {"quantize": "int8", "model_init_kwargs": {"quantization_config": "any"}},
            True,
            "quantize='int8' and model_init_kwargs' quantization_config both",
        ),
        ({"quantize": "int8", "reference": "precomputed"}, True, "does not suit these 8-bit weights.*adapter_off"),
        (
            {"quantize": "nf4", "reference": "copy", "sync_ref_model": True},
            True,
            "quantised ones cannot be moved.*frozen_adapter",
        ),
    ],
)
def test_what_quantised_weights_cannot_do(options, lora, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        make("diffusion-dpo", str(folder / "pipeline"), tmp_path, lora=lora, **options)


def test_the_option_is_for_models_by_name(folder, tmp_path):
    with pytest.raises(ValueError, match="quantize='nf4' is for a model given by name.*Leave it out"):
        make("mapo", load_quantised(folder / "pipeline", "nf4"), tmp_path, quantize="nf4")


def test_without_a_gpu_the_option_says_so_before_weights_are_loaded(folder, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        from diffusers.quantizers.bitsandbytes import bnb_quantizer

        def needs_a_gpu(self, **options):
            raise RuntimeError("No GPU found.")

        patch.setattr(bnb_quantizer.BnB4BitDiffusersQuantizer, "validate_environment", needs_a_gpu)
        with pytest.raises(ValueError, match="quantize='nf4': weights cannot be quantised here .No GPU found"):
            make("mapo", str(folder / "pipeline"), tmp_path, quantize="nf4")

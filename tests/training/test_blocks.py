"""Checkpointing of a share of the blocks, and compiled blocks."""

import json
import shutil
from collections import Counter
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import tiny
from helpers.algorithms import trainer_for
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from helpers.tensor_memory import PeakMemory
from safetensors.torch import load_file

from trl_diffusion_pref import MaPOTrainer
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.training.blocks import SomeBlocks


# Traced, and then run as traced: no C++ compiler is needed, and versions are counted as always.
TRACED = {"torch_compile": True, "torch_compile_backend": "eager"}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **tolerances) -> None:
    assert list(first) == list(second)
    torch.testing.assert_close(first, second, **tolerances)


# ---- A share of the blocks ---------------------------------------------------------------------------------------


def _count(calls: Counter, block: torch.nn.Module, inputs: tuple) -> None:
    calls[block] += 1


def gradients_and_calls(denoiser: UNet2DConditionModel, share: float | None) -> tuple[dict, list[int], int]:
    """Gradients, how often each block was called in the second of two steps, in order, and the peak of memory."""
    denoiser.disable_gradient_checkpointing()
    if share is not None:
        denoiser.enable_gradient_checkpointing(SomeBlocks(share))
    kinds = ("ResnetBlock2D", "BasicTransformerBlock")
    blocks = [module for module in denoiser.modules() if type(module).__name__ in kinds]
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(4, 4, 8, 8, generator=generator), torch.randn(4, 8, 32, generator=generator)
    for _ in range(2):
        calls: Counter = Counter()
        count = partial(_count, calls)
        handles = [block.register_forward_pre_hook(count) for block in blocks]
        denoiser.zero_grad()
        with PeakMemory(denoiser) as measured:
            denoiser(x, 10, text).sample.square().mean().backward()
        for handle in handles:
            handle.remove()
    gradients = {name: parameter.grad.clone() for name, parameter in denoiser.named_parameters()}
    return gradients, [calls[block] for block in calls], measured.peak


def test_a_share_of_the_blocks_is_computed_again_and_gradients_stay_the_same():
    denoiser = build_tiny_pipeline().unet.train()
    kept, calls, most = gradients_and_calls(denoiser, None)
    assert set(calls) == {1}
    again, calls, least = gradients_and_calls(denoiser, 1.0)
    # diffusers leaves the first block of the middle out.
    blocks, left_out, peaks = calls.count(2), calls.count(1), [most]
    assert blocks >= 7 and blocks + left_out == len(calls)
    assert_close(again, kept, rtol=0, atol=0)
    for share in (0.25, 0.5, 0.9):
        own, calls, peak = gradients_and_calls(denoiser, share)
        assert_close(own, kept, rtol=0, atol=0)
        assert calls.count(2) == int(share * blocks) and len(calls) == blocks + left_out, share
        peaks.append(peak)
    # Less memory the more blocks; the last two may have their peak in one block that both compute again.
    assert peaks[0] > peaks[1] > peaks[2] >= peaks[3] >= least < most


def test_shares_are_spread_evenly():
    for share, expected in (
        (0.5, [0, 1] * 5),
        (0.3, [0, 0, 0, 1, 0, 0, 1, 0, 0, 1]),
        (0.1, [0] * 9 + [1]),
        (1.0, [1] * 10),
    ):
        some, again = SomeBlocks(share), []
        for _ in range(10):
            layer, calls = torch.nn.Linear(1, 1), []
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            some(layer, torch.ones(1, requires_grad=True)).backward()
            again.append(len(calls) - 1)
        assert again == expected, share


def test_a_run_with_a_share_trains_as_without(tmp_path):
    runs = {}
    for share in (None, 0.5):
        options = {} if share is None else {"activation_checkpointing": True, "checkpointing_share": share}
        trainer = trainer_for("mapo", tmp_path, **options)
        trainer.train()
        runs[share] = weights_of(trainer.model)
        assert trainer.model.is_gradient_checkpointing == (share is not None)
    assert_close(runs[0.5], runs[None], rtol=0, atol=0)


# ---- Compiled blocks ---------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: torch.nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules() if module._compiled_call_impl is not None]


def test_compiled_blocks_train_as_without_under_the_same_names(tmp_path, fresh_compiler):
    plain = trainer_for("mapo", tmp_path / "plain")
    plain.train()
    trainer = trainer_for("mapo", tmp_path / "compiled", save_steps=2, save_strategy="steps", **TRACED)
    trainer.train()
    assert set(compiled(trainer.model)) == {"BasicTransformerBlock"}
    # accelerate wrapped nothing.
    assert type(trainer.model_wrapped) is UNet2DConditionModel
    assert_close(weights_of(trainer.model), weights_of(plain.model), rtol=1e-4, atol=1e-6)
    written = load_file(tmp_path / "compiled/output/checkpoint-4/unet/diffusion_pytorch_model.safetensors")
    assert set(written) == set(plain.model.state_dict())
    # Resuming equals never having stopped.
    shutil.rmtree(tmp_path / "compiled/output/checkpoint-4")
    again = trainer_for("mapo", tmp_path / "compiled", **TRACED)
    again.train(resume_from_checkpoint=True)
    assert_equal_weights(weights_of(again.model), weights_of(trainer.model))
    # The samples are of the tuned model.
    assert trainer.pipeline.unet is trainer.model


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["copy", "precomputed", "adapter_off"])
def test_a_compiled_reference_is_exactly_the_start(reference, tmp_path, fresh_compiler):
    lora = reference == "adapter_off"
    options = {"reference": reference, "learning_rate": 0.0, "max_steps": 2, "weight_decay": 0.0, **TRACED}
    trainer = trainer_for("diffusion-dpo", tmp_path, lora=lora, **options)
    if reference == "copy":
        assert compiled(trainer.reference.live.module) == compiled(trainer.model) != []
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["rewards/margins"] for entry in steps] == [0.0, 0.0]
    torch.testing.assert_close(losses(trainer), [torch.tensor(2.0).log().item()] * 2, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_no_block_is_given_up_by_the_compiler(tmp_path, fresh_compiler):
    """Widths, gradients, adapters and evaluation make more versions than the 8 after which torch runs as written."""
    torch._dynamo.utils.counters.clear()
    trainer = trainer_for("diffusion-dpo", tmp_path, lora=True, reference="adapter_off", **TRACED)
    trainer.train()
    trainer.evaluate()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
    assert not torch._dynamo.utils.counters["unimplemented"]
    assert "recompile_limit" not in json.dumps(torch._dynamo.utils.counters, default=str)


@pytest.mark.parametrize("name", tiny.IMAGE_CASES)
def test_every_denoiser_names_its_blocks_or_is_refused(name, tmp_path):
    pipeline = tiny.build(name)
    denoiser = family_for(pipeline).denoiser(pipeline)
    kinds = getattr(denoiser, "_repeated_blocks", None) or getattr(denoiser, "_no_split_modules", None)
    found = {type(module).__name__ for module in denoiser.modules()} & set(kinds or ())
    assert found


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_with_cuda_graphs_are_refused(mode, tmp_path):
    with pytest.raises(ValueError, match=f"torch_compile_mode='{mode}' records CUDA graphs.*no-cudagraphs"):
        trainer_for("mapo", tmp_path, torch_compile_mode=mode)


def test_a_model_without_named_blocks_is_refused(config, pairs, monkeypatch):
    pipeline = build_tiny_pipeline()
    for name in ("_repeated_blocks", "_no_split_modules"):
        monkeypatch.setattr(UNet2DConditionModel, name, None)
    with pytest.raises(ValueError, match="UNet2DConditionModel does not say which blocks it repeats.*torch_compile=F"):
        MaPOTrainer(pipeline, config(torch_compile=True), pairs)
    assert MaPOTrainer(pipeline, config(), pairs).model is pipeline.unet


def test_a_share_without_checkpointing_is_refused(config):
    for options in ({"activation_checkpointing": False}, {"gradient_checkpointing": False}):
        with pytest.raises(
            ValueError, match="checkpointing_share=0.5 has no effect with activation_checkpointing=Fal"
        ):
            config(**{"activation_checkpointing": None, **options}, checkpointing_share=0.5)
    with pytest.raises(ValueError, match="checkpointing_share"):
        config(activation_checkpointing=True, checkpointing_share=0.0)

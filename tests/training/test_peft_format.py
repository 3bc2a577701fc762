"""LoRA of pipelines without `load_lora_weights`: what is written and said is what PEFT loads."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.pipelines import assert_equal_weights, weights_of
from huggingface_hub import ModelCard
from peft import LoraConfig

from trl_diffusion_pref import MaPOConfig, MaPOTrainer, SelfNPOConfig, SelfNPOTrainer
from trl_diffusion_pref.guidance import negative_guidance


def options(folder: Path, **more) -> dict:
    return {
        "output_dir": str(folder / "output"),
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "resolution": 16,
        "save_strategy": "no",
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "dataset_cache_dir": str(folder / "cache"),
        **more,
    }


@pytest.fixture
def lora() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=8, lora_dropout=0.3, init_lora_weights="gaussian")


def lora_tensors(transformer) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights_of(transformer).items() if ".lora_" in name}


def draw(pipeline) -> torch.Tensor:
    size = {"height": 16, "width": 16, "use_resolution_binning": False, "clean_caption": False}
    generator = torch.Generator().manual_seed(3)
    return pipeline("a red circle", **size, num_inference_steps=2, output_type="latent", generator=generator)[0]


def test_the_card_s_snippet_loads_the_lora(lora, pairs, tmp_path):
    trainer = MaPOTrainer(tiny.build("pixart_sigma"), MaPOConfig(**options(tmp_path)), pairs, peft_config=lora)
    trainer.train()
    trainer.save_model()
    tiny.build("pixart_sigma").save_pretrained(tmp_path / "base")
    card = ModelCard.load(tmp_path / "output" / "README.md").content
    code = card.split("```python")[1].split("```")[0]
    *loading, last = code.strip().splitlines()
    assert last.startswith("image = pipeline(")
    places = {'"path/to/base"': repr(str(tmp_path / "base")), '"output"': repr(str(tmp_path / "output"))}
    for written, place in places.items():
        assert written in code
        loading = [line.replace(written, place) for line in loading]
    namespace: dict = {}
    exec("\n".join(loading), namespace)
    torch.testing.assert_close(draw(namespace["pipeline"]), draw(trainer.pipeline), rtol=0, atol=1e-5)
    assert (draw(tiny.build("pixart_sigma")) - draw(trainer.pipeline)).abs().max() > 1e-3


@pytest.mark.parametrize("place", ["folder", "file", "pipeline"])
def test_a_negative_lora_is_the_unconditional_side(place, lora, pairs, tmp_path):
    cfg = SelfNPOConfig(**options(tmp_path, start="noise", solver_steps=4, truncated_steps=2))
    trainer = SelfNPOTrainer(tiny.build("pixart_sigma"), cfg, pairs.select_columns("prompt"), peft_config=lora)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "output"
    whole = copy.deepcopy(trainer.model).merge_and_unload()
    negative = {
        "folder": str(folder),
        "file": str(folder / "adapter_model.safetensors"),
        "pipeline": trainer.pipeline,
    }[place]

    pipeline = tiny.build("pixart_sigma")
    before = weights_of(pipeline.transformer)
    plain = draw(pipeline)
    with negative_guidance(pipeline, whole):
        expected = draw(pipeline)
    with negative_guidance(pipeline, negative):
        guided = draw(pipeline)
    effect = (expected - plain).abs().max()
    assert effect > 1e-3
    # Merged weights round differently, on some processors more than on others.
    assert (guided - expected).abs().max() < 1e-5 * effect
    assert_equal_weights(weights_of(pipeline.transformer), before)
    assert not hasattr(pipeline.transformer, "peft_config")


def test_an_adapter_that_was_trained_before_is_trained_on(lora, pairs, tmp_path):
    pipeline = tiny.build("pixart_sigma")
    MaPOTrainer(pipeline, MaPOConfig(**options(tmp_path)), pairs, peft_config=lora).train()
    before = lora_tensors(pipeline.transformer)
    MaPOTrainer(pipeline, MaPOConfig(**options(tmp_path)), pairs).train()
    after = lora_tensors(pipeline.transformer)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # two steps at this rate move a number by 0.02 at most
    assert all((before[name] - after[name]).abs().max() < 0.03 for name in before)

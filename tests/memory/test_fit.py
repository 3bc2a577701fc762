"""What fits a card: against single estimates, brute force and PyTorch's own count of operations."""

import math
import random

import pytest
from helpers.pipelines import build_tiny_pipeline
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    MaPOConfig,
    MaPOTrainer,
    estimate_memory,
    fit_memory,
)
from trl_diffusion_pref.memory.cards import GIB, card_bytes, smallest_card
from trl_diffusion_pref.memory.estimate import CountedStep
from trl_diffusion_pref.memory.fit import LARGEST, largest_batch
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs


def config_of(kind=DiffusionDPOConfig, **options):
    options = {"output_dir": "unused", "use_cpu": True, "per_device_train_batch_size": 4, **options}
    return kind(**options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "pipeline"
    build_tiny_pipeline().save_pretrained(path)
    return str(path)


# ---- The largest batch -------------------------------------------------------------------------------------------


def test_the_largest_batch_is_the_one_that_all_sizes_tried_would_give():
    generator = random.Random(0)
    for _ in range(300):
        lines = [(generator.randrange(1, 1000), generator.randrange(0, 50)) for _ in range(generator.randrange(1, 5))]
        limit, calls = generator.randrange(1, 4000), set()

        def memory(size, lines=lines, calls=calls):
            calls.add(size)
            return max(start + rise * size for start, rise in lines)

        found = largest_batch(memory, limit)
        asked = len(calls)
        assert found == max((size for size in range(1, LARGEST + 1) if memory(size) <= limit), default=0)
        assert asked <= 10


@pytest.mark.slow
def test_the_largest_batch_of_a_config_fits_and_one_row_more_does_not(folder):
    def config(size):
        return config_of(activation_checkpointing=False, per_device_train_batch_size=size)

    def used(size):
        return estimate_memory(folder, config(size)).total

    fit = fit_memory(int(1.5 * used(4)), folder, config(4))
    asked = fit.options[0]
    assert fit.fits and asked.fits and asked.changes == () and asked.slow_down == 1
    assert asked.memory == used(4) and asked.least == used(1)
    assert asked.largest_batch > 4 and used(asked.largest_batch) <= fit.limit < used(asked.largest_batch + 1)
    # It has no checkpointing to leave out, and a reference to compute before.
    assert [option.changes for option in fit.options[1:]] == [('reference="precomputed"',)]
    # Three of four parts remain of forward (1), backward (2) and the reference (1).
    assert fit.options[1].slow_down == pytest.approx(0.75, abs=0.01)


# ---- Changes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def too_small(folder):
    """All weights under Diffusion-DPO on a card for which they need a LoRA and more."""
    config = config_of(activation_checkpointing=False)
    return fit_memory(int(0.3 * estimate_memory(folder, config).total), folder, config)


@pytest.mark.slow
def test_each_row_is_the_estimate_of_the_config_with_its_changes(too_small, folder):
    options = {
        'optim="adamw_bnb_8bit"': {"optim": "adamw_bnb_8bit"},
        'reference="precomputed"': {"reference": "precomputed"},
        "activation_checkpointing=True": {"activation_checkpointing": True},
        'quantize="nf4"': {"quantize": "nf4"},
        'model_init_kwargs={"dtype": "bfloat16"}': {"model_init_kwargs": {"dtype": "bfloat16"}},
        'model_init_kwargs={"dtype": "bfloat16"}, optim="adamw_torch_8bit", optim_args="bf16_stochastic_round=True"': {
            "model_init_kwargs": {"dtype": "bfloat16"},
            "optim": "adamw_torch_8bit",
        },
    }
    names = [str(option) for option in too_small.options]
    assert names[:4] == ["as asked", *list(options)[:3]]
    assert " + ".join(list(options)[:3]) in names
    # Rounding by chance has an 8-bit Adam of its own.
    together = next(name for name in names if " + " in name and "stochastic" in name)
    assert "adamw_bnb_8bit" not in together and "LoRA" not in together
    for option in too_small.options:
        lora = LoraConfig(r=16, lora_alpha=16) if any("LoRA" in change for change in option.changes) else None
        changed = {"activation_checkpointing": False}
        for change in option.changes:
            changed |= options.get(change, {})
        assert option.memory == estimate_memory(folder, config_of(**changed), lora).total, str(option)
        assert option.fits == (option.memory <= too_small.limit)


@pytest.mark.slow
def test_what_trains_the_same_comes_before_a_lora_and_the_table_says_so(too_small):
    trains_lora = [any("LoRA" in change for change in option.changes) for option in too_small.options]
    assert trains_lora == sorted(trains_lora) and trains_lora[-1]
    shown = str(too_small)
    assert "It does not fit as asked." in shown and "LoRA of rank 16 (not all weights)" in shown
    assert "expected from the operations counted, not measured" in shown


def test_a_loaded_pipeline_is_not_told_to_load_otherwise():
    config, pipeline, lora = (
        config_of(MaPOConfig, activation_checkpointing=True),
        build_tiny_pipeline(),
        LoraConfig(r=4),
    )
    fit = fit_memory(int(0.9 * estimate_memory(pipeline, config, lora).total), pipeline, config, lora)
    changes = {change for option in fit.options for change in option.changes}
    assert changes <= {'optim="adamw_bnb_8bit"'}


def test_a_card_too_small_for_anything_names_the_one_that_is_needed(folder):
    config = config_of(MaPOConfig, activation_checkpointing=True, per_device_train_batch_size=2)
    fit = fit_memory(1000, folder, config, LoraConfig(r=4))
    assert fit.nearest is not None and all(option.largest_batch == 0 for option in fit.options)
    assert fit.nearest.least == min(option.least for option in fit.options)
    assert "Nothing fits. Least takes" in str(fit) and "a card of 8 GB is needed" in str(fit)


def test_smaller_batches_make_the_same_step():
    """Four rows fit nowhere, and fewer do: the advice has their number and that of micro-batches."""
    options = {"activation_checkpointing": True, "gradient_accumulation_steps": 3}
    config, of_two = (config_of(MaPOConfig, per_device_train_batch_size=size, **options) for size in (4, 2))
    pipeline, lora = build_tiny_pipeline(), LoraConfig(r=4)
    fit = fit_memory(math.ceil(1.05 * estimate_memory(pipeline, of_two, lora).total / 0.9), pipeline, config, lora)
    assert not any(option.fits for option in fit.options)
    assert "per_device_train_batch_size=2, gradient_accumulation_steps=6." in str(fit)


# ---- Operations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_pytorch_counts_in_a_real_step(checkpointing, tmp_path):
    config = config_of(
        MaPOConfig,
        output_dir=str(tmp_path),
        activation_checkpointing=checkpointing,
        save_strategy="no",
        max_steps=1,
    )
    counted = CountedStep(load_pipeline(), config, None, "cpu").counts(checkpointing, 4).flops
    trainer = MaPOTrainer(load_pipeline(), config, preference_pairs(4))
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainer.compute_loss(trainer.model, batch).backward()
    # Attention is a small part of these models, and flash attention computes one of its products twice.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


# ---- Cards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "size"), [("24GB", 24 * GIB), ("7.5 GiB", int(7.5 * GIB)), ("80gb", 80 * GIB), (12345, 12345)]
)
def test_a_card_is_given_by_its_size(card, size):
    assert card_bytes(card) == size


@pytest.mark.parametrize("card", ["24", "large", "-8GB", 0, -1, True, 24.0, "0GB"])
def test_what_is_no_size_is_an_error(card):
    with pytest.raises(ValueError, match='is no size of a card. Write it with its unit, such as "24GB"'):
        card_bytes(card)


def test_the_smallest_card_has_a_tenth_to_spare():
    assert smallest_card(int(0.9 * 24 * GIB)) == 24
    assert smallest_card(int(0.9 * 24 * GIB) + 2) == 40
    assert smallest_card(200 * GIB) is None


def test_the_step_is_counted_on_the_device_that_is_asked_for(folder):
    with pytest.raises(ValueError, match="device_type='tpu'"):
        fit_memory("8GB", folder, config_of(), device_type="tpu")

"""Diffusion-NPO: the trainers on pairs with the preference inverted."""

import json

import pytest
import torch
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from peft import LoraConfig

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer
from trl_diffusion_pref.data import Batch


TRAINERS = {
    "mapo": (MaPOTrainer, MaPOConfig, {}),
    "dpo": (DiffusionDPOTrainer, DiffusionDPOConfig, {"beta": 200.0, "divergence_guard": "off"}),
    "dpo precomputed": (
        DiffusionDPOTrainer,
        DiffusionDPOConfig,
        {"beta": 200.0, "divergence_guard": "off", "reference": "precomputed"},
    ),
}


def trained(kind, tmp_path, data, eval_dataset=None, peft_config=None, **options):
    trainer_class, config_class, own = TRAINERS[kind]
    cfg = config_class(
        output_dir=str(tmp_path / "output"),
        dataset_cache_dir=str(tmp_path / "cache"),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        activation_checkpointing=False,
        latent_sampling="mean",
        **own,
        **options,
    )
    trainer = trainer_class(build_tiny_pipeline(), cfg, data, eval_dataset, peft_config=peft_config)
    trainer.train()
    return trainer


def turned(pairs):
    return pairs.rename_columns({"chosen": "better", "rejected": "worse"}).rename_columns(
        {"better": "rejected", "worse": "chosen"}
    )


@pytest.mark.parametrize("kind", TRAINERS)
def test_it_is_training_on_turned_pairs(kind, tmp_path, pairs):
    held_out = pairs.select(range(5))
    negative = trained(kind, tmp_path, pairs, held_out, negative=True)
    other = trained(kind, tmp_path, turned(pairs), turned(held_out))
    assert_equal_weights(weights_of(negative.model), weights_of(other.model))
    names = ("loss", "rewards/margins", "mse/chosen")
    for left, right in zip(negative.state.log_history, other.state.log_history, strict=True):
        assert [left.get(name) for name in names] == [right.get(name) for name in names]
    left, right = negative.evaluate(), other.evaluate()
    for name in ("eval_loss", "eval_preference_accuracy", "eval_likelihood_accuracy", "eval_base_likelihood_accuracy"):
        assert left[name] == pytest.approx(right[name], abs=1e-6)


def test_soft_labels_stay_the_label_s_probability(tmp_path, pairs):
    labelled = pairs.add_column("soft_label", [0.6 + 0.02 * i for i in range(16)])
    runs = [
        trained("dpo", tmp_path, data, loss_type="irepo", **options)
        for data, options in ((labelled, {"negative": True}), (turned(labelled), {}))
    ]
    assert_equal_weights(*(weights_of(run.model) for run in runs))


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, lora_alpha=4)])
def test_it_is_saved_and_named_as_a_negative_model(peft_config, tmp_path, pairs):
    trainer = trained("mapo", tmp_path, pairs, peft_config=peft_config, negative=True)
    trainer.save_model()
    record = json.loads((tmp_path / "output" / "trl_diffusion_pref.json").read_text())
    assert record["negative"] is True
    card = (tmp_path / "output" / "README.md").read_text()
    for text in (
        "A negative model",
        "by Diffusion-NPO (MaPO)",
        "2505.11245",
        "with negative_guidance(",
        "- diffusion-npo",
    ):
        assert text in card
    assert "fine-tuned on preference pairs" not in card


def test_without_the_option_nothing_is_called_negative(tmp_path, pairs):
    trainer = trained("mapo", tmp_path, pairs)
    trainer.save_model()
    assert json.loads((tmp_path / "output" / "trl_diffusion_pref.json").read_text())["negative"] is False
    assert "negative" not in (tmp_path / "output" / "README.md").read_text().lower().replace("`negative` | false", "")


def test_precomputed_errors_of_the_other_direction_are_not_taken(tmp_path, pairs):
    folder = {"reference_errors_dir": str(tmp_path / "errors")}
    trained("dpo precomputed", tmp_path, pairs, **folder)
    with pytest.raises(ValueError, match="negative: made with False, this run has True"):
        trained("dpo precomputed", tmp_path, pairs, negative=True, **folder)


def test_custom_collators_are_turned_too(tmp_path, pairs):
    cfg = MaPOConfig(
        output_dir=str(tmp_path), negative=True, activation_checkpointing=False, dataset_cache_dir=str(tmp_path / "c")
    )
    trainer = MaPOTrainer(build_tiny_pipeline(), cfg, pairs)
    rows = [trainer.train_dataset[i] for i in range(2)]
    latents = trainer._prepare_inputs(trainer.encoder.collator(rows)).latents
    assert torch.equal(latents.mean[0][1], rows[1]["latents/mean"][1])
    assert torch.equal(latents.std[1][0], rows[0]["latents/std"][0])


def test_numbers_of_single_samples_are_reversed_with_them():
    scores, votes = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([5.0])
    batch = Batch(torch.tensor([0]), None, {}, {}, {}, {"scores": scores, "votes": votes}).in_reverse()
    assert torch.equal(batch.scalars["scores"], torch.tensor([[3.0, 2.0, 1.0]]))
    assert torch.equal(batch.scalars["votes"], votes)

"""What surrounds training on clips and sound: held-out accuracy, evaluation, columns, precomputed references."""

import math

import pytest
from helpers import tiny
from helpers.training_runs import cache, lora_config, options, pairs, train  # noqa: F401

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    SelfNPOConfig,
    SelfNPOTrainer,
)
from trl_diffusion_pref.evaluation import preference_accuracy
from trl_diffusion_pref.families import family_for


NAMES = ["wan", "cogvideox", "stable_audio", "audioldm2"]
clips_and_sound = pytest.mark.parametrize("name", NAMES)


@clips_and_sound
def test_held_out_accuracy_of_a_pipeline_is_its_trainer_s(name, pairs, options):  # noqa: F811
    cfg = MaPOConfig(**options(eval_draws=2, per_device_eval_batch_size=2, seed=3))
    metrics = MaPOTrainer(tiny.build(name), cfg, pairs, pairs).evaluate()
    assert math.isfinite(metrics["eval_loss"])
    size = {"resolution": cfg.resolution, "num_frames": cfg.num_frames}
    accuracy = preference_accuracy(tiny.build(name), pairs, draws=2, seed=3, **size)
    assert metrics["eval_likelihood_accuracy"] == pytest.approx(accuracy.likelihood_accuracy)


@pytest.mark.parametrize("name", ["wan", "stable_audio"])
def test_a_precomputed_reference_is_the_start_and_is_found_again(name, pairs, options, tmp_path):  # noqa: F811
    cfg = DiffusionDPOConfig(
        **options(reference="precomputed", reference_errors_dir=str(tmp_path / "errors"), beta=700.0)
    )
    for _ in range(2):  # made, then found again
        trainer = DiffusionDPOTrainer(tiny.build(name), cfg, pairs, peft_config=lora_config(False))
        assert train(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("name", ["sana"])
def test_a_precomputed_reference_is_found_by_a_second_trainer_on_the_same_pipeline(
    name,
    pairs,  # noqa: F811
    options,  # noqa: F811
    tmp_path,
):
    """Sana's pipeline changes its tokenizer when it encodes, and the reference says what prompts were encoded with."""
    cfg = DiffusionDPOConfig(**options(reference="precomputed", reference_errors_dir=str(tmp_path / "errors")))
    pipeline = tiny.build(name)
    for _ in range(2):
        trainer = DiffusionDPOTrainer(pipeline, cfg, pairs)
    assert trainer.encoder.prompts.encoded_with


@clips_and_sound
def test_self_npo_names_the_column_that_the_pipeline_s_samples_are_in(name, pairs, options):  # noqa: F811
    pipeline = tiny.build(name)
    modality = family_for(pipeline).modality
    cfg = SelfNPOConfig(**options(start="data"))
    wrong = pairs.remove_columns("rejected").rename_column("chosen", "image")
    with pytest.raises(ValueError, match=f"train_dataset lacks the column {modality}; found: prompt, image"):
        SelfNPOTrainer(pipeline, cfg, wrong)
    with pytest.raises(ValueError, match=f"train_dataset lacks the column {modality}; found: prompt, chosen"):
        SelfNPOTrainer(pipeline, cfg, pairs.remove_columns("rejected"))


@clips_and_sound
def test_self_npo_evaluates_held_out_samples(name, pairs, options):  # noqa: F811
    pipeline = tiny.build(name)
    samples = pairs.remove_columns("rejected").rename_column("chosen", family_for(pipeline).modality)
    cfg = SelfNPOConfig(**options(start="data", solver_steps=4, truncated_steps=2))
    assert math.isfinite(SelfNPOTrainer(pipeline, cfg, samples, samples).evaluate()["eval_loss"])

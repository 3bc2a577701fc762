"""Diffusion-KTO's trainer: rows, the baseline over steps and processes, the share of liked rows, references."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from PIL import Image as Images

from trl_diffusion_pref import (
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    encode_dataset,
    estimate_memory,
)
from trl_diffusion_pref.algorithms.diffusion_kto import baseline
from trl_diffusion_pref.algorithms.diffusion_kto.baseline import RunningGain
from trl_diffusion_pref.data import corrupt


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("kto"))


@pytest.fixture
def kto(tmp_path, cache):
    """Makes configs for short runs."""

    def make(**options) -> DiffusionKTOConfig:
        defaults = {
            "output_dir": str(tmp_path / "output"),
            "dataset_cache_dir": cache,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "beta": 50.0,
            "divergence_guard": "off",
            "prompt_dropout": 0.0,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "activation_checkpointing": False,
            "report_to": "none",
        }
        return DiffusionKTOConfig(**{**defaults, **options})

    return make


@pytest.fixture(scope="module")
def votes(pairs) -> Dataset:
    """Eight images with a vote each."""
    images = [row["chosen"] if index % 2 else row["rejected"] for index, row in enumerate(pairs.select(range(8)))]
    rows = {"prompt": pairs["prompt"][:8], "image": images, "label": [bool(index % 2) for index in range(8)]}
    return Dataset.from_dict(rows, Features({"prompt": Value("string"), "image": Image(), "label": Value("bool")}))


def recorded(trainer: DiffusionKTOTrainer) -> list[dict[str, torch.Tensor]]:
    """The values of each micro-batch in training, with rows and times."""
    seen, compute = [], trainer.compute_losses

    def compute_losses(model, batch, mode):
        values = compute(model, batch, mode)
        if mode.training:
            seen.append({name: value.detach() for name, value in values.items()} | {"rows": batch.rows})
        return values

    trainer.compute_losses = compute_losses
    return seen


def gains(values: dict[str, torch.Tensor]) -> np.ndarray:
    """`(B,)` reference error minus error, whatever the label."""
    ours, theirs = (
        torch.where(values[f"mse/{ref}chosen"].isnan(), values[f"mse/{ref}rejected"], values[f"mse/{ref}chosen"])
        for ref in ("", "ref_")
    )
    return (theirs - ours).double().numpy()


class TestRows:
    def test_pairs_become_two_rows_with_times_of_their_own(self, pairs, kto):
        trainer = DiffusionKTOTrainer(build_tiny_pipeline(), kto(max_steps=1), pairs.select(range(4)))
        assert trainer.train_dataset.scalars["label"].tolist() == [1, 0] * 4
        first, second = trainer.train_dataset[0], trainer.train_dataset[1]
        assert first["prompt"] == second["prompt"]
        assert not torch.equal(first["latents/mean"], second["latents/mean"])
        seen = recorded(trainer)
        trainer.train()
        assert len(set(seen[0]["time"].tolist())) == 4

    def test_at_the_start_the_loss_is_half_the_weights_of_the_labels(self, votes, kto):
        cfg = kto(max_steps=1, per_device_train_batch_size=8, desirable_weight=3.0, undesirable_weight=0.5)
        trainer = DiffusionKTOTrainer(build_tiny_pipeline(), cfg, votes)
        trainer.train()
        entry = trainer.state.log_history[0]
        assert entry["loss"] == pytest.approx((3.0 + 0.5) / 4, rel=1e-6)
        assert entry["kl"] == entry["rewards/liked"] == entry["rewards/disliked"] == 0.0
        assert entry["liked"] == 0.5

    @pytest.mark.parametrize(
        ("label", "message"), [(True, "all rows have the label 1"), (0, "all rows have the label 0")]
    )
    def test_labels_of_one_kind_are_refused_before_encoding(self, label, message, votes, kto, monkeypatch):
        pipeline = build_tiny_pipeline()
        monkeypatch.setattr(pipeline.vae, "encode", None)
        one_kind = votes.remove_columns("label").add_column("label", [label] * 8)
        with pytest.raises(ValueError, match=f"^train_dataset: {message}.*Add rows"):
            DiffusionKTOTrainer(pipeline, kto(), one_kind, votes)

    def test_labels_that_are_left_of_one_kind_are_refused(self, votes, kto):
        """The only row that was not liked has an empty prompt, and is left out."""
        few = votes.remove_columns(["label", "prompt"]).add_column("label", [1] * 7 + [0])
        few = few.add_column("prompt", ["a circle"] * 7 + [""])
        with pytest.raises(ValueError, match="train_dataset: all rows have the label 1"):
            DiffusionKTOTrainer(build_tiny_pipeline(), kto(on_bad_row="skip", max_bad_share=0.5), few)

    def test_a_label_that_is_none_is_named_by_row(self, votes, kto):
        labels = votes.remove_columns("label").add_column("label", [0.0, 1.0] * 3 + [0.0, 2.0])
        with pytest.raises(ValueError, match="row 7, column 'label': is 2, not one of 0, 1"):
            DiffusionKTOTrainer(build_tiny_pipeline(), kto(), labels)

    def test_an_evaluation_may_have_labels_of_one_kind(self, votes, kto):
        liked = votes.filter(lambda row: row["label"])
        metrics = DiffusionKTOTrainer(build_tiny_pipeline(), kto(), votes, liked).evaluate()
        assert metrics["eval_liked"] == 1.0 and metrics["eval_loss"] == 0.5
        assert "eval_rewards/liked" in metrics and "eval_rewards/disliked" not in metrics

    def test_a_stream_trains_with_a_warning_that_its_labels_are_not_known(self, votes, kto, caplog):
        stream = votes.to_iterable_dataset()
        DiffusionKTOTrainer(build_tiny_pipeline(), kto(max_steps=1), stream).train()
        assert "cannot be checked whether its labels are of both kinds" in caplog.text
        with pytest.raises(ValueError, match="positive_ratio=0.8 draws rows by their labels, and train_dataset is st"):
            DiffusionKTOTrainer(build_tiny_pipeline(), kto(positive_ratio=0.8), stream)


class TestBaseline:
    def test_it_is_the_mean_of_earlier_steps_over_their_micro_batches(self, votes, kto):
        # A model that only learns from what was liked gains on everything.
        steps = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        cfg = kto(**steps, kl_decay=0.5, undesirable_weight=0.0, learning_rate=3e-4)
        trainer = DiffusionKTOTrainer(build_tiny_pipeline(), cfg, votes)
        seen = recorded(trainer)
        trainer.train()
        mean = weight = 0.0
        for step in range(4):
            micro_batches = seen[2 * step : 2 * step + 2]
            expected = max(0.0, mean / weight) if weight else 0.0
            for values in micro_batches:
                assert values["kl"].tolist() == pytest.approx([expected] * 2, rel=1e-5, abs=1e-9)
            found = np.concatenate([gains(values) for values in micro_batches]).mean()
            mean, weight = 0.5 * mean + 0.5 * found, 0.5 * weight + 0.5
        assert trainer.running_gain.value == pytest.approx(max(0.0, mean / weight), rel=1e-4)
        assert any(values["kl"][0] > 0 for values in seen)

    def test_the_batch_s_is_the_mean_of_its_own_gains(self, votes, kto):
        trainer = DiffusionKTOTrainer(build_tiny_pipeline(), kto(kl_estimate="batch"), votes)
        seen = recorded(trainer)
        trainer.train()
        for values in seen:
            assert values["kl"][0].item() == pytest.approx(max(0.0, gains(values).mean()), rel=1e-4, abs=1e-7)

    def test_it_counts_the_samples_of_all_processes_alike(self, monkeypatch):
        # Another process had five samples, this one three in two micro-batches.
        monkeypatch.setattr(baseline, "gather_object", lambda own: [*own, (1.5, 5)])
        running = RunningGain(decay=0.9)
        assert running.value == 0.0
        for gain in ([0.5, 0.0], [0.4]):
            running.record(torch.tensor(gain))
        running.on_step_end(None, None, None)
        assert running.value == pytest.approx(2.4 / 8)

    def test_a_negative_mean_is_zero_and_its_state_is_kept(self):
        running, again = RunningGain(decay=0.5), RunningGain(decay=0.5)
        running.record(torch.tensor([-1.0]))
        running.on_step_end(None, None, None)
        assert running.value == 0.0
        again.load_state_dict(running.state_dict())
        for each in (running, again):
            each.record(torch.tensor([2.0]))
            each.on_step_end(None, None, None)
            # (0.25 * -1 + 0.5 * 2) / 0.75
            assert each.value == pytest.approx(1.0)

    def test_an_evaluation_does_not_depend_on_its_batches(self, votes, kto):
        cfg = kto(kl_estimate="batch", undesirable_weight=0.0, learning_rate=3e-4)
        trainer = DiffusionKTOTrainer(build_tiny_pipeline(), cfg, votes, votes.select(range(7)))
        trainer.train()
        metrics = []
        for size in (4, 1):
            trainer.args.per_device_eval_batch_size = size
            metrics.append(trainer.evaluate())
        assert metrics[0]["eval_kl"] == metrics[1]["eval_kl"] > 0
        for name in ("loss", "rewards/liked", "rewards/disliked", "rewards/accuracies", "mse/ref_chosen"):
            assert metrics[1][f"eval_{name}"] == pytest.approx(metrics[0][f"eval_{name}"], rel=1e-4), name


class TestShareOfLikedRows:
    def test_it_is_the_weight_of_the_liked_rows(self, votes, kto):
        three_liked = votes.select([0, 1, 2, 3, 4, 5, 6])
        trainer = DiffusionKTOTrainer(build_tiny_pipeline(), kto(positive_ratio=0.8), three_liked)
        weights, liked = trainer.row_weights(), torch.tensor(trainer.train_dataset.scalars["label"] == 1)
        assert weights[liked].tolist() == pytest.approx([0.8 / 3] * 3)
        assert weights[~liked].tolist() == pytest.approx([0.2 / 4] * 4)

    def test_in_buckets_a_resumed_run_is_the_run_that_was_not_stopped(self, kto, tmp_path):
        generator, rows = np.random.default_rng(0), {"prompt": [], "image": [], "label": []}
        for index in range(10):
            shape = (32, 64, 3) if index in (1, 4, 7, 8) else (40, 40, 3)
            rows["prompt"].append(f"a picture {index % 3}")
            rows["image"].append(Images.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)))
            rows["label"].append(index % 2)
        kinds = {"prompt": Value("string"), "image": Image(), "label": Value("int64")}
        data = Dataset.from_dict(rows, Features(kinds))
        size = {"resolution": 32, "aspect_ratio_buckets": True, "per_device_train_batch_size": 2, "max_steps": 8}
        saving = {"save_strategy": "steps", "save_steps": 3}
        whole = DiffusionKTOTrainer(build_tiny_pipeline(), kto(positive_ratio=0.8, **size, **saving), data)
        batches = recorded(whole)
        whole.train()
        again = kto(positive_ratio=0.8, **size, output_dir=str(tmp_path / "again"))
        resumed = DiffusionKTOTrainer(build_tiny_pipeline(), again, data)
        rest = recorded(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-3"))
        assert [each["rows"].tolist() for each in rest] == [each["rows"].tolist() for each in batches[3:]]
        assert [each["kl"].tolist() for each in rest] == [each["kl"].tolist() for each in batches[3:]]
        assert_equal_weights(weights_of(whole.model), weights_of(resumed.model))
        assert whole.running_gain.value == resumed.running_gain.value

    @pytest.mark.newest
    def test_other_orders_of_rows_are_refused(self, votes, kto):
        cfg = kto(positive_ratio=0.8)
        cfg.train_sampling_strategy = "sequential"
        with pytest.raises(ValueError, match="'sequential': positive_ratio draws rows with replacement.*positive_rat"):
            DiffusionKTOTrainer(build_tiny_pipeline(), cfg, votes)


class TestReference:
    def test_precomputed_errors_are_those_of_the_live_reference(self, votes, kto):
        pipeline = build_tiny_pipeline()
        start = copy.deepcopy(pipeline.unet)
        cfg = kto(reference="precomputed", reference_draws=2, max_steps=2)
        trainer = DiffusionKTOTrainer(pipeline, cfg, votes, votes.select(range(3)))
        trainer.train()
        batch = next(iter(trainer._batches_in_order(trainer.train_dataset, 4)))
        mode = trainer.modes.training(batch.rows, 5)
        values = trainer.compute_losses(trainer.model, batch, mode)
        noisy = corrupt(batch, trainer.reference.at_stored_draws(batch, mode), trainer.noise_process)
        with torch.no_grad():
            live = trainer.denoise.error(trainer.denoise(start, noisy), noisy)
        stored = torch.where(batch.scalars["label"] == 1, values["mse/ref_chosen"], values["mse/ref_rejected"])
        torch.testing.assert_close(stored, live, rtol=1e-5, atol=1e-6)
        assert trainer.reference.is_precomputed and trainer.evaluate()["eval_loss"] > 0

    def test_memory_is_estimated_with_the_baseline_of_a_batch(self, kto):
        estimate = estimate_memory(build_tiny_pipeline(), kto(kl_estimate="batch"))
        assert estimate.reference == estimate.weights > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"utility": "kto"}, "utility='kto' is none of"),
        ({"desirable_weight": -1.0}, "desirable_weight=-1.0: it must be at least 0"),
        ({"undesirable_weight": float("inf")}, "undesirable_weight=inf: it must be a finite number"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "are both 0"),
        ({"beta": 0.0}, "beta=0.0: it must be positive"),
        ({"kl_decay": 1.0}, r"kl_decay=1.0 is outside \[0, 1\)"),
        ({"positive_ratio": 1.0}, r"positive_ratio=1.0 is outside \(0, 1\)"),
    ],
)
def test_options_outside_their_range_are_named(options, message, kto):
    with pytest.raises(ValueError, match=message):
        kto(**options)


@pytest.mark.slow
def test_two_processes_have_one_baseline_and_the_rows_of_one(votes, tmp_path):
    votes.save_to_disk(tmp_path / "votes")
    script = str(Path(__file__).parents[1] / "helpers" / "kto_run.py")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    seen = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launch if processes > 1 else []), script, str(folder), str(tmp_path / "votes")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        seen[processes] = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    (one,), (first, second) = seen[1], seen[2]
    assert [a + b for a, b in zip(first["rows"], second["rows"], strict=True)] == one["rows"]
    for kind in ("running", "batch"):
        # By both processes' gains, which differ.
        assert first[kind]["kl"] == second[kind]["kl"] and first[kind]["gains"] != second[kind]["gains"]
        assert first[kind]["weights"] == second[kind]["weights"]
    means = np.concatenate([first["batch"]["gains"], second["batch"]["gains"]], axis=1).mean(axis=1)
    assert first["batch"]["kl"] == pytest.approx(np.maximum(means, 0).tolist(), rel=1e-4, abs=1e-7)


def test_votes_that_were_encoded_from_pairs_with_other_options_are_refused(kto, pairs):
    noisy, plain = kto(label_noise=0.5), kto()
    encoded = encode_dataset(build_tiny_pipeline(), pairs.select(range(4)), noisy)
    with pytest.raises(ValueError, match=r"label_noise: made with 0\.5"):
        DiffusionKTOTrainer(build_tiny_pipeline(), plain, encoded)
    DiffusionKTOTrainer(build_tiny_pipeline(), noisy, encoded)
    # Options at their defaults say nothing, so that another method may take the same rows.
    encoded = encode_dataset(build_tiny_pipeline(), pairs.select(range(4)), plain)
    where = {name: getattr(plain, name) for name in ("output_dir", "dataset_cache_dir", "max_steps", "report_to")}
    DiffusionSFTTrainer(build_tiny_pipeline(), DiffusionSFTConfig(**where), encoded)

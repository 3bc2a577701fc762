"""Training in aspect-ratio buckets: what reaches the model, the order of batches, resuming, references, evaluation."""

import functools
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import tiny
from helpers.bucket_run import everything, options
from helpers.encoding import encoder_of
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, image_pairs, png, weights_of
from helpers.recorder import Recorder
from PIL import Image

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    SelfNPOConfig,
    SelfNPOTrainer,
)
from trl_diffusion_pref.data import EncodingOptions
from trl_diffusion_pref.data.buckets import BucketOptions, bucket_sizes
from trl_diffusion_pref.diffusion.randomness import TRAINING, generator_for
from trl_diffusion_pref.families import all_families, family_for
from trl_diffusion_pref.training import row_cache
from trl_diffusion_pref.training.held_reference import HeldReference


TRAINERS = {"mapo": (MaPOTrainer, MaPOConfig), "dpo": (DiffusionDPOTrainer, DiffusionDPOConfig)}


def noise(width: int, height: int, seed: int) -> dict:
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return png(Image.fromarray(pixels))


def pairs_of(*sizes: tuple[tuple[int, int], tuple[int, int]]) -> Dataset:
    """One pair for each two widths and heights."""
    return image_pairs(
        [(f"a picture {n % 3}", noise(*one, 2 * n), noise(*other, 2 * n + 1)) for n, (one, other) in enumerate(sizes)]
    )


# At 32 pixels: widths and heights of thirteen pairs, in five buckets of 4, 3, 2, 1 and 3 rows.
WIDE, TALL, SQUARE, LONG, NEARLY = (64, 32), (30, 45), (40, 40), (96, 30), (35, 40)
SHAPES = [WIDE, TALL, SQUARE, WIDE, LONG, TALL, NEARLY, WIDE, SQUARE, NEARLY, TALL, WIDE, NEARLY]
ROWS = Counter({WIDE: 4, TALL: 3, NEARLY: 3, SQUARE: 2, LONG: 1})


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    return pairs_of(*((shape, shape) for shape in SHAPES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Latents and prompts are encoded once per pipeline."""
    return tmp_path_factory.mktemp("buckets")


@pytest.fixture
def run(folder, tmp_path):
    """Makes a trainer and the list of its batches: rows, and shapes of the latents."""

    def make(kind: str, pipeline, train_dataset, eval_dataset=None, **more) -> tuple[Any, list]:
        trainer_class, config_class = TRAINERS[kind]
        own = options(folder, "output", output_dir=str(tmp_path / "output"), **more)
        trainer = trainer_class(pipeline, config_class(**own), train_dataset, eval_dataset)
        batches: list = []
        compute = trainer.compute_losses

        def compute_losses(model, batch, mode):
            values = compute(model, batch, mode)
            if mode.training:
                batches.append((batch.rows.tolist(), tuple(batch.posterior.mean.shape[2:]), mode.keys, values))
            return values

        trainer.compute_losses = compute_losses
        return trainer, batches

    return make


class TestFamilies:
    def test_buckets_are_the_default_where_models_were_trained_on_shapes(self):
        default = {family.pipeline_class: family.aspect_ratio_buckets for family in all_families()}
        assert default.pop("StableDiffusionPipeline") is False
        assert default.pop("StableDiffusionInstructPix2PixPipeline") is False
        inpainting = ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline", "FluxFillPipeline")
        assert not any(default.pop(name) for name in inpainting)
        on = {name for name, value in default.items() if value}
        assert on == {
            "StableDiffusionXLPipeline",
            "KolorsPipeline",
            "StableDiffusion3Pipeline",
            "FluxPipeline",
            "Flux2Pipeline",
            "Flux2KleinPipeline",
            "FluxKontextPipeline",
            "PixArtSigmaPipeline",
            "SanaPipeline",
            "QwenImagePipeline",
            "QwenImageEditPipeline",
            "QwenImageEditPlusPipeline",
            "ChromaPipeline",
            "AuraFlowPipeline",
            "Lumina2Pipeline",
            "ZImagePipeline",
            "CogView4Pipeline",
            "HiDreamImagePipeline",
        }
        # The others make videos and audio.
        others = [family for family in all_families() if family.pipeline_class in set(default) - on]
        assert others and all(family.modality != "image" for family in others)

    @pytest.mark.parametrize("name", tiny.marked(tiny.IMAGE_CASES))
    def test_every_bucket_can_be_encoded_and_denoised(self, name):
        pipeline = tiny.build(name)
        family = family_for(pipeline)
        size = max(32, 8 * family.size_step(pipeline))
        encoder = encoder_of(pipeline, family, EncodingOptions(size, buckets=BucketOptions(True)))
        sizes, shapes = encoder.samples.sizes, encoder.latent_shapes()
        assert (size, size) in sizes and len(sizes) > 4
        for side in {side for both in sizes for side in both}:
            family.check_side(pipeline, side)
        for index in {0, len(sizes) // 4, len(sizes) - 1}:
            height, width = sizes[index]
            mean, _ = family.encode_samples(pipeline, torch.zeros(1, 3, height, width))
            assert tuple(mean.shape[1:]) == shapes[index]
            own = family.image_conditioning(pipeline, (height, width), (0, 0), (height, width))
            conditioning = family.encode_prompts(pipeline, ["a cat"]) | {n: t[None] for n, t in own.items()}
            conditioning |= dict.fromkeys(family.condition_images, mean)
            if family.mask_column:
                conditioning[family.mask_column] = torch.ones(1, family.mask_channels(pipeline), *mean.shape[2:])
            with torch.no_grad():
                prediction = family.predict(family.denoiser(pipeline), mean, torch.tensor([500.0]), conditioning)
            assert prediction.shape == mean.shape and prediction.isfinite().all()

    def test_sd_3_has_no_bucket_that_is_larger_than_its_table_of_positions(self):
        pipeline = tiny.build("stable_diffusion_3")
        family = family_for(pipeline)
        encoder = encoder_of(pipeline, family, EncodingOptions(48, buckets=BucketOptions(True)))
        # 16 positions of 4 pixels.
        assert max(max(size) for size in encoder.samples.sizes) == 64 < max(map(max, bucket_sizes(48, 4)))
        with pytest.raises(ValueError, match="resolution=68: the transformer.*64 pixels a side"):
            encoder_of(pipeline, family, EncodingOptions(68))


class TestConditioning:
    def test_sdxl_is_given_each_image_s_size_and_crop_and_its_bucket_s_size(self, run):
        pipeline = tiny.build("stable_diffusion_xl")
        # The second pair's images have two shapes, 2:1 and 1:1, between which 1.41:1 stands.
        rows = pairs_of((WIDE, WIDE), ((80, 40), (50, 50)), ((300, 40), (300, 40)))
        trainer, batches = run("mapo", pipeline, rows, num_train_epochs=1)
        recorder = Recorder(trainer.model)
        trainer.train()
        given = {}
        for (numbers, shape, _, _), call in zip(batches, recorder.calls, strict=True):
            time_ids = call["added_cond_kwargs.time_ids"].tolist()
            assert tuple(call["sample"].shape[1:]) == shape
            for index, row in enumerate(numbers):
                given[row] = [time_ids[index], time_ids[len(numbers) + index]]
        # Height and width as shown, top and left of the crop, height and width of what is encoded.
        wide = [32, 64, 0, 0, 22, 44]
        # 80x40 is scaled to 52x26 and 50x50 to 36x36.
        both = [[40, 80, 0, 8, 26, 36], [50, 50, 5, 0, 26, 36]]
        # 7.5:1 is scaled to 120x16.
        long = [40, 300, 0, 28, 16, 64]
        assert given == {0: [wide, wide], 1: both, 2: [long, long]}

    def test_the_pipeline_at_a_bucket_s_size_is_conditioned_as_in_training(self, run):
        pipeline = tiny.build("stable_diffusion_xl")
        # Those buckets that the pipeline takes, which wants multiples of 8 whatever its VAE is.
        sizes = [size for size in bucket_sizes(32, 2) if size[0] % 8 == size[1] % 8 == 0]
        images = [((width, height), (width, height)) for height, width in sizes]
        trainer, batches = run("mapo", pipeline, pairs_of(*images), num_train_epochs=1)
        recorder = Recorder(pipeline.unet)
        trainer.train()
        trained = {
            tuple(call["sample"].shape[2:]): call["added_cond_kwargs.time_ids"][0].tolist() for call in recorder.calls
        }
        recorder.calls.clear()
        for height, width in sizes:
            pipeline("a cat", height=height, width=width, num_inference_steps=1, output_type="latent")
        sampled = {
            tuple(call["sample"].shape[2:]): call["added_cond_kwargs.time_ids"][0].tolist() for call in recorder.calls
        }
        assert len(sampled) == len(sizes) > 3 and trained == sampled


class TestTimes:
    @pytest.mark.parametrize("kind", ["exponential", "linear"])
    @pytest.mark.parametrize("name", ["flux_dev", "stable_diffusion_3", "qwen_image", "chroma"])
    def test_the_shift_is_the_one_that_the_sampler_has_at_the_bucket_s_size(self, name, kind, run, monkeypatch):
        """Steep, so that buckets of nearly equal areas differ."""
        pipeline = tiny.build(name)
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=50, max_image_seq_len=64, time_shift_type=kind, max_shift=3.0
        )
        trainer, batches = run("mapo", pipeline, pairs_of(*((size, size) for size in SHAPES)), max_steps=8)
        recorder = Recorder(trainer.model)
        trainer.train()
        calls, mus = list(recorder.calls), {}
        set_timesteps = FlowMatchEulerDiscreteScheduler.set_timesteps

        # The pipelines look for the arguments by name.
        @functools.wraps(set_timesteps)
        def recorded(*args, **kwargs):
            given.append(kwargs["mu"])
            return set_timesteps(*args, **kwargs)

        monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "set_timesteps", recorded)
        for (rows, (_, high, wide), keys, _), call in zip(batches, calls, strict=True):
            if (high, wide) not in mus:
                given: list[float] = []
                size = {"height": 2 * high, "width": 2 * wide}
                pipeline("a cat", **size, num_inference_steps=2, output_type="latent", **tiny.CASES[name].call)
                (mus[high, wide],) = given
            drawn = torch.cat([torch.randn(1, generator=generator_for(*key)) for key in keys]).sigmoid()
            expected = pipeline.scheduler.time_shift(mus[high, wide], 1.0, drawn)
            # SD 3 is given the time in thousandths.
            found = call["timestep"] / (1000 if name == "stable_diffusion_3" else 1)
            torch.testing.assert_close(found, expected.repeat(2), rtol=1e-5, atol=1e-6)
            assert [key[:2] for key in keys] == [(trainer.args.seed, TRAINING)] * len(rows)
        assert len(mus) > 2 and len({round(mu, 3) for mu in mus.values()}) > 1

    def test_the_grid_of_a_bucket_is_the_scheduler_s(self, run):
        pipeline = tiny.build("qwen_image")
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=50, max_image_seq_len=64, shift_terminal=0.02
        )
        trainer, _ = run("mapo", pipeline, pairs_of((WIDE, WIDE), (SQUARE, SQUARE)), max_steps=1)
        for shape, tokens in (((4, 16, 16), 64), ((4, 10, 24), 60)):
            mu = 0.5 + (tokens - 50) / 14 * (1.15 - 0.5)
            pipeline.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 10, 10), mu=mu)
            grid = trainer.noise_process.sized(shape).solver_times(10)
            torch.testing.assert_close(grid.flip(0), pipeline.scheduler.sigmas, rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="no time shift for latents of shape"):
            trainer.noise_process.sized((4, 3, 3))


class TestRuns:
    @pytest.mark.parametrize("kind", TRAINERS)
    @pytest.mark.parametrize(
        "name",
        ["stable_diffusion_xl", "stable_diffusion_3", "flux_dev"]
        + [
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "pixart_sigma",
                "sana",
                "qwen_image",
                "chroma",
                "auraflow",
                "lumina2",
                "z_image",
                "cogview4",
                "hidream",
                *(["kolors"] if "kolors" in tiny.CASES else []),
            )
        ],
    )
    def test_models_train_by_default_on_every_shape_of_the_data(self, name, kind, run, pairs):
        pipeline = tiny.build(name)
        size = max(32, 8 * family_for(pipeline).size_step(pipeline))
        sizes = {"aspect_ratio_buckets": None, "num_train_epochs": 1, "resolution": size}
        trainer, batches = run(kind, pipeline, pairs, **sizes, learning_rate=1e-4)
        before = weights_of(trainer.model)
        trainer.train()
        assert sorted(row for rows, *_ in batches for row in rows) == list(range(len(SHAPES)))
        assert len({shape for _, shape, *_ in batches}) > 3
        assert all(values["loss"].isfinite().all() for *_, values in batches)
        moved = [not torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer.model).items()]
        assert sum(moved) > 0.8 * len(moved)

    def test_an_epoch_has_every_row_once_and_as_many_steps_as_batches(self, run, pairs):
        trainer, batches = run("mapo", build_tiny_pipeline(), pairs, num_train_epochs=3, gradient_accumulation_steps=3)
        # Of two rows each: 2 + 2 + 2 + 1 + 1.
        count = sum(-(-rows // 2) for rows in ROWS.values())
        assert len(trainer.get_train_dataloader()) == count == 8
        trainer.train()
        assert len(batches) == 3 * count and trainer.state.global_step == 3 * 3 and trainer.state.epoch == 3
        epochs = [[rows for rows, *_ in batches[start : start + count]] for start in range(0, 3 * count, count)]
        assert all(sorted(sum(epoch, [])) == list(range(len(SHAPES))) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert all(len({SHAPES[row] for row in rows}) == 1 for epoch in epochs for rows in epoch)

    def test_the_order_is_a_function_of_the_data_seed(self, run, pairs):
        orders = []
        for seeds in ({"seed": 1, "data_seed": 5}, {"seed": 2, "data_seed": 5}, {"seed": 1, "data_seed": 6}):
            trainer, _ = run("mapo", build_tiny_pipeline(), pairs, max_steps=1, **seeds)
            orders.append([batch["row"].tolist() for batch in trainer.get_train_dataloader()])
        assert orders[0] == orders[1] != orders[2]

    @pytest.mark.parametrize(
        "more",
        [
            pytest.param({}, marks=pytest.mark.slow),
            # In the middle of the second epoch, whose last step has fewer batches.
            {"gradient_accumulation_steps": 3, "max_steps": 8, "save_steps": 4},
            {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "prompt_dropout": 0.3},
        ],
        ids=["plain", "accumulated", "workers"],
    )
    def test_six_steps_are_three_and_three_resumed_bit_for_bit(self, more, run, pairs, tmp_path):
        common = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **more}
        whole, batches = run("mapo", build_tiny_pipeline(), pairs, **common)
        whole.train()
        resumed, rest = run("mapo", build_tiny_pipeline(), pairs, **common)
        resumed.train(resume_from_checkpoint=str(tmp_path / "output" / f"checkpoint-{common['save_steps']}"))
        # Three batches a step, but two in the last one of an epoch of eight.
        before = 11 if common.get("gradient_accumulation_steps") else 3
        assert [rows for rows, *_ in rest] == [rows for rows, *_ in batches][before:]
        assert [keys for _, _, keys, _ in rest] == [keys for _, _, keys, _ in batches][before:]
        assert_equal_weights(weights_of(whole.model), weights_of(resumed.model))

    def test_dropping_smaller_batches_names_what_is_never_trained_on(self, run, pairs, caplog):
        dropping = {"dataloader_drop_last": True, "eval_draws": 0}
        trainer, batches = run("mapo", build_tiny_pipeline(), pairs, num_train_epochs=1, **dropping)
        with caplog.at_level(logging.WARNING, "trl_diffusion_pref.training"):
            trainer.train()
        assert "dataloader_drop_last=True leaves out 1 of 13 rows in every epoch" in caplog.text
        assert [len(rows) for rows, *_ in batches] == [2] * 5
        held_out, _ = run("mapo", build_tiny_pipeline(), pairs, pairs, max_steps=1, **dropping)
        rows = [row for batch in held_out.get_eval_dataloader() for row in batch["row"].tolist()]
        assert sorted(rows) == list(range(len(SHAPES)))


class TestReferencesAndEvaluation:
    def test_precomputed_errors_are_those_of_a_live_reference(self, run, pairs):
        common = {"max_steps": 1, "beta": 50.0}
        live, _ = run("dpo", build_tiny_pipeline(), pairs, **common)
        fixed, _ = run("dpo", build_tiny_pipeline(), pairs, pairs.select(range(5)), reference="precomputed", **common)
        for trainer in (live, fixed):  # the same policy, away from the reference
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        seen = []
        for collated in fixed.get_train_dataloader():
            inputs = fixed._prepare_inputs(collated)
            mode = fixed.modes.training(inputs.rows, 0)
            stored = fixed.reference.at_stored_draws(inputs, mode)
            ours = fixed.compute_losses(fixed.model, inputs, mode)
            theirs = live.compute_losses(live.model, inputs, stored)
            torch.testing.assert_close(ours["mse/ref_chosen"], theirs["mse/ref_chosen"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-4, atol=1e-5)
            seen += inputs.rows.tolist()
        assert sorted(seen) == list(range(len(SHAPES)))
        computed = live.evaluate(pairs.select(range(5)))["eval_loss"]
        assert fixed.evaluate()["eval_loss"] == pytest.approx(computed, rel=1e-4)

    def test_an_interrupted_computation_of_errors_goes_on_with_the_rest(self, run, pairs, tmp_path, monkeypatch):
        monkeypatch.setattr(row_cache, "_SAVE_EVERY", 0.0)
        own = {"max_steps": 1, "reference": "precomputed", "eval_draws": 0}
        wanted, _ = run("dpo", build_tiny_pipeline(), pairs, **own, reference_errors_dir=str(tmp_path / "whole"))
        calls: list[list[int]] = []
        compute = HeldReference._of_batch

        def stopping(self, batch, mode):
            calls.append(batch.rows.tolist())
            if len(calls) == limit:
                raise KeyboardInterrupt
            return compute(self, batch, mode)

        monkeypatch.setattr(HeldReference, "_of_batch", stopping)
        draws, limit = wanted.args.reference_draws, 4 * wanted.args.reference_draws
        for _ in range(2):
            try:
                trainer, _ = run(
                    "dpo", build_tiny_pipeline(), pairs, **own, reference_errors_dir=str(tmp_path / "stopped")
                )
            except KeyboardInterrupt:
                limit = None
        # Three batches were whole; a batch is called once for each draw.
        batches = [calls[index] for index in range(0, len(calls), draws)]
        assert len(calls) > 4 * draws and not set(sum(batches[:3], [])) & set(sum(batches[4:], []))
        tables = [each.reference.precomputed.tables["train"] for each in (trainer, wanted)]
        torch.testing.assert_close(*tables)

    def test_evaluation_is_a_mean_over_rows_whatever_the_batch_size(self, run, pairs):
        results = []
        for size in (1, 3):
            trainer, _ = run(
                "dpo",
                build_tiny_pipeline(),
                pairs,
                pairs.select(range(7)),
                max_steps=1,
                per_device_eval_batch_size=size,
            )
            results.append(trainer.evaluate())
        for name in ("eval_mse/chosen", "eval_likelihood_accuracy"):
            assert results[0][name] == pytest.approx(results[1][name], rel=1e-5)
        # The starting weights gain nothing over themselves.
        assert results[1]["eval_preference_accuracy"] == 0.5


class TestOptions:
    def test_self_npo_keeps_samples_and_has_no_buckets(self, pairs, folder, tmp_path):
        own = options(folder, "output", output_dir=str(tmp_path), max_steps=1)
        images = pairs.remove_columns("rejected").rename_column("chosen", "image")
        with pytest.raises(ValueError, match="aspect_ratio_buckets: this method keeps samples"):
            SelfNPOTrainer(tiny.build("stable_diffusion_xl"), SelfNPOConfig(**own, start="data"), images)
        own["aspect_ratio_buckets"] = None
        trainer = SelfNPOTrainer(tiny.build("stable_diffusion_xl"), SelfNPOConfig(**own, start="data"), images)
        assert trainer.encoder.samples.sizes == []

    def test_streams_have_none_and_say_so(self, run, pairs, caplog):
        stream = pairs.to_iterable_dataset()
        with pytest.raises(ValueError, match="aspect_ratio_buckets=True: train_dataset is streamed"):
            run("mapo", tiny.build("stable_diffusion_xl"), stream, max_steps=1)
        for unset, expected in ((None, True), (False, False)):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "trl_diffusion_pref"):
                trainer, _ = run(
                    "mapo", tiny.build("stable_diffusion_xl"), stream, max_steps=1, aspect_ratio_buckets=unset
                )
            assert ("trained on images of several shapes, but a data set is streamed" in caplog.text) is expected
            assert trainer.encoder.samples.sizes == []

    @pytest.mark.parametrize(
        ("name", "more", "message"),
        [
            ("stable_diffusion_xl", {"resolution": "24x32"}, "takes the side of a square as resolution, not 24x32"),
            ("wan", {"resolution": 16, "num_frames": 5}, "aspect_ratio_buckets are for images"),
            (
                "stable_diffusion",
                {"aspect_ratio_buckets": None, "on_aspect_difference": "skip"},
                "on_aspect_difference='skip' does nothing without buckets",
            ),
            ("stable_diffusion", {"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches"),
            ("stable_diffusion", {"train_sampling_strategy": "sequential"}, "train_sampling_strategy='sequential'"),
        ],
    )
    def test_options_that_do_not_go_with_buckets_raise(self, name, more, message, run, pairs):
        if "train_sampling_strategy" in more and "train_sampling_strategy" not in MaPOConfig.__dataclass_fields__:
            pytest.skip("an option of newer versions of transformers")
        with pytest.raises(ValueError, match=message):
            run("mapo", tiny.build(name), pairs, max_steps=1, **more)

    def test_a_height_and_a_width_switch_off_what_is_only_the_default(self, run, pairs):
        more = {"resolution": "24x32", "aspect_ratio_buckets": None}
        trainer, _ = run("mapo", tiny.build("stable_diffusion_xl"), pairs, max_steps=1, **more)
        assert trainer.encoder.samples.sizes == [] and trainer.encoder.latent_shape == (4, 12, 16)


@pytest.fixture(scope="module")
def processes(tmp_path_factory, pairs):
    """What each process saw, in a run with two gloo processes and one with a single one."""
    folder = tmp_path_factory.mktemp("processes")
    pairs.save_to_disk(folder / "pairs")
    helpers = Path(__file__).parents[1]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(helpers)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launch, str(helpers / "helpers" / "bucket_run.py"), str(folder), str(folder / "pairs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return {2: two, 1: [everything(tmp_path_factory.mktemp("process"), pairs)]}


@pytest.mark.slow
class TestProcesses:
    def test_each_row_is_seen_once_an_epoch_by_one_process(self, processes):
        first, second = (rank["whole"]["batches"] for rank in processes[2])
        # Eight batches an epoch, which two processes share evenly.
        assert len(first) == len(second) == 8
        for epoch in (slice(0, 4), slice(4, 8)):
            assert sorted(sum(first[epoch] + second[epoch], [])) == list(range(len(SHAPES)))
        # Unequal batches at the same step are what the loop must be able to gather.
        assert any(len(one) != len(other) for one, other in zip(first, second, strict=True))

    def test_processes_end_with_equal_weights_and_log_the_same(self, processes):
        first, second = (rank["whole"] for rank in processes[2])
        for name in ("weights", "losses", "margins", "steps"):
            assert first[name] == second[name]
        assert len(first["losses"]) == first["steps"] == 8

    def test_a_run_resumed_in_the_middle_of_an_epoch_sees_the_rest(self, processes):
        for rank, each_step in ((processes[2][0], 1), (processes[2][1], 1), (processes[1][0], 2)):
            assert rank["resumed"]["batches"] == rank["whole"]["batches"][3 * each_step :]
            assert rank["resumed"]["weights"] == rank["whole"]["weights"]

    def test_two_processes_train_as_one_with_two_micro_batches(self, processes):
        (one,), (first, second) = processes[1], processes[2]
        both = [
            rows for step in zip(first["whole"]["batches"], second["whole"]["batches"], strict=True) for rows in step
        ]
        assert both == one["whole"]["batches"]
        assert first["whole"]["weights"] == pytest.approx(one["whole"]["weights"], rel=1e-4, abs=1e-3)

    def test_dropping_the_last_gives_all_processes_whole_batches(self, processes):
        batches = [rank["dropped"]["batches"] for rank in processes[2]]
        assert [[len(rows) for rows in own] for own in batches] == [[2, 2]] * 2

    def test_reference_errors_and_evaluation_equal_those_of_one_process(self, processes):
        for rank in processes[2]:
            assert rank["errors"] == pytest.approx(processes[1][0]["errors"], rel=1e-5)
            assert rank["evaluation"] == pytest.approx(processes[1][0]["evaluation"], rel=1e-5)
        assert processes[1][0]["evaluation"]["preference_accuracy"] == 0.5

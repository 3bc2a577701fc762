import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler, StableDiffusionPipeline
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_diffusion_pref import SelfNPOConfig, SelfNPOTrainer
from trl_diffusion_pref.guidance import negative_guidance
from trl_diffusion_pref.shapes import prompts
from trl_diffusion_pref.training.references import AdapterOff, FrozenAdapter, FrozenModel


@pytest.fixture
def npo(tmp_path):
    """Makes configs for short runs: a grid of 10 steps, 3 of them at once."""

    def make(**options) -> SelfNPOConfig:
        defaults = {
            "output_dir": str(tmp_path / "output"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "solver_steps": 10,
            "truncated_steps": 3,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "activation_checkpointing": False,
            "dataset_cache_dir": str(tmp_path / "cache"),
        }
        return SelfNPOConfig(**{**defaults, **options})

    return make


@pytest.fixture(scope="module")
def asked() -> Dataset:
    return Dataset.from_dict({"prompt": prompts()[:16]})


@pytest.fixture(scope="module")
def pictures(pairs) -> Dataset:
    return pairs.rename_column("chosen", "image").remove_columns("rejected")


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian", **options})


class EachStep(TrainerCallback):
    """Calls a function at the end of every step."""

    def __init__(self, function) -> None:
        self.function = function

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.function(state.global_step)


def sampled_by_diffusers(pipeline, prompt: str, noise: torch.Tensor, steps: int, scale: float) -> list[torch.Tensor]:
    """Latents at each place of diffusers' DDIM trajectory, from pure noise on."""
    scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False
    )
    scheduler.set_timesteps(steps)
    embeds, empty = (pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in (prompt, ""))
    x, places = noise[None], [noise[None]]
    with torch.no_grad():
        for t in scheduler.timesteps:
            given, not_given = (pipeline.unet(x, t, encoder_hidden_states=e).sample for e in (embeds, empty))
            x = scheduler.step(not_given + scale * (given - not_given), t, x).prev_sample
            places.append(x)
    return places


class TestTrajectories:
    @pytest.mark.parametrize("prediction_type", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("scale", [*(pytest.param(s, marks=pytest.mark.slow) for s in (0.0, 1.0)), -4.0])
    def test_the_pool_s_latents_are_those_of_diffusers_own_sampler(self, prediction_type, scale, npo, asked):
        cfg = npo(teacher="frozen", guidance_scale=scale, max_steps=4)
        trainer = SelfNPOTrainer(build_tiny_pipeline(prediction_type), cfg, asked.select([0]).repeat(16))
        noises, seen = {}, []
        original = trainer._draw

        def draw(keys, device):
            draws = original(keys, device)
            for key, noise in zip(keys, draws.start_noise, strict=True):
                if not trainer.pool.unfinished(key[-1]):
                    noises[key[-1]] = noise
            return draws

        def look(step):
            for slot in range(4):
                x, position, _ = trainer.pool.get(slot)
                seen.append((noises[slot], int(position), x.clone()))

        trainer._draw = draw
        trainer.add_callback(EachStep(look))
        trainer.train()
        assert len({position for _, position, _ in seen}) > 4
        frozen = build_tiny_pipeline(prediction_type)
        for noise, position, x in seen:
            # The very end is the scheduler's last alpha, that of t = 0, as ours.
            expected = sampled_by_diffusers(frozen, asked[0]["prompt"], noise, 10, scale)[10 - position]
            torch.testing.assert_close(x[None], expected, rtol=1e-3, atol=1e-3)

    def test_ends_cover_the_whole_grid_and_trajectories_begin_anew(self, npo, asked):
        trainer = SelfNPOTrainer(build_tiny_pipeline(), npo(max_steps=30), asked)
        ends = {slot: [] for slot in range(4)}

        def look(step):
            for slot, places in ends.items():
                places.append(int(trainer.pool.get(slot)[1]))

        trainer.add_callback(EachStep(look))
        trainer.train()
        assert {place for places in ends.values() for place in places} == set(range(10))
        for places in ends.values():
            for before, after in zip(places, places[1:], strict=False):
                assert after in (7, 8, 9) if before == 0 else after == max(before - 3, 0)
        begun = [entry["trajectories/begun"] for entry in trainer.state.log_history if "loss" in entry]
        for step in range(1, 30):
            assert begun[step] == pytest.approx(sum(places[step - 1] == 0 for places in ends.values()) / 4)

    def test_a_trajectory_keeps_the_prompt_that_it_began_with(self, npo, asked):
        trainer = SelfNPOTrainer(build_tiny_pipeline(), npo(max_steps=6), asked)
        kept = []

        def look(step):
            kept.append([(int(trainer.pool.get(s)[1]), trainer.pool.get(s)[2]["prompt_embeds"]) for s in range(4)])

        trainer.add_callback(EachStep(look))
        trainer.train()
        changed = 0
        for before, after in zip(kept, kept[1:], strict=False):
            for (place, embeds), (_, embeds_after) in zip(before, after, strict=True):
                if place > 0:
                    assert torch.equal(embeds, embeds_after)
                else:
                    changed += not torch.equal(embeds, embeds_after)
        assert changed > 0

    @pytest.mark.parametrize(("scale", "per_evaluation"), [(0.0, 1), (1.0, 1), (-4.0, 2)])
    def test_a_step_costs_k_plus_one_evaluations_of_the_teacher(self, scale, per_evaluation, npo, pictures):
        cfg = npo(start="data", guidance_scale=scale, max_steps=1, learning_rate=0.0, truncated_steps=3)
        trainer = SelfNPOTrainer(build_tiny_pipeline(), cfg, pictures)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        seen = {"teacher": 0, "student": 0}
        trainer.teacher.module.register_forward_pre_hook(
            lambda module, args: seen.__setitem__("teacher", seen["teacher"] + len(args[0]))
        )
        trainer.model.register_forward_pre_hook(
            lambda module, args: seen.__setitem__("student", seen["student"] + len(args[0]))
        )
        mode = trainer.modes.training(inputs.rows, 0)
        draws = trainer._draw(mode.keys, torch.device("cpu"))
        taken = (1 + (draws.start * 10).long()).clamp(max=3)
        trainer.compute_losses(trainer.model.train(), inputs, mode)
        assert seen == {"teacher": int(taken.sum() + 4) * per_evaluation, "student": 4}


class TestOneStep:
    @pytest.mark.parametrize("preset", ["released_code", "paper"])
    def test_the_loss_equals_one_written_out(self, preset, npo, pictures, asked):
        cfg = npo(preset=preset, latent_sampling="mean", learning_rate=1e-3)
        data = pictures if preset == "released_code" else asked
        trainer = SelfNPOTrainer(build_tiny_pipeline(), cfg, data)
        with torch.no_grad():  # teacher and student differ
            for parameter in trainer.model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        mode = trainer.modes.training(inputs.rows, 0)
        values = trainer.compute_losses(trainer.model.train(), inputs, mode)
        base, draws = build_tiny_pipeline(), trainer._draw(mode.keys, torch.device("cpu"))
        abar = base.scheduler.alphas_cumprod.double()
        times = [0, 99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
        for row in range(4):
            embeds = inputs.prompts["prompt_embeds"][row : row + 1]
            if preset == "released_code":
                embeds_teacher = base.encode_prompt("", "cpu", 1, False)[0]
                place = 1 + int(draws.start[row] * 10)
                a = abar[times[place]]
                x = a.sqrt() * inputs.latents.mean[0][row].double() + (1 - a).sqrt() * draws.start_noise[row].double()
                taken = min(3, place)
            else:
                embeds_teacher, place = embeds, 10
                x = draws.start_noise[row].double()
                taken = 1 + int(draws.first_advance[row] * 10)

            def clean(x, t, unet, embeds):
                noise = unet(x[None].float(), torch.tensor([t]), encoder_hidden_states=embeds).sample[0].double()
                return (x - (1 - abar[t]).sqrt() * noise) / abar[t].sqrt(), noise

            with torch.no_grad():
                for _ in range(taken):
                    x0, noise = clean(x, times[place], base.unet, embeds_teacher)
                    place -= 1
                    x = abar[times[place]].sqrt() * x0 + (1 - abar[times[place]]).sqrt() * noise
                t = times[place]
                target, _ = clean(x, t, base.unet, embeds_teacher)
                s = t + 1 + int(draws.later[row] * (999 - t))
                ratio = (abar[s] / abar[t]).sqrt()
                added = ((1 - abar[s]) - (1 - abar[t]) * ratio**2).sqrt()
                x_s = ratio * x + added * draws.forward_noise[row].double()
                predicted, _ = clean(x_s, s, trainer.pipeline.unet, embeds)
            squared = (predicted - target).square()
            expected = ((squared + 1e-6).sqrt() - 1e-3 if preset == "released_code" else squared).mean()
            assert values["loss"][row].item() == pytest.approx(expected.item(), rel=1e-3)
            assert values["x0_error"][row].item() == pytest.approx(squared.mean().item(), rel=1e-3)

    def test_four_micro_batches_of_one_equal_one_batch_of_four(self, npo, asked):
        runs = []
        for batch, accumulation in ((4, 1), (1, 4)):
            cfg = npo(
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                max_grad_norm=0,
                optim="sgd",
            )
            trainer = SelfNPOTrainer(build_tiny_pipeline(), cfg, asked)
            trainer.train()
            runs.append(weights_of(trainer.model))
            assert len(trainer.pool) == 4
        for name, tensor in runs[0].items():
            torch.testing.assert_close(tensor, runs[1][name], rtol=1e-4, atol=1e-6)

    def test_dropped_prompts_are_the_empty_one_for_teacher_and_student(self, npo, asked):
        trainer = SelfNPOTrainer(
            build_tiny_pipeline(),
            npo(prompt_dropout=0.5, max_steps=1, per_device_train_batch_size=16, cache_dtype="float32"),
            asked,
        )
        trainer.train()
        empty = build_tiny_pipeline().encode_prompt("", "cpu", 1, False)[0][0]
        dropped = [torch.allclose(trainer.pool.get(slot)[2]["prompt_embeds"], empty) for slot in range(16)]
        assert 0 < sum(dropped) < 16


class TestTeacher:
    @pytest.mark.parametrize("peft_config", [None, lora()])
    def test_the_moving_teacher_follows_the_formula(self, peft_config, npo, asked):
        trainer = SelfNPOTrainer(
            build_tiny_pipeline(), npo(ema_decay=0.9, learning_rate=1e-2), asked, peft_config=peft_config
        )
        assert isinstance(trainer.teacher, FrozenAdapter if peft_config else FrozenModel)
        expected = {name: tensor.clone() for name, tensor in trainer.teacher.parameters().items()}

        def follow(step):
            for name, tensor in expected.items():
                own = name.replace(".reference.", ".default.")
                tensor.mul_(0.9).add_(trainer.model.get_parameter(own).data, alpha=0.1)

        trainer.add_callback(EachStep(follow))
        trainer.train()
        start = build_tiny_pipeline().unet.state_dict()
        for name, tensor in trainer.teacher.parameters().items():
            torch.testing.assert_close(tensor.data, expected[name], rtol=1e-5, atol=1e-7)
            assert peft_config or name not in start or not torch.equal(tensor, start[name])

    def test_a_half_precision_base_has_a_float32_moving_teacher(self, npo, asked):
        pipeline = build_tiny_pipeline()
        pipeline.unet.to(torch.bfloat16)
        trainer = SelfNPOTrainer(pipeline, npo(max_steps=1), asked)
        trainer.train()
        assert trainer.teacher.module.dtype == torch.float32

    def test_the_frozen_teacher_is_the_base(self, npo, asked):
        trainer = SelfNPOTrainer(build_tiny_pipeline(), npo(teacher="frozen"), asked)
        trainer.train()
        assert_equal_weights(weights_of(trainer.teacher.module), weights_of(build_tiny_pipeline().unet))
        with_lora = SelfNPOTrainer(build_tiny_pipeline(), npo(teacher="frozen"), asked, peft_config=lora())
        assert isinstance(with_lora.teacher, AdapterOff)


class TestResume:
    @pytest.mark.parametrize(
        ("options", "peft_config"),
        [
            ({}, None),
            ({}, lora(lora_dropout=0.2)),
            pytest.param({"preset": "paper"}, None, marks=pytest.mark.slow),
            pytest.param({"preset": "released_code"}, None, marks=pytest.mark.slow),
        ],
    )
    def test_resuming_equals_never_having_stopped(self, options, peft_config, npo, asked, pictures, tmp_path):
        moving = {} if options.get("preset") == "paper" else {"ema_decay": 0.9}
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **moving, **options}
        data = pictures if options.get("preset") == "released_code" else asked

        def run(folder):
            cfg = npo(output_dir=str(tmp_path / folder), **options)
            return SelfNPOTrainer(build_tiny_pipeline(), cfg, data, peft_config=peft_config)

        whole = run("whole")
        whole.train()
        resumed = run("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
        assert_equal_weights(weights_of(whole.model), weights_of(resumed.model))
        for left, right in zip(whole.teacher.parameters().items(), resumed.teacher.parameters().items(), strict=True):
            assert left[0] == right[0] and torch.equal(left[1], right[1])
        losses = [{e["step"]: e["loss"] for e in t.state.log_history if "loss" in e} for t in (whole, resumed)]
        assert losses[0] == losses[1]

    def test_the_pool_is_in_the_checkpoint(self, npo, asked, tmp_path):
        trainer = SelfNPOTrainer(build_tiny_pipeline(), npo(save_strategy="steps", save_steps=3), asked)
        trainer.train()
        stored = load_file(tmp_path / "output" / "checkpoint-3" / "trajectory_pool-0.safetensors")
        for slot in range(4):
            x, position, conditioning = trainer.pool.get(slot)
            assert torch.equal(stored[f"{slot}/x"], x) and stored[f"{slot}/position"] == position
            assert torch.equal(stored[f"{slot}/conditioning/prompt_embeds"], conditioning["prompt_embeds"])

    def test_pools_of_another_number_of_processes_begin_anew_and_say_so(self, npo, asked, tmp_path, caplog):
        options = {"save_strategy": "steps", "save_steps": 3}
        SelfNPOTrainer(build_tiny_pipeline(), npo(**options), asked).train()
        checkpoint = tmp_path / "output" / "checkpoint-3"
        (checkpoint / "trajectory_pool-1.safetensors").write_bytes(
            (checkpoint / "trajectory_pool-0.safetensors").read_bytes()
        )
        again = SelfNPOTrainer(build_tiny_pipeline(), npo(**{**options, "max_steps": 4}), asked)
        again.train(resume_from_checkpoint=True)
        assert "trajectories of 2 processes and there are 1 now" in caplog.text

    @pytest.mark.parametrize(
        ("first", "then", "message"),
        [
            ({}, {"solver_steps": 25}, "solver_steps was 10 and is 25"),
            ({}, {"resolution": 32}, r"latent shape was \[4, 8, 8\] and is \[4, 16, 16\]"),
            ({"teacher": "frozen"}, {}, "no weights of a moving reference or teacher"),
        ],
    )
    def test_resuming_with_other_options_is_refused(self, first, then, message, npo, asked, tmp_path):
        SelfNPOTrainer(build_tiny_pipeline(), npo(save_strategy="steps", save_steps=3, **first), asked).train()
        again = SelfNPOTrainer(build_tiny_pipeline(), npo(max_steps=4, **then), asked)
        with pytest.raises(ValueError, match=message):
            again.train(resume_from_checkpoint=True)

    def test_training_twice_begins_with_new_trajectories(self, npo, asked):
        # Frozen, since a moving average of equal weights is equal only up to rounding.
        trainer = SelfNPOTrainer(build_tiny_pipeline(), npo(learning_rate=0.0, teacher="frozen"), asked)
        losses = []
        for _ in range(2):
            trainer.train()
            losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert losses[0] == losses[1]


class TestEvaluation:
    def test_it_repeats_and_leaves_the_pool_alone(self, npo, asked):
        trainer = SelfNPOTrainer(build_tiny_pipeline(), npo(max_steps=2), asked, asked.select(range(6)))
        trainer.train()
        before = {slot: trainer.pool.get(slot)[0].clone() for slot in range(4)}
        first, second = trainer.evaluate(), trainer.evaluate()
        assert first["eval_loss"] == second["eval_loss"] > 0
        assert all(torch.equal(trainer.pool.get(slot)[0], x) for slot, x in before.items())
        other = trainer.evaluate(asked.select(range(6)))
        assert other["eval_loss"] == first["eval_loss"]


class TestSaving:
    @pytest.mark.parametrize("peft_config", [None, lora()])
    def test_the_output_is_a_negative_model_that_guidance_takes(self, peft_config, npo, asked, tmp_path):
        trainer = SelfNPOTrainer(build_tiny_pipeline(), npo(learning_rate=1e-2), asked, peft_config=peft_config)
        trainer.train()
        trainer.save_model()
        output = tmp_path / "output"
        record = json.loads((output / "trl_diffusion_pref.json").read_text())
        assert record["negative"] is True and record["trainer"] == "SelfNPOTrainer"
        card = (output / "README.md").read_text()
        for text in ("A negative model", "with negative_guidance(pipeline,", "2505.11777", "- negative-model"):
            assert text in card
        assert "load_lora_weights" not in card

        def draw(pipeline):
            options = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 4.0}
            return pipeline("a red star", generator=torch.Generator().manual_seed(0), **options).images

        images = []
        for negative in (output, trainer.pipeline):
            pipeline = build_tiny_pipeline()
            with negative_guidance(pipeline, negative):
                images.append(draw(pipeline))
        assert abs(images[0] - images[1]).max() < 1e-5
        assert abs(images[0] - draw(build_tiny_pipeline())).max() > 1e-3
        if peft_config is None:
            assert abs(draw(StableDiffusionPipeline.from_pretrained(output)) - draw(trainer.pipeline)).max() < 1e-5

    def test_a_checkpoint_is_a_negative_model_too(self, npo, asked, tmp_path):
        trainer = SelfNPOTrainer(build_tiny_pipeline(), npo(save_strategy="steps", save_steps=3), asked)
        trainer.train()
        with negative_guidance(build_tiny_pipeline(), tmp_path / "output" / "checkpoint-3") as guided:
            second = vars(guided.unet)["_negative_guidance"].second
            for name, tensor in trainer.model.state_dict().items():
                torch.testing.assert_close(second.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


class TestData:
    @pytest.mark.newest
    def test_streamed_prompts_train_as_stored_ones(self, npo, asked):
        runs = []
        for data in (asked, asked.to_iterable_dataset()):
            trainer = SelfNPOTrainer(
                build_tiny_pipeline(), npo(train_sampling_strategy="sequential", shuffle_buffer=0), data
            )
            trainer.train()
            runs.append(weights_of(trainer.model))
        for name, tensor in runs[0].items():
            torch.testing.assert_close(tensor, runs[1][name], rtol=1e-4, atol=1e-5)

    def test_a_data_set_with_a_column_row_of_its_own(self, npo, asked):
        data = asked.add_column("row", [7] * len(asked)).with_format("torch")
        SelfNPOTrainer(build_tiny_pipeline(), npo(max_steps=1), data, data).train()

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (None, "train_dataset is missing: pass a datasets.Dataset with the column prompt"),
            (Dataset.from_dict({"text": ["a"]}), "lacks the column prompt; found: text"),
            (Dataset.from_dict({"prompt": []}), "has no rows"),
            (Dataset.from_dict({"prompt": ["a", " "]}), "row 1, column 'prompt': is empty"),
            (Dataset.from_dict({"prompt": [1, 2]}), "row 0, column 'prompt': is int, not a string"),
        ],
    )
    def test_prompts_that_cannot_be_used_are_refused(self, data, message, npo):
        with pytest.raises(ValueError, match=message):
            SelfNPOTrainer(build_tiny_pipeline(), npo(), data)

    def test_starting_from_data_needs_images(self, npo, asked):
        with pytest.raises(ValueError, match="lacks the column image"):
            SelfNPOTrainer(build_tiny_pipeline(), npo(start="data"), asked)


class TestConfig:
    def test_presets_fill_what_is_not_given(self, npo):
        assert (npo().start, npo().teacher, npo().loss_type, npo().guidance_scale) == ("noise", "ema", "huber", None)
        code = npo(preset="released_code")
        assert (code.start, code.teacher, code.loss_type, code.guidance_scale) == ("data", "ema", "huber", None)
        paper = npo(preset="paper", teacher="ema")
        assert (paper.start, paper.teacher, paper.loss_type, paper.guidance_scale) == ("noise", "ema", "l2", 1.0)

    def test_the_model_s_published_values_are_the_defaults(self, npo, asked):
        trainer = SelfNPOTrainer(build_tiny_pipeline(), npo(learning_rate=None), asked)
        assert (trainer.args.learning_rate, trainer.args.weight_decay, trainer.args.guidance_scale) == (1e-6, 1e-3, 0)
        trainer.train()
        assert trainer.optimizer.param_groups[0]["lr"] == 1e-6

    def test_published_grid(self):
        cfg = SelfNPOConfig(output_dir="x")
        assert (cfg.solver_steps, cfg.truncated_steps, cfg.ema_decay, cfg.huber_c) == (25, 5, 0.999, 1e-3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"solver_steps": 4, "truncated_steps": 5}, "solver_steps=4 is less than truncated_steps=5"),
            ({"truncated_steps": 0}, "at least 1"),
            ({"start": "images"}, "none of noise, data"),
            ({"teacher": "none"}, "none of ema, frozen"),
            ({"loss_type": "l1"}, "none of huber, l2"),
            ({"ema_decay": 1.0}, "outside"),
            ({"preset": "best"}, "none of default, released_code, paper"),
        ],
    )
    def test_bad_options_are_refused(self, options, message, npo):
        with pytest.raises(ValueError, match=message):
            npo(**options)


def test_the_released_lists_of_a_checkpoint(npo, asked, tmp_path):
    """What a full checkpoint with a moving teacher holds."""
    SelfNPOTrainer(build_tiny_pipeline(), npo(save_strategy="steps", save_steps=3), asked).train()
    names = {path.name for path in Path(tmp_path / "output" / "checkpoint-3").iterdir()}
    assert {"unet", "reference.safetensors", "trajectory_pool-0.safetensors", "trl_diffusion_pref.json"} <= names


def test_encoders_are_not_read_again_in_every_step(npo, asked, tmp_path, monkeypatch):
    build_tiny_pipeline().save_pretrained(tmp_path / "base")
    trainer = SelfNPOTrainer(str(tmp_path / "base"), npo(max_steps=2), asked)
    read = []
    monkeypatch.setattr(trainer.encoders, "load", lambda names: read.append(names))
    trainer.add_callback(EachStep(lambda *_: read.append("step")))
    trainer.train()
    assert read == ["step", "step"]

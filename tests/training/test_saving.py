"""Saving, reloading and resuming, with the files that a user gets."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_diffusion_pref import MaPOTrainer, NonFiniteLossError
from trl_diffusion_pref.export.weights import save_pipeline
from trl_diffusion_pref.families import family_for


def draw(pipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    return pipeline(["a red circle", "a blue square"], generator=generator, **options).images


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 4, "init_lora_weights": "gaussian", **options})


@pytest.fixture
def base_folder(tmp_path) -> Path:
    build_tiny_pipeline().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


class StopAt(TrainerCallback):
    """Ends training after a step, as a user's interrupt would, but saves as configured."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class TestRoundTrip:
    def test_full_training_saves_a_pipeline_that_draws_the_same(self, base_folder, pairs, config, tmp_path):
        trainer = MaPOTrainer(str(base_folder), config(), pairs)
        base = draw(trainer.pipeline)
        trainer.train()
        trainer.save_model()
        trained = draw(trainer.pipeline)
        loaded = draw(StableDiffusionPipeline.from_pretrained(trainer.args.output_dir))
        assert np.abs(trained - base).max() > 1e-3
        assert np.abs(loaded - trained).max() <= 1e-5

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"r": 2, "lora_alpha": 8},
            {"r": 8, "lora_alpha": 2},
            {"lora_alpha": 8, "use_rslora": True},
            {"lora_dropout": 0.3},
            {"target_modules": ["to_q", "conv1"], "rank_pattern": {"conv1": 2}},
        ],
        ids=str,
    )
    def test_a_lora_loads_through_diffusers_at_the_trained_scale(self, options, base_folder, pairs, config):
        trainer = MaPOTrainer(str(base_folder), config(learning_rate=3e-3), pairs, peft_config=lora(**options))
        trainer.train()
        trainer.save_model()
        trained = draw(trainer.pipeline)
        fresh = StableDiffusionPipeline.from_pretrained(base_folder)
        base = draw(fresh)
        fresh.load_lora_weights(trainer.args.output_dir)
        assert np.abs(trained - base).max() > 1e-3
        assert np.abs(draw(fresh) - trained).max() <= 1e-5

    def test_lora_leaves_the_base_weights_alone(self, base_folder, pairs, config):
        trainer = MaPOTrainer(str(base_folder), config(), pairs, peft_config=lora())
        trainer.train()
        before = load_file(base_folder / "unet" / "diffusion_pytorch_model.safetensors")
        after = {
            name.replace(".base_layer", ""): tensor for name, tensor in trainer.pipeline.unet.state_dict().items()
        }
        assert_equal_weights(before, {name: tensor for name, tensor in after.items() if "lora_" not in name})

    def test_lora_files_hold_the_adapter_and_its_configuration(self, base_folder, pairs, config):
        trainer = MaPOTrainer(str(base_folder), config(), pairs, peft_config=lora(r=2, lora_alpha=8))
        trainer.train()
        trainer.save_model()
        folder = Path(trainer.args.output_dir)
        with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
            assert all(name.startswith("unet.") for name in file.keys())
        assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (2, 8)
        peft_state = load_file(folder / "adapter_model.safetensors")
        assert len(peft_state) == len(load_file(folder / "pytorch_lora_weights.safetensors")) > 0

    def test_a_pipeline_given_loaded_samples_with_the_tuned_weights(self, pairs, config):
        pipeline = build_tiny_pipeline()
        before = draw(pipeline)
        MaPOTrainer(pipeline, config(), pairs, peft_config=lora()).train()
        assert np.abs(draw(pipeline) - before).max() > 1e-3

    def test_nothing_but_safetensors_and_json_is_needed_to_load(self, base_folder, pairs, config):
        trainer = MaPOTrainer(str(base_folder), config(), pairs)
        trainer.train()
        trainer.save_model()
        folder = Path(trainer.args.output_dir)
        (folder / "training_args.bin").unlink()
        endings = {path.suffix for path in folder.rglob("*") if path.is_file()}
        assert endings <= {".safetensors", ".json", ".md", ".txt"}
        draw(StableDiffusionPipeline.from_pretrained(folder))

    @pytest.mark.parametrize(
        "options",
        [{"bias": "all"}, {"modules_to_save": ["conv_out"]}, {"init_lora_weights": "pissa"}],
        ids=str,
    )
    def test_a_lora_that_no_file_could_hold_is_refused_before_training(self, options, tiny_pipeline, pairs, config):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.*could not be loaded"):
            MaPOTrainer(tiny_pipeline, config(), pairs, peft_config=lora(**options))

    def test_a_pipeline_is_saved_whole_from_gathered_weights(self, tiny_pipeline, tmp_path):
        """Under FSDP the module's own storage holds a shard, so it must not be read."""
        state = {name: tensor + 1 for name, tensor in weights_of(tiny_pipeline.unet).items()}
        tiny_pipeline.unet.save_pretrained = None
        save_pipeline(tiny_pipeline, family_for(tiny_pipeline), tmp_path, state)
        loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
        assert_equal_weights(weights_of(loaded.unet), state)


class TestResume:
    @pytest.mark.parametrize(
        ("kind", "evaluate"),
        [
            ("full", "never"),
            ("full", "whole run"),
            ("full", "resumed run"),
            ("lora", "never"),
            ("8-bit", "never"),
            *(
                pytest.param(kind, evaluate, marks=pytest.mark.slow)
                for kind in ("lora", "8-bit")
                for evaluate in ("whole run", "resumed run")
            ),
        ],
    )
    def test_resuming_equals_never_having_stopped(self, kind, evaluate, pairs, config, tmp_path):
        """Two epochs of four steps; stopped in the middle of the first, so that data order is resumed too."""
        peft_config = lora(lora_dropout=0.3) if kind == "lora" else None
        options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
        if kind == "8-bit":
            options["optim"] = "adamw_bnb_8bit"
        evaluation = {"eval_strategy": "steps", "eval_steps": 2}

        def trainer(folder, callbacks=(), with_evaluation=False):
            extra = evaluation if with_evaluation else {}
            return MaPOTrainer(
                build_tiny_pipeline(),
                config(output_dir=str(tmp_path / folder), **options, **extra),
                pairs,
                pairs.select(range(6)),
                callbacks=list(callbacks),
                peft_config=peft_config,
            )

        whole = trainer("whole", with_evaluation=evaluate == "whole run")
        whole.train()
        trainer("parts", [StopAt(3)]).train()
        resumed = trainer("parts", with_evaluation=evaluate == "resumed run")
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 8
        assert_equal_weights(weights_of(whole.model), weights_of(resumed.model))
        losses = [{e["step"]: e["loss"] for e in t.state.log_history if "loss" in e} for t in (whole, resumed)]
        assert losses[0] == losses[1]

    def test_a_killed_process_resumes_to_the_same_weights(self, pairs, tmp_path):
        """SIGKILL at some point of a run that saves at every step. All runs are processes with the same settings."""
        pairs.save_to_disk(tmp_path / "pairs")
        script = tmp_path / "train.py"
        script.write_text(
            "import sys\n"
            "from helpers.pipelines import build_tiny_pipeline\n"
            "from datasets import load_from_disk\n"
            "from trl_diffusion_pref import MaPOConfig, MaPOTrainer\n"
            "cfg = MaPOConfig(output_dir=sys.argv[2], max_steps=int(sys.argv[3]), per_device_train_batch_size=4,\n"
            "    learning_rate=1e-3, save_steps=1, activation_checkpointing=False, disable_tqdm=True)\n"
            "trainer = MaPOTrainer(build_tiny_pipeline(), cfg, load_from_disk(sys.argv[1]))\n"
            "trainer.train(resume_from_checkpoint=len(sys.argv) > 4)\n"
            "trainer.save_model()\n"
        )

        def start(folder: Path, steps: int, *resume: str) -> subprocess.Popen:
            arguments = [str(tmp_path / "pairs"), str(folder), str(steps), *resume]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
            return subprocess.Popen(
                [sys.executable, str(script), *arguments], env=environment, stdout=subprocess.DEVNULL
            )

        killed, whole = tmp_path / "killed", tmp_path / "whole"
        process = start(killed, 1000)
        deadline = time.monotonic() + 120
        while not (killed / "checkpoint-4" / "trainer_state.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()

        newest = max(int(path.name.split("-")[1]) for path in killed.glob("checkpoint-*"))
        (killed / f"checkpoint-{newest + 1}").mkdir()  # what a kill between two files leaves
        for folder, resume in ((killed, ["resume"]), (whole, [])):
            assert start(folder, newest + 3, *resume).wait(timeout=120) == 0
        file = "unet/diffusion_pytorch_model.safetensors"
        assert_equal_weights(load_file(killed / file), load_file(whole / file))

    def test_unfinished_and_missing_checkpoints_are_refused(self, pairs, config, tmp_path):
        trainer = MaPOTrainer(build_tiny_pipeline(), config(save_strategy="steps", save_steps=1), pairs)
        with pytest.raises(ValueError, match="no complete checkpoint"):
            trainer.train(resume_from_checkpoint=True)
        trainer.train()
        checkpoint = Path(trainer.args.output_dir) / "checkpoint-3"
        (checkpoint / "trainer_state.json").unlink()
        with pytest.raises(ValueError, match="checkpoint-3.*unfinished"):
            trainer.train(resume_from_checkpoint=str(checkpoint))

    def test_a_lora_run_does_not_resume_from_a_full_checkpoint_or_the_reverse(self, pairs, config):
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        full = MaPOTrainer(build_tiny_pipeline(), config(**options), pairs)
        full.train()
        other = MaPOTrainer(build_tiny_pipeline(), config(**options), pairs, peft_config=lora())
        with pytest.raises(ValueError, match="checkpoint"):
            other.train(resume_from_checkpoint=True)


class TestBestModel:
    @pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
    def test_the_best_weights_are_loaded_at_the_end(self, kind, pairs, config):
        cfg = config(
            max_steps=6,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
        )

        pipeline = build_tiny_pipeline()

        class Worsen(TrainerCallback):
            """From the fourth step on the prediction is off by more and more; with LoRA in the base, until the end."""

            def on_optimizer_step(self, args, state, control, **kwargs):
                if state.global_step >= 3:
                    pipeline.unet.conv_out.bias.data += 5

            def on_train_end(self, args, state, control, **kwargs):
                if kind == "lora":
                    pipeline.unet.conv_out.bias.data -= 5 * 3

        trainer = MaPOTrainer(
            pipeline,
            cfg,
            pairs,
            pairs,
            callbacks=[Worsen()],
            peft_config=lora() if kind == "lora" else None,
        )
        trainer.train()
        losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
        best = min(losses, key=losses.get)
        assert best <= 3, losses
        assert trainer.state.best_global_step == best
        folder = Path(cfg.output_dir) / f"checkpoint-{best}"
        if kind == "full":
            saved = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
            assert_equal_weights(saved, weights_of(trainer.model))
        else:
            saved = load_file(folder / "adapter_model.safetensors")
            model = {n.replace(".default", ""): t for n, t in weights_of(trainer.model).items() if "lora_" in n}
            assert_equal_weights(saved, model)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


class TestCard:
    def test_the_lora_card_names_the_base_and_how_to_load(self, tiny_pipeline, pairs, config):
        tiny_pipeline.register_to_config(_name_or_path="org/base")
        trainer = MaPOTrainer(tiny_pipeline, config(max_steps=1), pairs, peft_config=lora())
        trainer.train()
        trainer.save_model()
        card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
        assert card.data.base_model == "org/base"
        assert card.data.library_name == "diffusers"
        assert 'from_pretrained("org/base")' in card.content and "load_lora_weights" in card.content
        assert "lora" in card.data.tags


class TestRefusals:
    def test_float16_weights_for_full_training(self, tiny_pipeline, pairs, config):
        tiny_pipeline.unet.half()
        with pytest.raises(ValueError, match="float16.*float32"):
            MaPOTrainer(tiny_pipeline, config(), pairs)

    def test_an_output_folder_with_checkpoints_of_another_base(self, pairs, config):
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        MaPOTrainer(build_tiny_pipeline(), config(**options), pairs).train()
        with pytest.raises(ValueError, match="another base model.*output_dir"):
            MaPOTrainer(build_tiny_pipeline(seed=1), config(**options), pairs)
        MaPOTrainer(build_tiny_pipeline(), config(**options), pairs)

    def test_a_pipeline_that_carries_an_adapter(self, tiny_pipeline, pairs, config):
        MaPOTrainer(tiny_pipeline, config(), pairs, peft_config=lora())
        with pytest.raises(ValueError, match="already carries an adapter"):
            MaPOTrainer(tiny_pipeline, config(), pairs, peft_config=lora())

    def test_wrong_arguments(self, tiny_pipeline, pairs, config):
        with pytest.raises(ValueError, match="train_dataset is missing"):
            MaPOTrainer(tiny_pipeline, config())
        with pytest.raises(TypeError, match="UNet2DConditionModel alone"):
            MaPOTrainer(tiny_pipeline.unet, config(), pairs)
        with pytest.raises(TypeError, match="MaPOConfig"):
            from transformers import TrainingArguments

            MaPOTrainer(tiny_pipeline, TrainingArguments(output_dir="x"), pairs)
        with pytest.raises(ValueError, match="model_init_kwargs"):
            MaPOTrainer(tiny_pipeline, config(model_init_kwargs={"variant": "fp16"}), pairs)
        assert not Path(config().output_dir).exists()


class TestNonFinite:
    def poison(self, trainer, row: int) -> None:
        original = trainer.data_collator

        def collate(rows):
            batch = original(rows)
            batch["latents"]["mean"][batch["row"] == row, 1] = float("inf")
            return batch

        trainer.data_collator = collate

    def test_training_stops_with_step_rows_and_last_good_checkpoint(self, pairs, config):
        cfg = config(save_strategy="steps", save_steps=1, max_steps=8)
        cfg.train_sampling_strategy = "sequential"
        trainer = MaPOTrainer(build_tiny_pipeline(), cfg, pairs)
        self.poison(trainer, row=9)
        with pytest.raises(NonFiniteLossError, match=r"step 3 the loss is (nan|inf).*\[9\].*checkpoint-2"):
            trainer.train()
        # There to sample from, as after a run that ended: no dropout.
        assert not trainer.model.training

    def test_the_last_whole_step_is_saved_first(self, pairs, config):
        """Also where the run saves nothing by itself; it resumes to what it was."""
        cfg = config(max_steps=8)
        cfg.train_sampling_strategy = "sequential"
        trainer = MaPOTrainer(build_tiny_pipeline(), cfg, pairs)
        self.poison(trainer, row=9)
        with pytest.raises(NonFiniteLossError, match="checkpoint-2"):
            trainer.train()
        saved = load_file(Path(cfg.output_dir) / "checkpoint-2" / "unet" / "diffusion_pytorch_model.safetensors")
        cfg = config(max_steps=2, output_dir=cfg.output_dir + "-short")
        cfg.train_sampling_strategy = "sequential"
        short = MaPOTrainer(build_tiny_pipeline(), cfg, pairs)
        short.train()
        assert_equal_weights(saved, weights_of(short.model))

    def test_without_a_checkpoint_that_is_said(self, pairs, config):
        cfg = config()
        cfg.train_sampling_strategy = "sequential"
        trainer = MaPOTrainer(build_tiny_pipeline(), cfg, pairs)
        self.poison(trainer, row=0)
        with pytest.raises(NonFiniteLossError, match="Last good checkpoint: none was saved"):
            trainer.train()

    def test_weights_that_are_not_finite_are_not_saved(self, pairs, config):
        cfg = config(save_strategy="steps", save_steps=1)

        class Wreck(TrainerCallback):
            def on_optimizer_step(self, args, state, control, model, **kwargs):
                if state.global_step == 1:
                    with torch.no_grad():
                        next(model.parameters()).fill_(float("nan"))

        trainer = MaPOTrainer(build_tiny_pipeline(), cfg, pairs, callbacks=[Wreck()])
        with pytest.raises(NonFiniteLossError, match="At step 2 .*no checkpoint was written.*checkpoint-1"):
            trainer.train()
        assert sorted(path.name for path in Path(cfg.output_dir).glob("checkpoint-*")) == ["checkpoint-1"]


def test_telemetry_does_not_break_without_the_variable_ci(tiny_pipeline, pairs, config, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    MaPOTrainer(tiny_pipeline, config(), pairs)


def test_a_gathered_state_dict_is_written_with_the_original_class_name(tiny_pipeline, tmp_path):
    """What FSDP saves: a renamed class, and weights that come from outside the module."""
    from trl_diffusion_pref.export.weights import save_denoiser

    unet = tiny_pipeline.unet
    state = {name: tensor + 1 for name, tensor in weights_of(unet).items()}
    unet.__class__ = type("FSDPUNet2DConditionModel", (UNet2DConditionModel,), {})
    save_denoiser(unet, tmp_path / "unet", state)
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    assert_equal_weights(weights_of(UNet2DConditionModel.from_pretrained(tmp_path / "unet")), state)

"""Pushing to the Hub over HTTP with huggingface_hub itself: what arrives, what loads, and what happens on failure."""

import inspect
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import tiny
from helpers.hub_server import HubServer, hub_server, use_endpoint  # noqa: F401
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from peft import LoraConfig
from safetensors.torch import load
from transformers import TrainerCallback

from trl_diffusion_pref import MaPOConfig, MaPOTrainer, SampleCallback, SelfNPOConfig, SelfNPOTrainer
from trl_diffusion_pref.export.push import PushError, push_folder
from trl_diffusion_pref.guidance import negative_guidance


BASE, NAME = "org/base", "me/tuned"
UNET, LORA = "unet/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"
NO_HUB = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_tiny_pipeline().save_pretrained(folder)
    return folder


def put(server: HubServer, name: str, folder: Path) -> None:
    """Lays a folder's files on the server."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    server.repositories[name] = files


@pytest.fixture
def hub(hub_server: HubServer, base_folder) -> HubServer:
    """A Hub that has the base, and wants a token of who writes."""
    put(hub_server, BASE, base_folder)
    hub_server.token = "hf_right"
    return hub_server


@pytest.fixture
def pushed(config):
    """Makes configs of runs that have a place on the Hub."""

    def make(**options) -> MaPOConfig:
        defaults = {"hub_model_id": NAME, "hub_token": "hf_right", "learning_rate": 3e-3, "max_steps": 2}
        return config(**{**defaults, **options})

    return make


def lora() -> LoraConfig:
    """Alpha is not r: a file that does not say so loads at half the scale."""
    return LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian")


def generated(pipeline, **options) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np", **options}
    return pipeline("your prompt", generator=generator, **options).images[0]


def image_of_snippet(card: str, **options) -> np.ndarray:
    """What a card's code generates; only the size and the seed of the sample are added."""
    code = card.split("```python\n")[1].split("```")[0]
    options = {"num_inference_steps": 2, "output_type": "np", **options}
    added = ", ".join(f"{name}={value!r}" for name, value in options.items())
    call = 'pipeline("your prompt"'
    assert code.count(call) == 1
    seed = "generator=torch.Generator().manual_seed(3)"
    namespace: dict = {}
    exec(f"import torch\n{code}".replace(call, f"{call}, {added}, {seed}"), namespace)
    return namespace["image"]


def largest_difference(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left - right).max())


class TestRoundTrip:
    @pytest.mark.newest
    @pytest.mark.parametrize("kind", ["full", "lora"])
    def test_what_is_pushed_loads_by_name_and_draws_the_same(self, kind, hub, pushed, pairs):
        options = {"lora_format": "kohya"} if kind == "lora" else {}
        trainer = MaPOTrainer(BASE, pushed(**options), pairs, peft_config=lora() if kind == "lora" else None)
        trainer.train()
        trainer.push_to_hub(dataset_name="user/pairs")
        files, expected = hub.repositories[NAME], generated(trainer.pipeline)
        base = DiffusionPipeline.from_pretrained(BASE)
        assert largest_difference(generated(base), expected) > 1e-3
        if kind == "full":
            assert largest_difference(generated(DiffusionPipeline.from_pretrained(NAME)), expected) < 1e-5
        else:
            for options in ({}, {"weight_name": "kohya_lora_weights.safetensors"}):
                base.load_lora_weights(NAME, **options)
                assert largest_difference(generated(base), expected) < 1e-5
                base.unload_lora_weights()
        card = ModelCard(files["README.md"].decode())
        assert largest_difference(image_of_snippet(card.content), expected) < 1e-5
        data = card.data.to_dict()
        known = {*inspect.signature(ModelCardData).parameters, "base_model_relation"}
        assert set(data) <= known and "POST api/validate-yaml" in hub.requests
        assert data["base_model_relation"] == ("finetune" if kind == "full" else "adapter")
        assert (data["base_model"], data["datasets"], data["library_name"]) == (BASE, "user/pairs", "diffusers")
        assert data["pipeline_tag"] == "text-to-image" and {"mapo", "trl"} <= set(data["tags"])
        assert "2406.06424" in card.content and "None" not in card.content
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth")) or "checkpoint" in name]

    @pytest.mark.newest
    @pytest.mark.parametrize("kind", ["full", "lora"])
    def test_a_negative_model_s_card_guides_with_it(self, kind, hub, pairs, tmp_path):
        options = {"output_dir": str(tmp_path / "npo"), "max_steps": 1, "solver_steps": 4, "truncated_steps": 2}
        options |= {"hub_model_id": NAME, "hub_token": "hf_right", "save_strategy": "no", "disable_tqdm": True}
        args = SelfNPOConfig(**options, learning_rate=1e-2, per_device_train_batch_size=2)
        peft_config = lora() if kind == "lora" else None
        trainer = SelfNPOTrainer(BASE, args, pairs.select_columns("prompt"), peft_config=peft_config)
        trainer.train()
        trainer.push_to_hub()
        pipeline = DiffusionPipeline.from_pretrained(BASE)
        with negative_guidance(pipeline, args.output_dir):
            expected = generated(pipeline, guidance_scale=5.0)
        assert largest_difference(generated(pipeline, guidance_scale=5.0), expected) > 1e-3
        found = image_of_snippet(hub.repositories[NAME]["README.md"].decode())
        assert largest_difference(found, expected) < 1e-5

    @pytest.mark.newest
    def test_the_card_of_a_lora_for_peft_loads_it_by_name(self, hub, pairs, tmp_path, pushed):
        tiny.build("pixart_sigma").save_pretrained(tmp_path / "base")
        put(hub, "org/pixart", tmp_path / "base")
        args = pushed(resolution=16, learning_rate=1e-2)
        trainer = MaPOTrainer("org/pixart", args, pairs, peft_config=LoraConfig(r=2, lora_alpha=8))
        trainer.train()
        trainer.push_to_hub()
        size = {"height": 16, "width": 16, "use_resolution_binning": False, "clean_caption": False}
        expected = generated(trainer.pipeline, **size)
        assert largest_difference(generated(DiffusionPipeline.from_pretrained("org/pixart"), **size), expected) > 1e-3
        files = hub.repositories[NAME]
        card = files["README.md"].decode()
        assert {"adapter_config.json", "adapter_model.safetensors"} < set(files) and LORA not in files
        assert "PeftModel.from_pretrained" in card
        assert largest_difference(image_of_snippet(card, **size), expected) < 1e-5

    @pytest.mark.newest
    def test_pictures_and_a_later_comparison_are_in_the_card(self, hub, pushed, pairs):
        trainer = MaPOTrainer(BASE, pushed(), pairs)
        trainer.add_callback(SampleCallback(trainer, ["a red circle"], every=2, num_inference_steps=2))
        trainer.train()
        trainer.save_model()
        folder = Path(trainer.args.output_dir)
        (folder / "comparison").mkdir()
        (folder / "comparison" / "comparison.md").write_text("# Against the base\n\nWins 60 %.\n")
        push_folder(folder, NAME, token="hf_right")
        files = hub.repositories[NAME]
        card = files["README.md"].decode()
        assert "![step-000002](samples/step-000002.png)" in card and "samples/step-000002.png" in files
        assert card.count("## Comparison") == 1 and "## Comparison\n\nWins 60 %.\n\n## Data" in card


class TestStrategies:
    def run(self, pushed, pairs, strategy: str, kind: str = "lora", **options) -> MaPOTrainer:
        options = {"save_strategy": "steps", "save_steps": 1, **options}
        args = pushed(push_to_hub=True, hub_strategy=strategy, hub_always_push=True, **options)
        trainer = MaPOTrainer(BASE, args, pairs, peft_config=lora() if kind == "lora" else None)
        trainer.train()
        return trainer

    @pytest.mark.newest
    @pytest.mark.parametrize("kind", ["full", "lora"])
    def test_every_save_pushes_each_checkpoint_s_weights(self, kind, hub, pushed, pairs):
        wait = WaitForPushes()
        args = pushed(push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=1)
        peft_config = lora() if kind == "lora" else None
        trainer = MaPOTrainer(BASE, args, pairs, peft_config=peft_config, callbacks=[wait])
        wait.trainer = trainer
        trainer.train()
        assert [commit.message for commit in hub.commits] == [f"Training in progress, step {step}" for step in (1, 2)]
        for step, commit in zip((1, 2), hub.commits, strict=True):
            file = UNET if kind == "full" else LORA
            stored = (Path(trainer.args.output_dir) / f"checkpoint-{step}" / file).read_bytes()
            assert commit.files[file] == stored
            assert ("model_index.json" in commit.files) == (kind == "full")
            assert not [name for name in commit.files if "checkpoint" in name]
        assert hub.commits[0].files[file] != hub.commits[1].files[file]

    @pytest.mark.newest
    def test_all_checkpoints_are_pushed_beside_the_model(self, hub, pushed, pairs):
        trainer = self.run(pushed, pairs, "all_checkpoints")
        files = hub.repositories[NAME]
        for step in (1, 2):
            folder = Path(trainer.args.output_dir) / f"checkpoint-{step}"
            names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
            got = {name.split("/", 1)[1] for name in files if name.startswith(f"checkpoint-{step}/")}
            assert got == names - {"training_args.bin"}
        assert LORA in files
        DiffusionPipeline.from_pretrained(BASE).load_lora_weights(NAME)

    @pytest.mark.newest
    @pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
    def test_a_run_resumes_from_the_pushed_last_checkpoint(self, kind, hub, pushed, pairs, tmp_path):
        self.run(pushed, pairs, "checkpoint", kind, max_steps=2)
        assert {name.split("/")[1] for name in hub.repositories[NAME] if name.startswith("last-checkpoint/")}
        folder = Path(snapshot_download(NAME, allow_patterns="last-checkpoint/*")) / "last-checkpoint"
        peft_config = lora() if kind == "lora" else None
        options = {"hub_token": None, "max_steps": 4}
        resumed = MaPOTrainer(BASE, pushed(output_dir=str(tmp_path / "b"), **options), pairs, peft_config=peft_config)
        resumed.train(resume_from_checkpoint=str(folder))
        whole = MaPOTrainer(BASE, pushed(output_dir=str(tmp_path / "c"), **options), pairs, peft_config=peft_config)
        whole.train()
        assert resumed.state.global_step == 4
        assert_equal_weights(weights_of(resumed.model), weights_of(whole.model))

    @pytest.mark.newest
    def test_the_strategy_end_pushes_with_save_model_alone(self, hub, pushed, pairs):
        trainer = self.run(pushed, pairs, "end")
        assert not hub.commits
        trainer.save_model()
        assert [commit.message for commit in hub.commits] == ["Model save"]
        stored = load((Path(trainer.args.output_dir) / LORA).read_bytes())
        assert_equal_weights(load(hub.repositories[NAME][LORA]), stored)

    @pytest.mark.newest
    def test_a_private_repository_and_a_new_branch_are_made(self, hub, pushed, pairs):
        trainer = self.run(pushed, pairs, "every_save", "full", hub_private_repo=True, hub_revision="try-2")
        trainer.save_model()
        assert NAME in hub.private and not hub.repositories[NAME]
        loaded = generated(DiffusionPipeline.from_pretrained(NAME, revision="try-2"))
        assert largest_difference(loaded, generated(trainer.pipeline)) < 1e-5


class WaitForPushes(TrainerCallback):
    """Waits for each push, so that none is left out because the one before still runs."""

    trainer: MaPOTrainer

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.trainer._finish_current_push()

    on_train_end = on_step_begin


class TestFailures:
    def test_a_missing_token_is_found_before_anything_is_loaded(self, hub, pushed, pairs):
        with pytest.raises(ValueError, match="push_to_hub=True needs a token.*hf auth login"):
            MaPOTrainer("org/missing", pushed(push_to_hub=True, hub_token=None), pairs)
        assert not hub.requests

    def test_a_wrong_token_is_an_error_before_training(self, hub, pushed, pairs):
        with pytest.raises(ValueError, match="the Hub refuses 'me/tuned'.*401"):
            MaPOTrainer(BASE, pushed(push_to_hub=True, hub_token="hf_wrong"), pairs)

    @pytest.mark.newest
    def test_a_hub_that_fails_during_a_run_costs_neither_run_nor_weights(self, hub, pushed, pairs, caplog):
        class Fail(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                hub.refusal = 503

        options = {"push_to_hub": True, "hub_strategy": "checkpoint", "save_strategy": "steps", "save_steps": 1}
        trainer = MaPOTrainer(BASE, pushed(**options), pairs, peft_config=lora(), callbacks=[Fail()])
        with caplog.at_level(logging.WARNING):
            trainer.train()
        folder = trainer.args.output_dir
        command = f"trl-diffusion-pref push {folder} {NAME}"
        assert trainer.state.global_step == 2 and command in caplog.text and "503" in caplog.text
        caplog.clear()
        trainer.save_model()
        assert command in caplog.text
        with pytest.raises(PushError, match=f"weights are in {folder}.*\n *{command}"):
            trainer.push_to_hub()
        assert not hub.commits
        # What the command does, once the Hub answers.
        hub.refusal = None
        assert push_folder(folder, NAME, token="hf_right") == f"{hub.url}/{NAME}"
        base = DiffusionPipeline.from_pretrained(BASE)
        base.load_lora_weights(NAME)
        assert largest_difference(generated(base), generated(trainer.pipeline)) < 1e-5
        assert not [name for name in hub.repositories[NAME] if name.endswith(".bin") or "checkpoint" in name]

    @pytest.mark.newest
    def test_without_a_network_a_run_trains_and_says_how_to_push(
        self, hub, base_folder, pushed, pairs, caplog, monkeypatch
    ):
        use_endpoint(monkeypatch, NO_HUB)
        with caplog.at_level(logging.WARNING):
            args = pushed(push_to_hub=True, hub_private_repo=True, hub_revision="a b")
            trainer = MaPOTrainer(str(base_folder), args, pairs)
            assert "The Hub cannot be reached now" in caplog.text
            trainer.train()
            trainer.save_model()
        assert f"push {trainer.args.output_dir} {NAME} --private --revision 'a b'" in caplog.text
        use_endpoint(monkeypatch, hub.url)
        trainer.push_to_hub()
        assert UNET in hub.branches[NAME, "a b"] and NAME in hub.private

    def test_folders_that_nobody_could_load_are_refused(self, hub, base_folder, pushed, pairs, tmp_path):
        trainer = MaPOTrainer(BASE, pushed(save_strategy="steps", save_steps=2), pairs)
        trainer.train()
        for folder, message in (
            (tmp_path / "nowhere", "is no folder"),
            (base_folder, "no trainer of this package saved a model there"),
            (Path(trainer.args.output_dir) / "checkpoint-2", "Checkpoints of full training hold the denoiser alone"),
        ):
            with pytest.raises(ValueError, match=message):
                push_folder(folder, NAME, token="hf_right")
        assert NAME not in hub.repositories


@pytest.mark.newest
def test_a_lora_s_checkpoint_is_pushed_without_the_optimizer(hub, pushed, pairs):
    args = pushed(save_strategy="steps", save_steps=2, hub_model_id=None)
    trainer = MaPOTrainer(BASE, args, pairs, peft_config=lora())
    trainer.train()
    push_folder(Path(args.output_dir) / "checkpoint-2", NAME, token="hf_right", commit_message="Step 2")
    files = hub.repositories[NAME]
    assert hub.commits[0].message == "Step 2" and not [name for name in files if name.endswith((".pt", ".pth"))]
    found = image_of_snippet(files["README.md"].decode())
    assert largest_difference(found, generated(trainer.pipeline)) < 1e-5


@pytest.mark.newest
def test_tokens_are_in_no_file_log_or_text_of_the_config(hub, pushed, pairs, tmp_path, caplog, capsys):
    hub.token = "hf_SECRET_hub"
    options = {"hub_token": hub.token, "model_init_kwargs": {"token": "hf_SECRET_base", "dtype": torch.float32}}
    options |= {"push_to_hub": True, "hub_strategy": "checkpoint", "save_strategy": "steps", "save_steps": 1}
    args = pushed(**options, report_to=["tensorboard"])
    with caplog.at_level(logging.DEBUG):
        trainer = MaPOTrainer(BASE, args, pairs, peft_config=lora())
        trainer.train()
        trainer.save_model()
    # Nor does a tracker's reading of the options change them.
    assert trainer.args.model_init_kwargs["dtype"] is torch.float32
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"trainer_state.json", "training_args.bin", "README.md"} <= {file.name for file in files}
    assert [file for file in files if "tfevents" in file.name]
    assert not [file for file in files if b"SECRET" in file.read_bytes()]
    assert not [name for commit in hub.commits for name, content in commit.files.items() if b"SECRET" in content]
    printed = caplog.text + "".join(capsys.readouterr())
    assert "SECRET" not in printed + repr(args) + str(args) + json.dumps(args.to_dict())
    assert "learning_rate=0.003" in repr(args)

"""The model card: what it says of base, LoRA, data, options and metrics; its code runs; the Hub's checks pass."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import DatasetInfo
from diffusers import DiffusionPipeline
from helpers import tiny
from helpers.hub_server import hub_server  # noqa: F401
from helpers.pipelines import build_tiny_pipeline
from huggingface_hub import ModelCard, metadata_load
from peft import LoraConfig
from PIL import Image

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOTrainer, SelfNPOConfig, SelfNPOTrainer
from trl_diffusion_pref.data.origin import origin_of
from trl_diffusion_pref.export import model_card
from trl_diffusion_pref.export.card_contents import base_licence, bibtex, final_metrics, training_curve
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.guidance import negative_guidance
from trl_diffusion_pref.training.pipelines import origin


def lora() -> LoraConfig:
    options = {"rank_pattern": {"to_q": 2}, "init_lora_weights": "gaussian"}
    return LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], **options)


@pytest.fixture
def base(tmp_path) -> Path:
    """A local base whose own card names a licence."""
    folder = tmp_path / "my-base"
    build_tiny_pipeline().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: my-licence\nlicense_link: LICENSE.md\n---\n")
    return folder


def saved(trainer) -> str:
    trainer.train()
    trainer.save_model()
    return (Path(trainer.args.output_dir) / "README.md").read_text()


def tables(card: str) -> dict[str, str]:
    """Rows of the card's tables of two columns, by the first one."""
    return dict(re.findall(r"^\| `?([^|`]+?)`? \| (.*?) \|$", card, re.MULTILINE))


def run_snippet(card: str, trainer, base: Path) -> np.ndarray:
    """The image that the card's code makes, with its folders' places put in, and with few steps."""
    code = card.split("```python\n")[1].split("```")[0]
    assert f'from_pretrained("{base.name}"' in code or "load" not in code
    code = code.replace(f'"{base.name}"', repr(str(base)))
    code = code.replace(f'"{Path(trainer.args.output_dir).name}"', repr(trainer.args.output_dir))
    options = 'num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(3)'
    code = code.replace('pipeline("your prompt"', f'pipeline("your prompt", {options}')
    namespace: dict = {}
    exec(f"import torch\n{code}", namespace)
    return namespace["image"]


def generated(pipeline, **options) -> np.ndarray:
    import torch

    generator = torch.Generator().manual_seed(3)
    options = {"num_inference_steps": 2, "output_type": "np", **options}
    return pipeline("your prompt", generator=generator, **options).images[0]


class TestCode:
    @pytest.mark.parametrize("kind", ["lora", "full"])
    def test_it_generates_the_trained_pipeline_s_image(self, kind, base, pairs, config):
        peft_config = lora() if kind == "lora" else None
        trainer = MaPOTrainer(str(base), config(learning_rate=3e-3), pairs, peft_config=peft_config)
        card = saved(trainer)
        expected = generated(trainer.pipeline)
        assert np.abs(run_snippet(card, trainer, base) - expected).max() < 1e-5
        assert np.abs(generated(DiffusionPipeline.from_pretrained(base)) - expected).max() > 1e-3

    def test_a_negative_model_s_samples_with_it(self, base, pairs, tmp_path):
        options = {"output_dir": str(tmp_path / "npo"), "max_steps": 2, "solver_steps": 4, "truncated_steps": 2}
        args = SelfNPOConfig(**options, learning_rate=1e-2, per_device_train_batch_size=2, save_strategy="no")
        trainer = SelfNPOTrainer(str(base), args, pairs.select_columns("prompt"), peft_config=lora())
        card = saved(trainer)
        pipeline = DiffusionPipeline.from_pretrained(base)
        with negative_guidance(pipeline, args.output_dir):
            expected = generated(pipeline, guidance_scale=5.0)
        assert np.abs(run_snippet(card, trainer, base) - expected).max() < 1e-5
        assert "A negative model" in card and "negative-model" in metadata_load(tmp_path / "npo/README.md")["tags"]


class TestContents:
    def test_a_local_base_is_named_without_its_path(self, base, pairs, config, tmp_path):
        card = saved(MaPOTrainer(str(base), config(max_steps=1), pairs, peft_config=lora()))
        assert "A LoRA for `my-base`, a local `StableDiffusionPipeline`" in card
        assert str(tmp_path) not in card and "the base model" not in card
        assert "base_model" not in yaml.safe_load(card.split("---")[1])

    def test_a_cached_copy_of_a_hub_model_is_named_by_its_id(self, tmp_path):
        folder = tmp_path / "models--org--base" / "snapshots" / "0123abc"
        build_tiny_pipeline().save_pretrained(folder)
        assert origin(folder)[0] == origin(DiffusionPipeline.from_pretrained(folder))[0] == "org/base"
        assert origin("org/base") == ("org/base", None)
        assert origin(build_tiny_pipeline()) == (None, None)

    def test_rank_alpha_and_options_that_are_no_defaults_are_listed(self, base, pairs, config):
        args = config(random_flip=True, hub_token="hf_secret", adam_beta2=0.95, run_name="a-run")
        card = saved(MaPOTrainer(str(base), args, pairs, peft_config=lora()))
        rows = tables(card)
        assert (rows["r"], rows["lora_alpha"], rows["rank_pattern"]) == ("4", "8", "{'to_q': 2}")
        assert rows["target_modules"] == "to_k, to_q"
        assert (rows["random_flip"], rows["adam_beta2"], rows["pairs per step"]) == ("True", "0.95", "4")
        assert (rows["steps"], rows["learning_rate"], rows["beta"]) == ("3", "0.001", "0.1")
        # Neither secrets, nor what is about the machine, nor what was left at its default.
        assert not rows.keys() & {"hub_token", "run_name", "output_dir", "save_strategy", "crop", "disable_tqdm"}
        assert "hf_secret" not in card

    def test_data_metrics_and_curve_are_those_of_the_run(self, base, pairs, tmp_path):
        info = DatasetInfo(download_checksums={"hf://datasets/user/pairs@abc123/data/train.parquet": {}})
        pairs = pairs.select(range(16))
        pairs.info.update(info)
        args = DiffusionDPOConfig(
            output_dir=str(tmp_path / "dpo"),
            max_steps=12,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=6,
            per_device_train_batch_size=2,
            save_strategy="no",
            divergence_guard="off",
            beta=1.0,
        )
        trainer = DiffusionDPOTrainer(str(base), args, pairs, pairs.select(range(4)), peft_config=lora())
        card = saved(trainer)
        rows = tables(card)
        assert rows["name"] == "[user/pairs](https://huggingface.co/datasets/user/pairs)"
        assert (rows["columns"], rows["rows"], rows["rows left out"]) == (
            "`prompt`, `chosen`, `rejected`",
            "16",
            "none",
        )
        assert metadata_load(tmp_path / "dpo/README.md")["datasets"] == "user/pairs"
        log = trainer.state.log_history
        last = next(entry for entry in reversed(log) if "eval_loss" in entry)
        for name in ("eval_loss", "eval_preference_accuracy", "eval_rewards/margins"):
            assert rows[name] == f"{last[name]:.4g}"
        losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
        shown = dict(re.findall(r"^\| (\d+) \| ([^ ]+) \|", card, re.MULTILINE))
        assert len(shown) == 10 and shown["1"] == f"{losses[1]:.4g}" and shown["12"] == f"{losses[12]:.4g}"

    def test_pictures_and_a_comparison_in_the_folder_are_shown(self, base, pairs, config):
        trainer = MaPOTrainer(str(base), config(max_steps=1), pairs)
        folder = Path(trainer.args.output_dir)
        assert "## Samples" not in saved(trainer) and "## Comparison" not in saved(trainer)
        (folder / "samples").mkdir()
        for name in ("before", "after 1"):
            Image.new("RGB", (2, 2)).save(folder / "samples" / f"{name}.png")
        (folder / "comparison.md").write_text("# Against the base\n\nWins 60 %.\n")
        card = saved(trainer)
        assert "![after 1](samples/after%201.png)\n![before](samples/before.png)" in card
        assert "## Comparison\n\nWins 60 %." in card

    def test_the_licence_is_the_base_s_or_is_left_out(self, base, pairs, config, monkeypatch):
        args = config(max_steps=1)
        card = saved(MaPOTrainer(str(base), args, pairs))
        data = metadata_load(Path(args.output_dir) / "README.md")
        # The link is to a file of the base's own repository.
        assert (data["license"], data["license_name"], data.get("license_link")) == ("other", "my-licence", None)
        assert "The base's: my-licence." in card
        link = base_licence(DiffusionPipeline.from_pretrained(base), "org/base")["license_link"]
        assert link == "https://huggingface.co/org/base/blob/main/LICENSE.md"
        # The working directory's card is not that of a pipeline from memory.
        monkeypatch.chdir(base)
        assert base_licence(build_tiny_pipeline(), None) == {}
        (base / "README.md").write_text("---\nlicense: [broken\n---\n")
        pipeline = DiffusionPipeline.from_pretrained(base)
        assert base_licence(pipeline, None) == base_licence(build_tiny_pipeline(), "org/absent") == {}
        assert "Not stated here" in saved(MaPOTrainer(build_tiny_pipeline(), config(max_steps=1), pairs))

    def test_every_algorithm_cites_its_paper(self):
        from trl_diffusion_pref import TRAINERS

        for _, trainer in TRAINERS.values():
            paper = trainer._paper
            entry = bibtex(paper)
            assert paper["id"] in entry and "author" in entry and " ".join(paper["title"].split()[:3]) in entry
        assert bibtex({}) == ""
        assert bibtex({"title": "A Title", "id": "1234.5678"}).count("1234.5678") == 3


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("stable_diffusion", '"your prompt"'),
        ("instruct_pix2pix", '"your prompt", image=load_image("to_edit.png")'),
        # The prompt is not the first argument of its call.
        ("qwen_image_edit_plus", 'prompt="your prompt", image=[load_image("to_edit.png")]'),
        (
            "stable_diffusion_inpaint",
            '"your prompt", image=load_image("to_edit.png"), mask_image=load_image("mask.png")',
        ),
    ],
)
def test_the_code_loads_what_the_pipeline_is_given(name, given):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    assert model_card._inputs(pipeline, family, family.condition_images) == given


def test_a_curve_has_its_first_and_last_step_and_final_metrics_are_the_newest():
    history = [
        {"loss": float(step), "step": step, "epoch": 0.1, "rewards/margins": 2.0 * step} for step in range(1, 98)
    ]
    history += [{"eval_loss": 3.0, "eval_runtime": 1.0, "step": 50}, {"eval_loss": 2.0, "step": 97}]
    header, rows = training_curve(history)
    assert header == ["step", "loss", "rewards/margins"] and len(rows) == 10
    assert rows[0] == ["1", "1", "2"] and rows[-1] == ["97", "97", "194"]
    assert final_metrics(history) == {"eval_loss": "2"}
    assert training_curve([]) == ([], []) and training_curve(history[:1])[1] == [["1", "1", "2"]]


def test_the_origin_of_data_is_an_id_a_name_or_unknown(pairs, tmp_path):
    from datasets import load_dataset

    pairs.select_columns("prompt").to_json(tmp_path / "rows.jsonl")
    local = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path))
    assert origin_of(local) == origin_of(local.select([0])) == {"name": "local files (json)"}
    assert origin_of(pairs) == origin_of(None) == {}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_card_passes_huggingface_hub_s_own_validation(kind, hub_server, base, pairs, config):
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.register_to_config(_name_or_path="org/base")
    args = config(max_steps=1)
    trainer = MaPOTrainer(pipeline, args, pairs, peft_config=lora() if kind == "lora" else None)
    saved(trainer)
    trainer.create_model_card(dataset_name="user/pairs")
    card = ModelCard.load(Path(args.output_dir) / "README.md")
    card.validate()
    assert "POST api/validate-yaml" in hub_server.requests
    assert card.data.base_model == "org/base" and card.data.datasets == "user/pairs"
    assert card.data.to_dict()["base_model_relation"] == ("adapter" if kind == "lora" else "finetune")
    card.data.license = "what I like"
    with pytest.raises(ValueError, match="license"):
        card.validate()

"""Values of options that depend on the model: where they are from, how a trainer takes them, and their page."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tiny
from helpers.pipelines import build_tiny_pipeline

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer
from trl_diffusion_pref.families import family_named, supported_pipelines
from trl_diffusion_pref.training.recommended import (
    OTHER,
    OTHER_AUDIO,
    OTHER_FLOW,
    fill_in,
    hyperparameters_page,
    published,
)


ROOT = Path(__file__).parents[2]


ALGORITHMS = ("MaPO", "Diffusion-DPO", "Self-NPO")
# beta and learning rate
FLOW_DPO_IMAGES, FLOW_DPO_VIDEO, TANGO_2, RELEASED_DPO = (100, 1e-5), (500, 5e-6), (2000, 9.6e-7), (5000, 2e-5)


@pytest.fixture
def options(tmp_path):
    """Options for one short step, without those that depend on the model."""

    def make(**changed) -> dict:
        defaults = {
            "output_dir": str(tmp_path / "output"),
            "per_device_train_batch_size": 2,
            "max_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "activation_checkpointing": False,
            "use_cpu": True,
            "dataset_cache_dir": str(tmp_path / "cache"),
        }
        return {**defaults, **changed}

    return make


def outside(**attributes):
    """A family that the package does not have, without published values."""
    base = type(family_named("StableDiffusionPipeline"))
    return type("Outside", (base,), {"recommended": {}, **attributes})()


class TestTable:
    @pytest.mark.parametrize(
        ("pipeline", "expected", "source"),
        [
            ("StableDiffusionPipeline", RELEASED_DPO, "released code"),
            ("StableDiffusionXLPipeline", RELEASED_DPO, "released code"),
            ("StableDiffusion3Pipeline", FLOW_DPO_IMAGES, "flow_grpo's code for SD 3.5 medium"),
            ("WanPipeline", FLOW_DPO_VIDEO, "2501.13918, Table 10"),
            ("FluxPipeline", FLOW_DPO_IMAGES, "no published values; those of Stable Diffusion 3.5"),
            ("SanaPipeline", FLOW_DPO_IMAGES, "no published values; those of Stable Diffusion 3.5"),
            ("QwenImagePipeline", FLOW_DPO_IMAGES, "no published values; those of Stable Diffusion 3.5"),
            ("ChromaPipeline", FLOW_DPO_IMAGES, "no published values; those of Stable Diffusion 3.5"),
            ("AuraFlowPipeline", FLOW_DPO_IMAGES, "no published values; those of Stable Diffusion 3.5"),
            ("Lumina2Pipeline", FLOW_DPO_IMAGES, "no published values; those of Stable Diffusion 3.5"),
            ("ZImagePipeline", FLOW_DPO_IMAGES, "no published values; those of Stable Diffusion 3.5"),
            ("LTXPipeline", FLOW_DPO_IMAGES, "no published values; those of Stable Diffusion 3.5"),
            ("HunyuanVideoPipeline", FLOW_DPO_IMAGES, "no published values; those of Stable Diffusion 3.5"),
            ("HunyuanVideo15Pipeline", FLOW_DPO_IMAGES, "no published values; those of Stable Diffusion 3.5"),
            ("PixArtSigmaPipeline", RELEASED_DPO, "no published values; those of Stable Diffusion 1.5"),
            ("CogVideoXPipeline", RELEASED_DPO, "no published values; those of Stable Diffusion 1.5"),
            ("AceStepPipeline", TANGO_2, "no published values; those of Tango 2"),
            ("AudioLDM2Pipeline", TANGO_2, "no published values; those of Tango 2"),
            ("StableAudioPipeline", TANGO_2, "no published values; those of Tango 2"),
        ],
    )
    def test_diffusion_dpo(self, pipeline, expected, source):
        entry = published("Diffusion-DPO", family_named(pipeline))
        assert (entry.values["beta"], entry.values["learning_rate"]) == expected
        assert source in entry.source

    @pytest.mark.parametrize("pipeline", supported_pipelines())
    def test_mapo_was_published_for_sdxl_alone(self, pipeline):
        entry = published("MaPO", family_named(pipeline))
        assert entry.values == {"learning_rate": 1e-5}
        if pipeline == "StableDiffusionXLPipeline":
            assert "README" in entry.source
        else:
            assert entry.source == "no published values; those of SDXL"

    @pytest.mark.parametrize("pipeline", supported_pipelines())
    def test_self_npo_was_published_for_stable_diffusion_alone(self, pipeline):
        entry = published("Self-NPO", family_named(pipeline))
        sdxl = pipeline == "StableDiffusionXLPipeline"
        assert entry.values == {
            "learning_rate": 1e-7 if sdxl else 1e-6,
            "weight_decay": 0.0 if sdxl else 1e-3,
            "guidance_scale": -4.0 if sdxl else 0.0,
        }
        if pipeline in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
            assert "released Self-NPO code" in entry.source
        else:
            assert entry.source == "no published values; those of Stable Diffusion 1.5"

    @pytest.mark.parametrize(
        ("flow", "modality", "expected", "source"),
        [
            (False, "image", RELEASED_DPO, "Stable Diffusion 1.5"),
            (True, "video", FLOW_DPO_IMAGES, "Stable Diffusion 3.5"),
            (True, "audio", TANGO_2, "Tango 2"),
        ],
    )
    def test_a_family_from_outside_takes_the_nearest_model_s_values(self, flow, modality, expected, source):
        entry = published("Diffusion-DPO", outside(flow=flow, modality=modality))
        assert (entry.values["beta"], entry.values["learning_rate"]) == expected
        assert entry.source.startswith(f"no published values; those of {source}")

    @pytest.mark.parametrize(
        ("algorithm", "flow", "of"),
        [
            ("MaPO", False, "StableDiffusionXLPipeline"),
            ("Diffusion-DPO", False, "StableDiffusionPipeline"),
            ("Diffusion-DPO", True, "StableDiffusion3Pipeline"),
            ("Self-NPO", False, "StableDiffusionPipeline"),
            ("Diffusion-KTO", False, "StableDiffusionPipeline"),
            ("Flow-RWR", True, "WanPipeline"),
        ],
    )
    def test_fallbacks_are_the_values_of_the_model_that_they_name(self, algorithm, flow, of):
        assert published(algorithm, outside(), flow=flow).values == family_named(of).recommended[algorithm].values

    def test_an_algorithm_without_a_table_gets_a_learning_rate(self):
        options = SimpleNamespace(learning_rate=None, weight_decay=0.0)
        fill_in(options, "MyMethod", family_named("StableDiffusionPipeline"), flow=False)
        assert (options.learning_rate, options.weight_decay) == (1e-5, 0.0)

    def test_pipelines_that_are_registered_from_outside_go_by_their_process(self):
        assert published("Diffusion-DPO", outside()).values["beta"] == 5000
        assert published("Diffusion-DPO", outside(), flow=True).values["beta"] == 100
        stable_diffusion = family_named("StableDiffusionPipeline")
        assert published("Diffusion-DPO", stable_diffusion, flow=True).values["beta"] == 5000
        assert published("MyMethod", stable_diffusion).values == {}


class TestPage:
    def test_it_is_what_the_table_says(self):
        page = (ROOT / "docs" / "hyperparameters.md").read_text(encoding="utf-8")
        assert page == hyperparameters_page(), "docs/hyperparameters.md is not up to date: run `make docs`"

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_every_supported_pipeline_has_a_row_for_every_algorithm(self, algorithm):
        section = hyperparameters_page().split(f"## {algorithm}\n")[1].split("\n## ")[0]
        rows = [line.strip("| ").split(" | ") for line in section.splitlines()[3:] if line.startswith("| ")]
        assert {name.strip("`") for name, *_ in rows} == {*supported_pipelines(), OTHER, OTHER_FLOW, OTHER_AUDIO}
        for name in supported_pipelines():
            assert section.count(f"| `{name}` |") == 1, name
        assert all(len(row) == len(rows[0]) and row[-1] for row in rows)

    def test_numbers_are_written_as_in_the_sources(self):
        assert "| `WanPipeline` | 500 | 5e-6 |" in hyperparameters_page()
        assert "| `StableDiffusionXLPipeline` | 1e-7 | 0 | -4 |" in hyperparameters_page()


class TestTrainers:
    def test_configs_leave_open_what_depends_on_the_model(self, options):
        dpo, mapo = DiffusionDPOConfig(**options()), MaPOConfig(**options())
        assert (dpo.beta, dpo.learning_rate, mapo.learning_rate) == (None, None, None)
        assert mapo.beta == 0.1

    @pytest.mark.parametrize(
        ("build", "beta", "learning_rate"),
        [(build_tiny_pipeline, 5000, 2e-5), (lambda: tiny.build("stable_diffusion_3"), 100, 1e-5)],
        ids=["stable_diffusion", "stable_diffusion_3"],
    )
    def test_dpo_takes_the_model_s_values(self, build, beta, learning_rate, options, pairs):
        cfg = DiffusionDPOConfig(**options())
        trainer = DiffusionDPOTrainer(build(), cfg, pairs)
        assert (trainer.args.beta, trainer.args.learning_rate) == (beta, learning_rate)
        assert (cfg.beta, cfg.learning_rate) == (None, None), "the caller's options were changed"
        trainer.train()
        assert trainer.optimizer.param_groups[0]["lr"] == learning_rate
        trainer.create_model_card()
        card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
        rows = [line.replace(" ", "").replace("`", "") for line in card.splitlines()]
        assert f"|beta|{float(beta)}|" in rows
        assert f"|learning_rate|{learning_rate}|" in rows

    def test_mapo_takes_the_model_s_values(self, options, pairs):
        trainer = MaPOTrainer(tiny.build("stable_diffusion_3"), MaPOConfig(**options()), pairs)
        assert trainer.args.learning_rate == 1e-5

    def test_what_was_given_stays(self, options, pairs):
        cfg = DiffusionDPOConfig(**options(beta=7.0, learning_rate=0.0))
        args = DiffusionDPOTrainer(tiny.build("stable_diffusion_3"), cfg, pairs).args
        # 0 is a value of its own, not a gap to fill.
        assert (args.beta, args.learning_rate) == (7.0, 0.0)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"beta": 0.0}, "beta=0.0: it must be positive"),
            ({"beta": -1.0}, "beta=-1.0: it must be positive"),
            ({"loss_type": "orpo"}, "loss_type='orpo' is none of"),
            ({"label_smoothing": 0.5}, "label_smoothing=0.5 is outside"),
            ({"dmpo_alpha": 1.0}, "dmpo_alpha=1.0 is outside"),
            ({"margin_clip": 0.0}, "margin_clip=0.0"),
        ],
    )
    def test_bad_values_are_refused_at_once_with_and_without_a_beta(self, changed, message, options):
        with pytest.raises(ValueError, match=message):
            DiffusionDPOConfig(**options(**changed))
        if "beta" not in changed:
            with pytest.raises(ValueError, match=message):
                DiffusionDPOConfig(**options(beta=5.0, **changed))

    def test_the_trainer_checks_again_once_it_knows_beta(self, options, pairs):
        cfg = DiffusionDPOConfig(**options())
        cfg.beta = -1.0
        with pytest.raises(ValueError, match="beta=-1.0: it must be positive"):
            DiffusionDPOTrainer(build_tiny_pipeline(), cfg, pairs)


def test_dspo_s_beta_is_its_own_and_not_the_model_s():
    assert DiffusionDPOConfig(output_dir="x", loss_type="dspo").beta == 0.001
    assert DiffusionDPOConfig(output_dir="x", loss_type="dspo", beta=0.01).beta == 0.01
    assert DiffusionDPOConfig(output_dir="x", loss_type="dspo_sdxl").beta is None

import gc
import math
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, DivergenceError, MaPOTrainer
from trl_diffusion_pref.algorithms.diffusion_dpo.loss import (
    DiffusionDPOOptions,
    diffusion_dpo_logits,
    diffusion_dpo_loss,
)
from trl_diffusion_pref.data import Mode, corrupt
from trl_diffusion_pref.shapes import preference_pairs
from trl_diffusion_pref.training.references import AdapterOff, FrozenAdapter, FrozenModel


OTHER_LOSSES = ["hinge", "ipo", "dmpo", "irepo", "dspo_sdxl"]


@pytest.fixture
def dpo(tmp_path):
    """Makes configs for short DPO runs."""

    def make(**options) -> DiffusionDPOConfig:
        defaults = {
            "output_dir": str(tmp_path / "output"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-4,
            "beta": 200.0,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "activation_checkpointing": False,
            "divergence_guard": "off",
            "dataset_cache_dir": str(tmp_path / "cache"),
        }
        return DiffusionDPOConfig(**{**defaults, **options})

    return make


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian", **options})


@pytest.fixture(scope="module")
def trained_lora(tmp_path_factory, pairs) -> Path:
    """A folder with a LoRA that MaPO trained."""
    from trl_diffusion_pref import MaPOConfig

    folder = tmp_path_factory.mktemp("lora")
    cfg = MaPOConfig(
        output_dir=str(folder), max_steps=3, learning_rate=1e-2, save_strategy="no", activation_checkpointing=False
    )
    trainer = MaPOTrainer(build_tiny_pipeline(), cfg, pairs, peft_config=lora(lora_dropout=0.2))
    trainer.train()
    trainer.save_model()
    return folder


def pipeline_with(trained_lora: Path) -> StableDiffusionPipeline:
    pipeline = build_tiny_pipeline()
    pipeline.load_lora_weights(trained_lora)
    return pipeline


def start(kind: str, cfg, pairs, trained_lora, eval_dataset=None) -> DiffusionDPOTrainer:
    """A trainer with one of the kinds of reference."""
    pipeline = pipeline_with(trained_lora) if "frozen" in kind else build_tiny_pipeline()
    peft_config = lora(lora_dropout=0.2) if kind.startswith("lora") else None
    cfg.reference = "precomputed" if "precomputed" in kind else "auto"
    ref_model = build_tiny_pipeline() if kind.startswith("ref_model") else None
    return DiffusionDPOTrainer(pipeline, cfg, pairs, eval_dataset, ref_model=ref_model, peft_config=peft_config)


def reference(trainer: DiffusionDPOTrainer, noisy) -> torch.Tensor:
    """The reference's predictions."""
    with trainer.reference.live.applied() as module:
        return trainer.denoise(module, noisy)


KINDS = ("full", "lora", "frozen", "ref_model")
KINDS += tuple(f"{kind} precomputed" for kind in KINDS)


class TestStart:
    @pytest.mark.parametrize(
        ("kind", "bf16"),
        [
            *((kind, False) for kind in KINDS),
            ("lora", True),
            *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in KINDS if kind != "lora"),
        ],
    )
    def test_the_loss_is_ln_2_and_the_margin_exactly_0(self, kind, bf16, dpo, pairs, trained_lora):
        cfg = dpo(max_steps=1, bf16=bf16, use_cpu=True, beta=5000.0)
        trainer = start(kind, cfg, pairs, trained_lora, pairs.select(range(6)))
        trainer.train()
        first = trainer.state.log_history[0]
        assert first["rewards/margins"] == 0.0
        assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert first["mse/chosen"] == first["mse/ref_chosen"]

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [("full", FrozenModel), ("lora", AdapterOff), ("frozen", FrozenAdapter), ("ref_model", FrozenModel)],
    )
    def test_auto_chooses_the_reference_that_costs_least(self, kind, expected, dpo, pairs, trained_lora):
        assert type(start(kind, dpo(), pairs, trained_lora).reference.live) is expected

    def test_a_peft_model_as_denoiser_goes_on_training_its_adapter(self, dpo, pairs):
        pipeline = build_tiny_pipeline()
        pipeline.unet = get_peft_model(pipeline.unet, lora(target_modules=["to_q"]))
        trainer = DiffusionDPOTrainer(pipeline, dpo(), pairs)
        assert isinstance(trainer.model, PeftModel) and type(trainer.reference.live) is FrozenAdapter
        assert isinstance(pipeline.unet, UNet2DConditionModel)
        trainer.train()


class TestTraining:
    @pytest.mark.parametrize("kind", ["full", "lora", "frozen"])
    def test_the_reference_stays_what_it_was(self, kind, dpo, pairs, trained_lora):
        trainer = start(kind, dpo(max_steps=4, learning_rate=1e-3), pairs, trained_lora)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        noisy = corrupt(inputs, Mode(False, [(0, 0, 0, 0, i) for i in range(4)]), trainer.noise_process)
        before, policy_before = reference(trainer, noisy), trainer.denoise(trainer.model, noisy).detach()
        trainer.train()
        policy_after = trainer.denoise(trainer.model, noisy).detach()
        assert torch.equal(reference(trainer, noisy), before)
        assert (policy_after - policy_before).abs().max() > 1e-4

    def test_the_trained_adapter_starts_where_it_was_left(self, dpo, pairs, trained_lora):
        pipeline = pipeline_with(trained_lora)
        x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 16, 32)
        with torch.no_grad():
            before = pipeline.unet.eval()(x, t, c).sample
            base = build_tiny_pipeline().unet.eval()(x, t, c).sample
            trainer = DiffusionDPOTrainer(pipeline, dpo(), pairs)
            after = trainer.model.eval()(x, t, c).sample
        assert (before - base).abs().max() > 1e-4
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)

    def test_frozen_and_trained_adapters_are_told_apart_when_saved(self, dpo, pairs, trained_lora):
        trainer = start("frozen", dpo(learning_rate=1e-2), pairs, trained_lora)
        trainer.train()
        trainer.save_model()
        folder = Path(trainer.args.output_dir)
        assert not (folder / "reference").exists()
        x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 16, 32)
        fresh = build_tiny_pipeline()
        fresh.load_lora_weights(folder)
        with torch.no_grad():
            torch.testing.assert_close(
                fresh.unet.eval()(x, t, c).sample, trainer.model.eval()(x, t, c).sample, rtol=0, atol=1e-5
            )

    @pytest.mark.parametrize(
        "loss_type",
        # Their values and gradients are tested besides; all of them train in `make test-all`.
        ["sigmoid", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dspo", *OTHER_LOSSES))],
    )
    def test_every_loss_lowers_the_chosen_error_against_the_rejected(self, loss_type, dpo, pairs):
        """On the training pairs, at noise and times that evaluation fixes."""
        cfg = dpo(
            loss_type=loss_type,
            beta=0.05 if loss_type == "dspo" else 50.0,
            max_steps=60,
            learning_rate=1e-3,
            prompt_dropout=0.0,
            per_device_train_batch_size=16,
            logging_steps=60,
            eval_draws=0,
        )
        trainer = DiffusionDPOTrainer(build_tiny_pipeline(), cfg, pairs, pairs)
        trainer.train()
        metrics = trainer.evaluate()
        if loss_type == "dspo":  # a pull on the chosen image alone
            assert metrics["eval_mse/chosen"] < metrics["eval_mse/ref_chosen"]
        else:
            assert metrics["eval_rewards/margins"] > 0.05

    def test_the_options_compose_as_the_formulas_say(self, dpo, pairs):
        """One batch, worked out by hand from the logged errors' own tensors."""
        cfg = dpo(sft_weight=0.5, margin_clip=0.01, label_smoothing=0.1, winner_preserving_mu=0.5, beta=300.0)
        trainer = DiffusionDPOTrainer(build_tiny_pipeline(), cfg, pairs)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        values = trainer.compute_losses(trainer.model, inputs, trainer.modes.training(inputs.rows, 0))
        errors = [values[f"mse/{name}"] for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
        logits = diffusion_dpo_logits(*errors, beta=300.0, margin_clip=0.01)
        options = DiffusionDPOOptions("sigmoid", 300.0, 0.1, 0.01, 0.01)
        expected = diffusion_dpo_loss(logits, options) + 0.5 * errors[0]
        torch.testing.assert_close(values["loss"], expected)
        rewards = -150 * (errors[0] - errors[2]), -150 * (errors[1] - errors[3])
        torch.testing.assert_close(values["rewards/margins"], rewards[0] - rewards[1])

    def test_soft_labels_come_from_their_column(self, dpo, pairs):
        labels = [0.1 + 0.05 * row for row in range(16)]
        cfg = dpo(loss_type="irepo", max_steps=1, per_device_train_batch_size=16)
        trainer = DiffusionDPOTrainer(build_tiny_pipeline(), cfg, pairs.add_column("soft_label", labels))
        trainer.train()
        expected = torch.logit(torch.tensor(labels)).square().mean().item()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
        constant = DiffusionDPOTrainer(
            build_tiny_pipeline(), dpo(loss_type="irepo", soft_label=0.8, max_steps=1), pairs
        )
        constant.train()
        assert constant.state.log_history[0]["loss"] == pytest.approx(math.log(4) ** 2, rel=1e-5)

    def test_soft_labels_of_a_stream_without_declared_columns_are_found(self, dpo, pairs):
        rows = [{**row, "soft_label": 0.5} for row in pairs]
        stream = IterableDataset.from_generator(lambda: iter(rows))
        trainer = DiffusionDPOTrainer(build_tiny_pipeline(), dpo(loss_type="irepo", max_steps=1), stream)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(0.0, abs=1e-6)

    def test_a_half_precision_reference_serves_a_full_precision_policy(self, dpo, pairs):
        ref_model = build_tiny_pipeline().unet.to(torch.bfloat16)
        trainer = DiffusionDPOTrainer(build_tiny_pipeline(), dpo(max_steps=1), pairs, ref_model=ref_model)
        trainer.train()
        assert abs(trainer.state.log_history[0]["mse/chosen"] - trainer.state.log_history[0]["mse/ref_chosen"]) < 0.02

    def test_trainers_follow_one_another_on_one_pipeline(self, dpo, pairs):
        pipeline = build_tiny_pipeline()
        DiffusionDPOTrainer(pipeline, dpo(), pairs, peft_config=lora()).train()
        for _ in range(2):
            trainer = DiffusionDPOTrainer(pipeline, dpo(), pairs)
            trainer.train()
            assert trainer.state.log_history[0]["rewards/margins"] == 0.0

    @pytest.mark.parametrize("reference", ["auto", "precomputed"])
    def test_evaluation_does_not_change_training(self, reference, dpo, pairs):
        weights = []
        for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
            cfg = dpo(max_steps=5, reference=reference, **evaluation)
            trainer = DiffusionDPOTrainer(build_tiny_pipeline(), cfg, pairs, pairs.select(range(6)))
            trainer.train()
            weights.append(weights_of(trainer.model))
        assert_equal_weights(*weights)

    def test_prompts_are_dropped_in_training_and_never_in_evaluation(self, dpo, pairs):
        trainer = DiffusionDPOTrainer(build_tiny_pipeline(), dpo(prompt_dropout=0.9), pairs, pairs.select(range(4)))
        first, second = trainer.evaluate()["eval_mse/chosen"], None
        trainer.args.prompt_dropout = 0.0
        second = trainer.evaluate()["eval_mse/chosen"]
        assert first == second


class TestPrecomputed:
    @pytest.mark.parametrize("kind", ["full", "lora", "frozen"])
    def test_precomputed_and_live_references_give_the_same_loss_for_the_same_draw(
        self, kind, dpo, pairs, trained_lora
    ):
        live = start(kind, dpo(), pairs, trained_lora)
        fixed = start(f"{kind} precomputed", dpo(), pairs, trained_lora)
        for trainer in (live, fixed):  # the same policy, away from the reference
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    if parameter.requires_grad:
                        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        inputs = fixed._prepare_inputs(next(iter(fixed.get_train_dataloader())))
        mode = fixed.modes.training(inputs.rows, 0)
        stored = fixed.reference.at_stored_draws(inputs, mode)
        values = [
            trainer.compute_losses(trainer.model.train(), inputs, at)
            for trainer, at in ((live, stored), (fixed, mode))
        ]
        torch.testing.assert_close(values[0]["loss"], values[1]["loss"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(values[0]["mse/ref_chosen"], values[1]["mse/ref_chosen"], rtol=1e-6, atol=1e-7)
        assert values[0]["rewards/margins"].abs().max() > 0.01

    def test_a_new_lora_s_reference_is_the_base_wherever_the_lora_starts(self, dpo, pairs):
        evaluations = []
        for reference in ("auto", "precomputed"):
            cfg = dpo(reference=reference, eval_draws=0)
            args = (build_tiny_pipeline(), cfg, pairs, pairs.select(range(4)))
            trainer = DiffusionDPOTrainer(*args, peft_config=lora(init_lora_weights=False))
            evaluations.append(trainer.evaluate())
        live, fixed = (values["eval_mse/ref_chosen"] for values in evaluations)
        assert fixed == pytest.approx(live, rel=1e-6)
        assert evaluations[0]["eval_mse/chosen"] != pytest.approx(live, rel=1e-3)

    @pytest.mark.parametrize(
        "kind", ["full", "lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("frozen", "ref_model"))]
    )
    def test_no_second_model_is_in_memory_and_no_reference_is_called(self, kind, dpo, pairs, trained_lora):
        gc.collect()
        before = sum(isinstance(thing, UNet2DConditionModel) for thing in gc.get_objects())
        trainer = start(f"{kind} precomputed", dpo(), pairs, trained_lora)
        gc.collect()
        assert sum(isinstance(thing, UNet2DConditionModel) for thing in gc.get_objects()) == before + 1
        calls = []
        trainer.pipeline.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
        trainer.train()
        assert trainer.reference.live is None
        adapters = {
            name.split(".lora_A.")[1].split(".")[0] for name in weights_of(trainer.model) if ".lora_A." in name
        }
        assert len(adapters) == (kind in ("lora", "frozen"))
        assert calls == [8] * 3  # one forward of both images of four pairs a step

    def test_training_draws_among_all_fixed_draws(self, dpo, pairs):
        trainer = start("full precomputed", dpo(reference="precomputed", reference_draws=3), pairs, None)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        modes = [trainer.modes.training(inputs.rows, step) for step in range(20)]
        drawn = {key[3] for mode in modes for key in trainer.reference.at_stored_draws(inputs, mode).keys}
        assert drawn == {0, 1, 2}
        assert trainer.reference.precomputed.tables["train"].shape == (16, 3, 2)

    def test_errors_made_from_something_else_are_refused_with_what_differs(self, dpo, pairs, tmp_path):
        own = {"reference": "precomputed", "reference_errors_dir": str(tmp_path / "errors")}
        DiffusionDPOTrainer(build_tiny_pipeline(), dpo(**own), pairs)
        DiffusionDPOTrainer(build_tiny_pipeline(), dpo(**own), pairs)
        cases = [
            (build_tiny_pipeline(seed=1), pairs, {}, "weights"),
            (build_tiny_pipeline(), preference_pairs(16, seed=8), {}, "data"),
            (build_tiny_pipeline("v_prediction"), pairs, {}, "noise process"),
            (
                build_tiny_pipeline(),
                pairs,
                {"resolution": 32},
                r"resolution: made with \[3, 16, 16\], this run has \[3, 32, 32\]",
            ),
            (build_tiny_pipeline(), pairs, {"seed": 1}, "seed: made with 42, this run has 1"),
            (build_tiny_pipeline(), pairs, {"reference_draws": 2}, "draws: made with 8, this run has 2"),
        ]
        for pipeline, dataset, options, message in cases:
            with pytest.raises(ValueError, match=f"(?s)made from something else.*{message}"):
                DiffusionDPOTrainer(pipeline, dpo(**own, **options), dataset)

    def test_data_sets_of_any_name_have_files_of_their_own(self, dpo, pairs, tmp_path):
        own = {"reference": "precomputed", "reference_errors_dir": str(tmp_path / "errors")}
        names = ["a b", "a-b", "a/b", "../b", ""]
        DiffusionDPOTrainer(build_tiny_pipeline(), dpo(**own), pairs, dict.fromkeys(names, pairs))
        assert len(list((tmp_path / "errors").iterdir())) == len(names) + 1
        assert not (tmp_path / "b").exists()

    def test_a_stream_or_a_new_evaluation_set_is_refused(self, dpo, pairs):
        with pytest.raises(ValueError, match="streamed"):
            start("full precomputed", dpo(), pairs.to_iterable_dataset(), None)
        with pytest.raises(ValueError, match="eval_dataset is streamed"):
            start("full precomputed", dpo(eval_draws=0), pairs, None, pairs.to_iterable_dataset())
        trainer = start("full precomputed", dpo(), pairs, None, pairs.select(range(4)))
        trainer.evaluate()
        with pytest.raises(ValueError, match="no reference to evaluate a new data set"):
            trainer.evaluate(preference_pairs(4, seed=99))

    def test_every_row_is_computed_also_where_training_drops_the_last_batch(self, dpo, pairs):
        trainer = start(
            "full precomputed", dpo(dataloader_drop_last=True), pairs.select(range(10)), None, pairs.select([0])
        )
        assert len(trainer.reference.precomputed.tables["train"]) == 10
        trainer.train()


class TestResume:
    @pytest.mark.parametrize(
        "kind",
        [
            *("lora", "full precomputed", "full moving"),
            *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("full", "frozen", "frozen moving")),
        ],
    )
    def test_resuming_equals_never_having_stopped(self, kind, dpo, pairs, trained_lora, tmp_path):
        moving = {"sync_ref_model": True, "ref_model_sync_steps": 2} if "moving" in kind else {}
        base = kind.removesuffix(" moving")
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3, **moving}
        whole = start(base, dpo(output_dir=str(tmp_path / "whole"), **options), pairs, trained_lora)
        whole.train()
        resumed = start(base, dpo(output_dir=str(tmp_path / "resumed"), **options), pairs, trained_lora)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
        assert_equal_weights(weights_of(whole.model), weights_of(resumed.model))
        losses = [{e["step"]: e["loss"] for e in t.state.log_history if "loss" in e} for t in (whole, resumed)]
        assert losses[0] == losses[1]

    def test_a_moving_reference_follows_the_formula(self, dpo, pairs, tmp_path):
        cfg = dpo(
            max_steps=2,
            sync_ref_model=True,
            ref_model_sync_steps=2,
            ref_model_mixup_alpha=0.25,
            save_strategy="steps",
            save_steps=2,
            learning_rate=1e-2,
        )
        trainer = DiffusionDPOTrainer(build_tiny_pipeline(), cfg, pairs)
        trainer.train()
        base, policy = weights_of(build_tiny_pipeline().unet), weights_of(trainer.model)
        saved = load_file(Path(cfg.output_dir) / "checkpoint-2" / "reference.safetensors")
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor, 0.75 * base[name] + 0.25 * policy[name], rtol=1e-5, atol=1e-6)


class TestGuard:
    def test_a_wrecked_run_stops_with_a_checkpoint_and_advice(self, dpo, pairs):
        cfg = dpo(divergence_guard="stop", learning_rate=0.05, max_steps=50, divergence_window=2)
        trainer = DiffusionDPOTrainer(build_tiny_pipeline(), cfg, pairs)
        with pytest.raises(DivergenceError, match="checkpoint-[0-9]+.*learning_rate") as error:
            trainer.train()
        step = trainer.state.global_step
        assert step < 20 and f"checkpoint-{step}" in str(error.value)
        UNet2DConditionModel.from_pretrained(Path(cfg.output_dir) / f"checkpoint-{step}" / "unet")

    def test_it_is_on_by_default_and_can_warn_or_be_off(self, dpo, pairs, tmp_path):
        assert DiffusionDPOConfig(output_dir=str(tmp_path)).divergence_guard == "stop"
        for action, window in (("warn", 2), ("off", 5)):
            cfg = dpo(divergence_guard=action, learning_rate=0.05, max_steps=6, divergence_window=window)
            trainer = DiffusionDPOTrainer(build_tiny_pipeline(), cfg, pairs)
            trainer.train()
            assert trainer.state.global_step == 6


class TestRefusals:
    def test_references_that_cannot_be(self, dpo, pairs):
        pipeline = build_tiny_pipeline()
        with pytest.raises(ValueError, match="the very model that is trained"):
            DiffusionDPOTrainer(pipeline, dpo(), pairs, ref_model=pipeline)
        other = UNet2DConditionModel.from_config({**pipeline.unet.config, "layers_per_block": 2})
        with pytest.raises(ValueError, match="another architecture.*parameters differ"):
            DiffusionDPOTrainer(build_tiny_pipeline(), dpo(), pairs, ref_model=other)
        with pytest.raises(ValueError, match="needs a LoRA"):
            DiffusionDPOTrainer(build_tiny_pipeline(), dpo(reference="adapter_off"), pairs)
        with pytest.raises(ValueError, match="Leave one out"):
            DiffusionDPOTrainer(build_tiny_pipeline(), dpo(reference="copy"), pairs, ref_model=build_tiny_pipeline())
        with pytest.raises(ValueError, match="sync_ref_model"):
            DiffusionDPOTrainer(build_tiny_pipeline(), dpo(sync_ref_model=True), pairs, peft_config=lora())
        with pytest.raises(ValueError, match="a LoRA has others"):
            options = {"ref_model": build_tiny_pipeline(), "peft_config": lora()}
            DiffusionDPOTrainer(build_tiny_pipeline(), dpo(sync_ref_model=True), pairs, **options)

    def test_soft_labels_outside_their_range_are_named_by_row(self, dpo, pairs):
        for labels, message in (
            ([0.5] * 14 + [1.0, 0.0], r"'soft_label' is 0 or 1 in 2 pairs, the first \[14, 15\].*Clip the column"),
            ([0.5] * 15 + [1.5], r"row 15, column 'soft_label': is 1.5, not in \[0, 1\]"),
        ):
            data = pairs.add_column("soft_label", labels)
            with pytest.raises(ValueError, match=message):
                DiffusionDPOTrainer(build_tiny_pipeline(), dpo(loss_type="irepo"), data)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"beta": 0.0}, "must be positive"),
            ({"loss_type": "kto"}, "sigmoid, hinge, ipo, dmpo, irepo, dspo"),
            ({"reference": "ema"}, "auto, adapter_off"),
            ({"soft_label": 1.0}, "soft_label"),
            ({"winner_preserving_mu": 1.5}, "winner_preserving_mu"),
            ({"sft_weight": -1.0}, "sft_weight"),
            ({"reference_draws": 0}, "reference_draws"),
            ({"divergence_margin": 0.0}, "divergence_margin"),
            ({"divergence_guard": "on"}, "stop, warn, off"),
            ({"ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha"),
            ({"reference": "precomputed", "loss_type": "dspo"}, "predictions"),
            ({"reference": "precomputed", "sync_ref_model": True}, "sync_ref_model"),
            ({"reference_errors_dir": "x"}, "precomputed"),
            ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing"),
        ],
    )
    def test_options_out_of_range_or_in_contradiction(self, options, message, dpo):
        with pytest.raises(ValueError, match=message):
            dpo(**options)

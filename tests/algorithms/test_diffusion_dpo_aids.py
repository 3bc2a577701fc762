"""What is added to the pairwise loss: weights on margins, penalties on predictions, and a beta that follows."""

import math

import numpy as np
import pytest
import torch
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer
from trl_diffusion_pref.algorithms.diffusion_dpo import auto_beta
from trl_diffusion_pref.algorithms.diffusion_dpo.auto_beta import LEAST, MOST, AutomaticBeta
from trl_diffusion_pref.algorithms.diffusion_dpo.loss import (
    diffusion_dpo_logits,
    norm_excess,
    root_mean_square,
    soft_label_beta,
)
from trl_diffusion_pref.data import corrupt
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs


def slope(function, value: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The gradient of a function of an array of float64, by central differences."""
    gradient = np.zeros_like(value)
    for index in np.ndindex(value.shape):
        at = [value.copy(), value.copy()]
        at[0][index] -= step
        at[1][index] += step
        gradient[index] = (function(at[1]) - function(at[0])) / (2 * step)
    return gradient


class TestWeights:
    def test_the_rejected_weight_scales_the_rejected_difference_alone(self):
        errors = np.random.default_rng(0).uniform(0.1, 0.5, (4, 6))
        expected = -20 * ((errors[0] - errors[2]) - 0.3 * (errors[1] - errors[3]))
        chosen, rejected, *ref_errors = torch.tensor(errors, dtype=torch.float32)
        chosen.requires_grad_(), rejected.requires_grad_()
        options = {"beta": 40.0, "margin_clip": None}
        logits = diffusion_dpo_logits(chosen, rejected, *ref_errors, rejected_weight=0.3, **options)
        np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
        logits.sum().backward()
        assert chosen.grad.tolist() == [-20.0] * 6
        torch.testing.assert_close(rejected.grad, torch.full((6,), 6.0))

    def test_a_soft_label_of_a_half_has_no_margin_and_one_below_exchanges_the_pair(self):
        errors = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.4, 0.4, 0.4, 0.4], [0.2] * 4, [0.2] * 4])
        beta = soft_label_beta(torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64), 40.0)
        assert beta.dtype == torch.float32
        # (2p - 1) times -20 ((0.1 - 0.2) - (0.4 - 0.2)) = 6
        logits = diffusion_dpo_logits(*errors, beta=beta, margin_clip=None)
        torch.testing.assert_close(logits, torch.tensor([6.0, 3.0, 0.0, -3.0]))


class TestNorm:
    def test_the_excess_is_a_hinge_at_the_reference_s_norm_with_its_gradient(self):
        rng = np.random.default_rng(1)
        reference = rng.normal(size=(3, 2, 4))
        # The second's is below the reference's, the third's is the reference's.
        prediction = reference * np.array([1.2, 0.9, 1.0])[:, None, None]

        def excess(values: np.ndarray) -> float:
            norms, ref_norms = (np.sqrt((each**2).sum(axis=(1, 2))) for each in (values, reference))
            return np.maximum(0, norms / ref_norms - 1)[:2].sum()

        predicted = torch.tensor(prediction, dtype=torch.float32, requires_grad=True)
        ref_norm = root_mean_square(torch.tensor(reference, dtype=torch.float32))
        found = norm_excess(root_mean_square(predicted), ref_norm)
        np.testing.assert_allclose(found.detach().numpy(), [0.2, 0.0, 0.0], atol=1e-6)
        found.sum().backward()
        np.testing.assert_allclose(predicted.grad[:2], slope(excess, prediction)[:2], atol=1e-6)
        assert not predicted.grad[1].any()

    def test_half_precision_predictions_have_norms_in_float32(self):
        prediction = torch.full((2, 1000), 3.0, dtype=torch.bfloat16)
        norm = root_mean_square(prediction)
        assert norm.dtype == torch.float32 and norm.tolist() == [3.0, 3.0]


def steps(beta: AutomaticBeta, *margins: torch.Tensor) -> AutomaticBeta:
    """Each tensor is a step's margins, in one micro-batch."""
    for values in margins:
        beta.record(values)
        beta.on_step_end(None, None, None)
    return beta


class TestAutomaticBeta:
    @pytest.mark.parametrize("start", [20.0, 2000.0])
    def test_won_pairs_of_one_margin_have_its_closed_form(self, start):
        """sigmoid(-beta m) = 0.2 where beta = log(4) / m."""
        beta = steps(AutomaticBeta(start, 0.2), torch.zeros(4), torch.full((4,), 0.003))
        assert beta.beta == pytest.approx(math.log(4) / 0.003, rel=1e-3)

    def test_the_mean_factor_of_mixed_pairs_is_the_target(self):
        margins = torch.tensor([0.01, 0.02, 0.03, 0.005, 0.04, 0.015, 0.02, -0.002])
        beta = steps(AutomaticBeta(100.0, 0.2), margins).beta
        assert torch.sigmoid(-beta * margins.double()).mean().item() == pytest.approx(0.2, abs=2e-3)

    def test_where_too_many_are_lost_it_is_twice_that_of_won_ones(self):
        beta = steps(AutomaticBeta(100.0, 0.2), torch.tensor([0.01, -0.01])).beta
        assert beta == pytest.approx(2 * math.log(4) / 0.01, rel=1e-3)

    @pytest.mark.parametrize(("margin", "end"), [(1e-9, MOST), (50.0, LEAST)])
    def test_it_stays_in_its_range(self, margin, end):
        assert steps(AutomaticBeta(100.0, 0.2), torch.full((4,), margin)).beta == end

    def test_until_a_margin_differs_from_0_it_is_the_given_one(self):
        assert steps(AutomaticBeta(123.0, 0.2), torch.zeros(4)).beta == 123.0

    def test_four_micro_batches_of_one_are_one_of_four(self):
        margins, one, four = torch.linspace(0.01, 0.05, 4), AutomaticBeta(9.0, 0.2), AutomaticBeta(9.0, 0.2)
        for margin in margins:
            four.record(margin[None])
            assert four.beta == 9.0
        four.on_step_end(None, None, None)
        assert four.beta == pytest.approx(steps(one, margins).beta, rel=1e-12)

    def test_two_processes_with_two_pairs_each_are_one_with_four(self, monkeypatch):
        margins = torch.tensor([0.01, 0.02, 0.03, -0.001], dtype=torch.float64)
        whole = steps(AutomaticBeta(9.0, 0.2), margins).beta
        other = torch.stack([auto_beta.gradient_factors(each) for each in (margins[2:], margins[2:].abs())])
        monkeypatch.setattr(auto_beta, "gather_object", lambda own: [*own, (2, other.tolist())])
        assert steps(AutomaticBeta(9.0, 0.2), margins[:2]).beta == pytest.approx(whole, rel=1e-12)

    def test_it_follows_margins_that_grow_by_a_tenth_each_step(self):
        """From starts a factor 100 apart, with spread margins of which some are lost."""
        generator, factors = torch.Generator().manual_seed(0), []
        for start in (20.0, 2000.0):
            beta = AutomaticBeta(start, 0.2)
            for step in range(60):
                margins = 1e-3 * 1.1**step * (1 + 0.7 * torch.randn(16, generator=generator))
                factors += [torch.sigmoid(-beta.beta * margins).mean().item()] * (step >= 50)
                steps(beta, margins)
        assert 0.1 < np.mean(factors[:10]) < 0.3 and 0.1 < np.mean(factors[10:]) < 0.3

    def test_its_state_goes_on_where_it_was(self):
        margins = [torch.rand(6, generator=torch.Generator().manual_seed(n)) for n in range(4)]
        whole, resumed = steps(AutomaticBeta(9.0, 0.2), *margins), AutomaticBeta(9.0, 0.2)
        resumed.load_state_dict(steps(AutomaticBeta(9.0, 0.2), *margins[:2]).state_dict())
        assert steps(resumed, *margins[2:]).beta == whole.beta
        whole.reset()
        assert whole.beta == 9.0


@pytest.fixture
def dpo(tmp_path, pairs):
    """Makes trainers of the tiny pipeline on pairs with soft labels."""
    labelled = pairs.add_column("soft_label", [0.5 + row / 32 for row in range(len(pairs))])

    def make(dataset=labelled, pipeline=None, **options) -> DiffusionDPOTrainer:
        defaults = {
            "output_dir": str(tmp_path / "output"),
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "beta": 200.0,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "activation_checkpointing": False,
            "divergence_guard": "off",
            "dataset_cache_dir": str(tmp_path / "cache"),
        }
        return DiffusionDPOTrainer(
            pipeline or build_tiny_pipeline(), DiffusionDPOConfig(**defaults | options), dataset
        )

    return make


def logged(trainer: DiffusionDPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class TestTrainer:
    def test_the_aids_compose_as_the_formulas_say(self, dpo):
        """One batch, from its predictions on in numpy's float64."""
        options = {"rejected_weight": 0.5, "weight_by_soft_label": True, "anchor_weight": 3.0}
        trainer = dpo(**options, norm_hinge_weight=7.0, beta=300.0, sft_weight=0.25)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        mode = trainer.modes.training(batch.rows, 0)
        values = trainer.compute_losses(trainer.model, batch, mode)

        noisy = corrupt(batch, mode, trainer.noise_process)
        predictions = trainer.denoise(trainer.model, noisy), trainer.reference.prediction(noisy)
        p, r, y = (each.detach().double().numpy().reshape(2, 4, -1) for each in (*predictions, noisy.target))
        (l_w, l_l), (r_w, r_l) = (((each - y) ** 2).mean(axis=-1) for each in (p, r))
        labels = np.array([0.5 + row / 32 for row in batch.rows.tolist()])
        u = -150 * ((l_w - r_w) - 0.5 * (l_l - r_l)) * (2 * labels - 1)
        anchor = ((p - r) ** 2).mean(axis=-1).mean(axis=0)
        ratio = np.sqrt((p**2).sum(axis=-1) / (r**2).sum(axis=-1))
        excess = np.maximum(0, ratio - 1).mean(axis=0)
        expected = {
            "loss": np.log1p(np.exp(-u)) + 0.25 * l_w + 3 * anchor + 7 * excess,
            "anchor": anchor,
            "norm_ratio": ratio.mean(axis=0),
            "label_weight": 2 * labels - 1,
        }
        assert excess.max() > 0.01 and anchor.min() > 1e-4
        for name, value in expected.items():
            np.testing.assert_allclose(values[name].detach().numpy(), value, rtol=2e-4, atol=1e-5, err_msg=name)

    @pytest.mark.parametrize("reference", ["auto", "precomputed"])
    def test_the_norms_begin_at_the_reference_s_live_or_precomputed(self, reference, dpo):
        trainer = dpo(reference=reference, norm_hinge_weight=1.0, prompt_dropout=0.5)
        trainer.train()
        ratios = logged(trainer, "norm_ratio")
        assert ratios[0] == 1.0 and logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
        assert all(abs(ratio - 1) > 1e-5 for ratio in ratios[1:])

    def test_soft_labels_that_are_missing_are_refused_before_training(self, dpo, pairs):
        with pytest.raises(ValueError, match="train_dataset lacks the column soft_label"):
            dpo(pairs, weight_by_soft_label=True)

    def test_one_beta_serves_a_step_also_with_accumulation_and_after_resuming(self, dpo, tmp_path):
        options = {"auto_beta": True, "max_steps": 4, "prompt_dropout": 0.0}
        whole = dpo(**options, save_strategy="steps", save_steps=2)
        whole.train()
        betas = logged(whole, "beta")
        assert betas[0] == betas[1] == 200.0 and len(set(betas)) == 3

        folder = {"output_dir": str(tmp_path / "other")}
        parts = dpo(**options, **folder, per_device_train_batch_size=1, gradient_accumulation_steps=4)
        parts.train()
        assert logged(parts, "beta") == pytest.approx(betas, rel=1e-3)

        resumed = dpo(**options, **folder)
        resumed.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-2"))
        assert logged(resumed, "beta")[-2:] == betas[2:]
        assert_equal_weights(weights_of(whole.model), weights_of(resumed.model))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("base", "learning_rate", "starts"), [("mixed", 5e-5, (200, 2e4)), ("flow", 5e-5, (10, 1e3))]
    )
    def test_automatic_beta_holds_the_mean_gradient_factor(self, base, learning_rate, starts, dpo):
        """After 50 steps, from starts a factor 100 apart."""
        for start in starts:
            options = {"beta": float(start), "auto_beta": True, "max_steps": 60, "learning_rate": learning_rate}
            options |= {"per_device_train_batch_size": 16, "prompt_dropout": 0.0, "latent_sampling": "mean"}
            trainer = dpo(preference_pairs(64), load_pipeline(base), **options)
            trainer.train()
            assert np.mean(logged(trainer, "gradient_factor")[50:]) == pytest.approx(0.2, abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rejected_weight": 0.0}, r"rejected_weight=0.0 is outside \(0, 1\]"),
        ({"rejected_weight": 0.5, "loss_type": "dspo"}, "rejected_weight=0.5 does nothing with loss_type='dspo'"),
        ({"weight_by_soft_label": True, "loss_type": "irepo"}, "weight_by_soft_label=True does nothing"),
        ({"soft_label_column": "p"}, "soft_label_column='p' does nothing with loss_type='sigmoid'"),
        ({"auto_beta": True, "loss_type": "hinge"}, "auto_beta=True does nothing with loss_type='hinge'"),
        ({"auto_beta_target": 0.3}, "auto_beta_target=0.3 does nothing with auto_beta=False"),
        ({"auto_beta": True, "auto_beta_target": 0.5}, r"auto_beta_target=0.5 is outside \(0, 0.5\)"),
        ({"anchor_weight": -1.0}, "anchor_weight=-1.0: it must be at least 0"),
        ({"anchor_weight": float("inf")}, "anchor_weight=inf: it must be a finite number"),
        ({"anchor_weight": 1.0, "reference": "precomputed"}, "needs the reference's predictions"),
        ({"norm_hinge_weight": -1.0}, "norm_hinge_weight=-1.0: it must be at least 0"),
        ({"norm_hinge_weight": 1.0, "loss_on_mask": True}, "loss_on_mask=True and norm_hinge_weight"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DiffusionDPOConfig(output_dir=str(tmp_path), **options)

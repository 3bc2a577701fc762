"""The trainers on flow models: Flow-DPO's beta, MaPO's T, Self-NPO's grid and loss, and the times of training."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from helpers import tiny
from helpers.pipelines import build_tiny_pipeline

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    SelfNPOConfig,
    SelfNPOTrainer,
)
from trl_diffusion_pref.algorithms.self_npo.loss import SelfNPOOptions, self_npo_loss
from trl_diffusion_pref.data import Batch, Mode
from trl_diffusion_pref.diffusion.noise import RectifiedFlow
from trl_diffusion_pref.diffusion.randomness import draw_rows
from trl_diffusion_pref.shapes import prompts


@pytest.fixture
def options(tmp_path):
    """Options for short runs."""

    def make(**changed) -> dict:
        defaults = {
            "output_dir": str(tmp_path / "output"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "activation_checkpointing": False,
            "use_cpu": True,
            "dataset_cache_dir": str(tmp_path / "cache"),
        }
        return {**defaults, **changed}

    return make


@pytest.fixture
def dpo(options, pairs):
    """Makes a DPO trainer on a tiny Stable Diffusion 3."""

    def make(pipeline=None, **changed) -> DiffusionDPOTrainer:
        cfg = DiffusionDPOConfig(**options(**{"beta": 200.0, "divergence_guard": "off", "eval_draws": 0, **changed}))
        return DiffusionDPOTrainer(pipeline or tiny.build("stable_diffusion_3"), cfg, pairs)

    return make


def first_batch(trainer) -> tuple[Batch, Mode]:
    """A training batch and its mode, after the weights were moved away from the reference's."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return inputs, trainer.modes.training(inputs.rows, 0)


def shifted(t: torch.Tensor, shift: float) -> torch.Tensor:
    return shift * t / (1 + (shift - 1) * t)


class TestFlowDPO:
    @pytest.mark.parametrize("reference", ["copy", "precomputed"])
    @pytest.mark.parametrize("beta_schedule", ["constant", "flow"])
    def test_training_starts_at_ln_2(self, beta_schedule, reference, dpo):
        trainer = dpo(beta_schedule=beta_schedule, reference=reference)
        trainer.train()
        first, second = trainer.state.log_history[:2]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
        assert second["rewards/margins"] != 0.0

    @pytest.mark.parametrize("reference", ["copy", "precomputed"])
    @pytest.mark.parametrize("beta_schedule", ["constant", "flow"])
    def test_the_loss_is_equation_6_at_the_beta_of_each_pair_s_time(self, beta_schedule, reference, dpo):
        draws = {"reference_draws": 3} if reference == "precomputed" else {}
        trainer = dpo(beta_schedule=beta_schedule, reference=reference, **draws)
        inputs, mode = first_batch(trainer)
        values = trainer.compute_losses(trainer.model, inputs, mode)
        if trainer.reference.is_precomputed:
            mode = trainer.reference.at_stored_draws(inputs, mode)
        drawn = draw_rows(mode.keys, (4, 8, 8), 2, trainer.noise_process, torch.device("cpu"))
        t = drawn.timesteps.double().numpy()
        assert t.min() < 0.7 < t.max()
        beta = 200.0 * (1 - t) ** 2 if beta_schedule == "flow" else np.full(4, 200.0)
        errors = {name: value.detach().double().numpy() for name, value in values.items()}
        rewards = {
            name: -(beta / 2) * (errors[f"mse/{name}"] - errors[f"mse/ref_{name}"]) for name in ("chosen", "rejected")
        }
        margin = rewards["chosen"] - rewards["rejected"]
        assert np.abs(margin).max() > 0.01
        np.testing.assert_allclose(errors["loss"], np.log1p(np.exp(-margin)), rtol=1e-5)
        for name, reward in {**rewards, "margins": margin}.items():
            np.testing.assert_allclose(errors[f"rewards/{name}"], reward, rtol=1e-4, atol=1e-5)

    def test_the_schedule_is_refused_for_other_processes_and_losses(self, dpo, options):
        with pytest.raises(ValueError, match="'flow' is for flow models, and the StableDiffusionPipeline's DDPM"):
            dpo(build_tiny_pipeline(), beta_schedule="flow")
        with pytest.raises(ValueError, match="not defined for loss_type='dspo'"):
            DiffusionDPOConfig(**options(beta_schedule="flow", loss_type="dspo"))
        with pytest.raises(ValueError, match="beta_schedule='linear' is none of constant, flow"):
            DiffusionDPOConfig(**options(beta_schedule="linear"))

    def test_precomputed_errors_serve_every_beta_but_only_their_own_times(self, dpo, tmp_path):
        own = {"reference": "precomputed", "reference_errors_dir": str(tmp_path / "errors"), "reference_draws": 1}
        dpo(**own)
        dpo(**own, beta_schedule="flow", beta=10.0)
        for changed, described in (({"timestep_sampling": "mode"}, "mode shift 3"), ({"timestep_shift": 1.0}, "1 ")):
            with pytest.raises(ValueError, match=f"noise process: made with .*logit_normal shift 3 .*{described}"):
                dpo(**own, **changed)


class TestTrainingTimes:
    def times(self, trainer) -> torch.Tensor:
        """The timesteps that the denoiser is called with, of the first batch."""
        inputs, mode = first_batch(trainer)
        seen = []
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
        )
        trainer.compute_losses(trainer.model, inputs, mode)
        chosen, rejected = seen[0].chunk(2)
        assert torch.equal(chosen, rejected)
        return chosen.double() / 1000

    @pytest.mark.parametrize("sampling", ["logit_normal", "uniform", "mode"])
    def test_the_denoiser_is_called_at_shifted_times(self, sampling, dpo):
        plain = self.times(dpo(timestep_sampling=sampling, timestep_shift=1.0))
        torch.testing.assert_close(
            self.times(dpo(timestep_sampling=sampling)), shifted(plain, 3.0), rtol=1e-5, atol=1e-6
        )
        default = self.times(dpo(timestep_shift=1.0))
        assert torch.equal(plain, default) == (sampling == "logit_normal")

    @pytest.mark.parametrize("resolution", [16, 32])
    def test_a_shift_by_the_image_s_size_is_that_of_the_training_images(self, resolution, options, pairs):
        pipeline = tiny.build("flux_schnell")
        cfg = MaPOConfig(**options(resolution=resolution))
        trainer = MaPOTrainer(pipeline, cfg, pairs.select(range(4)))
        # 2 pixels per latent, 2 x 2 latents per token
        mu = calculate_shift((resolution // 4) ** 2)
        assert trainer.noise_process.shift == pytest.approx(math.exp(mu))
        trainer.train()
        given = MaPOTrainer(
            tiny.build("flux_schnell"), MaPOConfig(**options(resolution=16, timestep_shift=2.0)), pairs
        )
        assert given.noise_process.shift == 2.0

    @pytest.mark.parametrize("changed", [{"timestep_sampling": "uniform"}, {"timestep_shift": 3.0}], ids=str)
    def test_a_variance_preserving_model_refuses_the_options(self, changed, options, pairs):
        with pytest.raises(ValueError, match="is for flow models.*Leave it out"):
            MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options(**changed)), pairs)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"timestep_sampling": "cosmap"}, "timestep_sampling='cosmap' is none of logit_normal, uniform, mode"),
            ({"timestep_shift": 0.0}, "timestep_shift=0.0: it must be positive"),
        ],
    )
    def test_values_out_of_range_are_refused(self, changed, message, options):
        with pytest.raises(ValueError, match=message):
            MaPOConfig(**options(**changed))


class TestMaPO:
    def test_the_loss_has_the_released_code_s_t_of_1000(self, options, pairs):
        trainer = MaPOTrainer(tiny.build("stable_diffusion_3"), MaPOConfig(**options()), pairs)
        inputs, mode = first_batch(trainer)
        values = trainer.compute_losses(trainer.model, inputs, mode)
        chosen, rejected = (values[f"mse/{name}"].detach().double().numpy() for name in ("chosen", "rejected"))
        difference = [0.5 * error / np.expm1(0.5 * error) for error in (chosen, rejected)]
        margin = 1000 * (difference[0] - difference[1])
        expected = chosen + 0.1 * np.log1p(np.exp(-margin))
        np.testing.assert_allclose(values["loss"].detach().numpy(), expected, rtol=1e-4)
        trainer.train()


class TestSelfNPO:
    def trainer(self, options, **changed) -> SelfNPOTrainer:
        cfg = SelfNPOConfig(**options(**{"solver_steps": 10, "truncated_steps": 3, **changed}))
        return SelfNPOTrainer(tiny.build("stable_diffusion_3"), cfg, Dataset.from_dict({"prompt": prompts()[:8]}))

    def test_its_grid_is_the_sampler_s(self, options):
        trainer = self.trainer(options)
        sampler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        sampler.set_timesteps(sigmas=np.linspace(1, 0.1, 10).tolist())
        torch.testing.assert_close(trainer.times.flip(0), sampler.sigmas)
        trainer.train()
        assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
        plain = self.trainer(options, timestep_shift=1.0)
        torch.testing.assert_close(plain.times, torch.linspace(0, 1, 11))

    def test_squared_distances_of_clean_latents_are_t_squared_times_those_of_velocities(self):
        generator = torch.Generator().manual_seed(0)
        x_t, student, teacher = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3))
        t, process = torch.tensor([0.05, 0.3, 0.7, 1.0]), RectifiedFlow()
        options = SelfNPOOptions(loss_type="l2", huber_c=1e-3)
        loss = self_npo_loss(process.predict_x0(student, x_t, t), process.predict_x0(teacher, x_t, t), options)
        expected = t.double().square() * (student.double() - teacher.double()).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-8)

    def test_a_distribution_of_times_is_refused_since_it_has_none(self, options):
        with pytest.raises(ValueError, match="timestep_sampling='uniform' plays no part in Self-NPO"):
            SelfNPOConfig(**options(timestep_sampling="uniform"))

"""MaPO: margin-aware preference optimisation, without a reference model."""

from torch import Tensor, nn

from ..data import NoisyPairs
from ..likelihood import denoising_error
from ..losses import mapo_loss, mapo_reward
from .mapo_config import MaPOConfig
from .pairwise_trainer import PairwiseTrainer


class MaPOTrainer(PairwiseTrainer):
    """Trainer for MaPO (Margin-aware Preference Optimization for Aligning Diffusion Models without Reference).

    Arguments are those of [`PairwiseTrainer`], with `args` a [`MaPOConfig`].

    On a flow model errors are those of the velocity, and T of the loss is the scheduler's `num_train_timesteps`, 1000:
    a choice made here, since the times are continuous and MaPO was published for SDXL alone.

    Example:

    ```python
    from datasets import load_dataset
    from trl_diffusion_pref import MaPOConfig, MaPOTrainer

    trainer = MaPOTrainer(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        args=MaPOConfig(output_dir="mapo", max_steps=2000),
        train_dataset=load_dataset("imagefolder", data_dir="pairs", split="train"),
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    config_class = MaPOConfig
    _tag_names = ["trl", "trl-diffusion-pref", "mapo"]
    _name = "MaPO"
    _paper = {
        "title": "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference",
        "id": "2406.06424",
    }

    def pair_values(
        self, model: nn.Module, noisy: NoisyPairs, inputs: dict[str, Tensor], keys: list
    ) -> dict[str, Tensor]:
        errors = denoising_error(self.predictions(model, noisy), noisy.target).chunk(2)
        options = {
            "beta": self.args.beta,
            "snr_value": self.args.snr_value,
            "num_train_timesteps": self.noise_process.num_train_timesteps,
            "loss_type": self.args.loss_type,
        }
        rewards = tuple(mapo_reward(error.detach(), **options) for error in errors)
        return self.pair_metrics(mapo_loss(*errors, **options), rewards, errors)

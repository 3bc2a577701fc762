"""MaPO: margin-aware preference optimisation, without a reference model."""

from typing import cast

from torch import Tensor, nn

from ...data import PAIRS, Batch, Mode, corrupt
from ...training.metrics import pair_metrics
from ...training.trainer import DiffusionTrainer
from .config import MaPOConfig
from .loss import MaPOOptions, mapo_loss


class MaPOTrainer(DiffusionTrainer):
    """Trainer for MaPO (Margin-aware Preference Optimization for Aligning Diffusion Models without Reference).

    Arguments are those of [`DiffusionTrainer`], with `args` a [`MaPOConfig`]; columns `prompt`, `chosen`, `rejected`.

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

    args: MaPOConfig
    config_class = MaPOConfig
    layout = PAIRS
    sample_name = "pairs"
    _tag_names = ["trl", "trl-diffusion-pref", "mapo"]
    _name = "MaPO"
    _paper = {
        "title": "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference",
        "id": "2406.06424",
        "citation": """\
@misc{hong2024mapo,
    title         = {{Margin-aware Preference Optimization for Aligning Diffusion Models without Reference}},
    author        = {Jiwoo Hong and Sayak Paul and Noah Lee and Kashif Rasul and James Thorne and Jongheon Jeong},
    year          = 2024,
    eprint        = {2406.06424},
    archivePrefix = {arXiv}
}""",
    }

    def setup_step(self) -> None:
        args = self.args
        beta, steps = cast(float, args.beta), self.noise_process.num_train_timesteps
        self.options = MaPOOptions(args.loss_type, beta, args.snr_value, steps)

    def compute_losses(self, model: nn.Module, batch: Batch, mode: Mode) -> dict[str, Tensor]:
        noisy = corrupt(batch, mode, self.noise_process)
        prediction = self.denoise(model, noisy)
        chosen_error, rejected_error = self.denoise.error(prediction, noisy).chunk(2)
        loss, rewards = mapo_loss(chosen_error, rejected_error, self.options)
        return pair_metrics(loss, rewards, (chosen_error, rejected_error), noisy.model_time)

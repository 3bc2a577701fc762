"""RankDPO: preferences among all samples of a prompt, measured against a reference."""

import os
from dataclasses import replace
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

from ...data import Batch, Layout, Mode, corrupt
from ...data.layouts import Between, column_names
from ...data.pair_source import RowSource
from ...preference_data.rows import SAMPLES
from ...training.config import AnyDataset
from ...training.held_reference import HeldReference
from ...training.trainer import DiffusionTrainer
from .config import RankDPOConfig
from .loss import best_and_worst, implicit_rewards, rank_loss, ranking_accuracy, wanted_values
from .rows import check_lengths, check_score_columns, without_equal


class RankDPOTrainer(DiffusionTrainer):
    """Trainer for RankDPO (Scalable Ranked Preference Optimization for Text-to-Image Generation).

    Each row is a prompt with several samples and their scores; rows may have different numbers of samples, at least
    two. The columns are `prompt`, `images` (`videos`, `audio`) and `scores`, as `make_rankings` writes them.

    Arguments are those of [`DiffusionTrainer`], with `args` a [`RankDPOConfig`], and

    Args:
        ref_model: The reference, where it is not the model's start: Hub id, folder, pipeline or denoiser of the same
            architecture.

    Raises:
        ValueError: A reference of another architecture, or the trained model itself; options that contradict each
            other; rankings of one sample, scores that are missing or not finite, or only rankings of equally good
            samples; precomputed errors that were made from something else.

    Example:

    ```python
    from trl_diffusion_pref import RankDPOConfig, RankDPOTrainer, make_rankings
    from trl_diffusion_pref.rewards import PickScore

    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    rankings = make_rankings(model, "prompts.txt", PickScore(), "self-made", samples_per_prompt=4)
    RankDPOTrainer(model, RankDPOConfig(output_dir="rank-dpo", max_steps=400), rankings).train()
    ```
    """

    args: RankDPOConfig
    config_class = RankDPOConfig
    layout = Layout(samples=("images",), samples_per_cell=4, fewest_per_cell=2, scalars=("scores",))
    sample_name = "rankings"
    _tag_names = ["trl", "trl-diffusion-pref", "rank-dpo"]
    _name = "RankDPO"
    _paper = {
        "title": "Scalable Ranked Preference Optimization for Text-to-Image Generation",
        "id": "2410.18013",
        "citation": """\
@misc{karthik2024rankdpo,
    title         = {{Scalable Ranked Preference Optimization for Text-to-Image Generation}},
    author        = {Shyamgopal Karthik and Huseyin Coskun and Zeynep Akata and Sergey Tulyakov and Jian Ren and Anil
                     Kag},
    year          = 2024,
    eprint        = {2410.18013},
    archivePrefix = {arXiv}
}""",
    }

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline,
        args: RankDPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        *,
        ref_model: str | os.PathLike | DiffusionPipeline | nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self.reference = HeldReference(ref_model, args)
        super().__init__(model, args, train_dataset, eval_dataset, **kwargs)

    # ---- Before the first step -----------------------------------------------------------------------------------

    def make_layout(self) -> Layout:
        args, samples, scalars = self.args, (SAMPLES[self.family.modality],), tuple(self.args.score_columns)
        ranges = dict.fromkeys(scalars, Between(0, 1)) if args.win_fractions == "given" else {}
        return replace(self.layout, samples=samples, samples_per_cell=args.max_samples, scalars=scalars, ranges=ranges)

    def prepare_rows(self, dataset: AnyDataset, label: str) -> tuple[AnyDataset, RowSource | None]:
        args, samples = self.args, self.layout.samples[0]
        check_score_columns(column_names(dataset), label, args.score_columns)
        # A stream's rankings are not known before they are read; what else is missing is said later.
        if isinstance(dataset, IterableDataset) or samples not in dataset.column_names or not len(dataset):
            return dataset, None
        check_lengths(dataset, label, samples, args.max_samples)
        return without_equal(dataset, label, args.score_columns, args.loss_options(1.0))

    def check_step(self, peft_config: LoraConfig | None) -> None:
        self.reference.check(self, peft_config)

    def setup_step(self) -> None:
        self.options = self.args.loss_options(cast(float, self.args.beta))
        self.reference.setup(self, own_noise=not self.args.shared_noise)

    # ---- One batch -----------------------------------------------------------------------------------------------

    def compute_losses(self, model: nn.Module, batch: Batch, mode: Mode) -> dict[str, Tensor]:
        mode = self.reference.at_stored_draws(batch, mode)
        noisy = corrupt(batch, mode, self.noise_process, own_noise=not self.args.shared_noise)
        both = (self.denoise.error(self.denoise(model, noisy), noisy), self.reference.errors(batch, mode, noisy))
        # From `(k B,)`, sample by sample, to `(B, k)`.
        errors, ref_errors = (each.unflatten(0, (-1, len(batch.rows))).T for each in both)

        scores = torch.stack([batch.scalars[name] for name in self.args.score_columns])
        wanted = wanted_values(scores, self.options)
        rewards = implicit_rewards(errors, ref_errors, self.options.beta)
        loss = rank_loss(rewards, wanted, self.options)

        best, worst = best_and_worst(rewards.detach(), wanted)
        return {
            "loss": loss,
            "rewards/best": best,
            "rewards/worst": worst,
            "rewards/margins": best - worst,
            "rewards/accuracies": ranking_accuracy(rewards.detach(), wanted),
            "mse/chosen": best_and_worst(errors.detach(), wanted)[0],
            "mse/rejected": best_and_worst(errors.detach(), wanted)[1],
            "mse/ref_chosen": best_and_worst(ref_errors, wanted)[0],
            "time": noisy.model_time[: len(batch.rows)].float(),
        }

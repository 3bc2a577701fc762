"""Diffusion-KTO: single votes measured against a reference."""

import os
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

from ...data import Batch, EncodedDataset, Layout, Mode, corrupt
from ...data.layouts import OneOf, sample_column
from ...data.pair_source import RowSource
from ...data.single_samples import single_samples
from ...training import loaders
from ...training.config import AnyDataset
from ...training.held_reference import HeldReference
from ...training.metrics import gathered, where
from ...training.trainer import DiffusionTrainer
from .baseline import RunningGain
from .config import DiffusionKTOConfig, check_both_kinds
from .loss import diffusion_kto_loss, likelihood_gain


class DiffusionKTOTrainer(DiffusionTrainer):
    """Trainer for Diffusion-KTO (Aligning Diffusion Models by Optimizing Human Utility).

    It learns from single samples that were liked or not. Each sample has its own noise and time.

    Arguments are those of [`DiffusionTrainer`], with `args` a [`DiffusionKTOConfig`]; columns `prompt`, a sample
    (`image`, `video` or `audio`, what the pipeline generates; `edited_image` where it edits `image`) and `label`, 1 or
    True for samples that were liked and 0 or False for others. Pairs in any known layout become two rows each. And

    Args:
        ref_model: The reference, where it is not the model's start: Hub id, folder, pipeline or denoiser of the same
            architecture.

    Raises:
        ValueError: A training set with labels of one kind alone; a reference of another architecture, or the trained
            model itself; options that contradict each other; precomputed errors that were made from something else.

    Example:

    ```python
    from datasets import Dataset, Image
    from trl_diffusion_pref import DiffusionKTOConfig, DiffusionKTOTrainer

    votes = Dataset.from_dict({"prompt": prompts, "image": files, "label": thumbs_up}).cast_column("image", Image())
    trainer = DiffusionKTOTrainer(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        args=DiffusionKTOConfig(output_dir="kto", max_steps=10_000),
        train_dataset=votes,
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    args: DiffusionKTOConfig
    train_dataset: Any
    config_class = DiffusionKTOConfig
    layout = Layout(samples=("image",), scalars=("label",))
    _tag_names = ["trl", "trl-diffusion-pref", "diffusion-kto"]
    _name = "Diffusion-KTO"
    _paper = {
        "title": "Aligning Diffusion Models by Optimizing Human Utility",
        "id": "2404.04465",
        "citation": """\
@misc{li2024diffusionkto,
    title         = {{Aligning Diffusion Models by Optimizing Human Utility}},
    author        = {Shufan Li and Konstantinos Kallidromitis and Akash Gokul and Yusuke Kato and Kazuki Kozuka},
    year          = 2024,
    eprint        = {2404.04465},
    archivePrefix = {arXiv}
}""",
    }

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline,
        args: DiffusionKTOConfig | None = None,
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
        column = sample_column(self.family)
        ranges = {"label": OneOf({0.0, 1.0})}
        return Layout(samples=(column,), scalars=("label",), ranges=ranges, from_pairs=True)

    def prepare_rows(self, dataset: AnyDataset, label: str) -> tuple[AnyDataset, RowSource | None]:
        sides, options = {"chosen": 1.0, "rejected": 0.0}, self.args.pair_options()
        # Rankings are rewritten, which one process does for all.
        with self.args.main_process_first():
            return single_samples(dataset, label, self.layout, options, sides=sides, scalar="label")

    def check_step(self, peft_config: LoraConfig | None) -> None:
        self.reference.check(self, peft_config)
        if self.args.positive_ratio is not None:
            loaders.check_shuffling(self.args, "positive_ratio draws rows with replacement", "positive_ratio=None")

    def setup_step(self) -> None:
        args = self.args
        if isinstance(self.train_dataset, EncodedDataset):
            # Those that could not be used, and were left out, may have been all rows of a kind.
            check_both_kinds(self.train_dataset.scalars["label"].tolist(), "train_dataset")
        self.options = args.loss_options()
        self.reference.setup(self)
        self.running_gain = RunningGain(args.kl_decay)
        self.checkpointer.parts["running_gain"] = self.running_gain
        self.add_callback(self.running_gain)

    def row_weights(self) -> Tensor | None:
        ratio = self.args.positive_ratio
        if ratio is None:
            return None
        liked = torch.from_numpy(self.train_dataset.scalars["label"] == 1)
        return torch.where(liked, ratio / liked.sum(), (1 - ratio) / (~liked).sum()).double()

    # ---- One batch -----------------------------------------------------------------------------------------------

    def compute_losses(self, model: nn.Module, batch: Batch, mode: Mode) -> dict[str, Tensor]:
        mode = self.reference.at_stored_draws(batch, mode)
        noisy = corrupt(batch, mode, self.noise_process)
        error = self.denoise.error(self.denoise(model, noisy), noisy)
        ref_error = self.reference.errors(batch, mode, noisy)

        gain, liked = likelihood_gain(error, ref_error), batch.scalars["label"]
        baseline = self._baseline(gain.detach(), training=mode.training)
        loss = diffusion_kto_loss(gain, liked, baseline, self.options)

        reward, of_liked = self.options.beta * gain.detach(), liked > 0.5
        above = gain.detach() - baseline

        return {
            "loss": loss,
            "rewards/liked": where(of_liked, reward),
            "rewards/disliked": where(~of_liked, reward),
            "rewards/accuracies": (torch.where(of_liked, above, -above) > 0).float(),
            "kl": baseline.expand_as(reward),
            "liked": liked.float(),
            "mse/chosen": where(of_liked, error),
            "mse/rejected": where(~of_liked, error),
            "mse/ref_chosen": where(of_liked, ref_error),
            "mse/ref_rejected": where(~of_liked, ref_error),
            "time": noisy.model_time.float(),
        }

    def _baseline(self, gain: Tensor, *, training: bool) -> Tensor:
        """The gain from which a sample counts as better than expected, `()`; in evaluation not the batch's."""
        if training:
            self.running_gain.record(gain)
            if self.args.kl_estimate == "batch":
                return gathered({"gain": gain}, self.accelerator, self.args.train_batch_size).mean().clamp(min=0)
        return torch.full((), self.running_gain.value, device=gain.device)

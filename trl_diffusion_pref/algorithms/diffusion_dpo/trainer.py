"""Diffusion-DPO and its relatives: preferences measured against a reference."""

import os
from dataclasses import replace
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

from ...data import PAIRS, Batch, Layout, Mode, corrupt, halves
from ...data.layouts import Between
from ...diffusion.noise import RectifiedFlow
from ...training.held_reference import HeldReference
from ...training.metrics import pair_metrics
from ...training.trainer import DiffusionTrainer
from .auto_beta import AutomaticBeta
from .config import DiffusionDPOConfig
from .loss import (
    DiffusionDPOOptions,
    diffusion_dpo_logits,
    diffusion_dpo_loss,
    dspo_loss,
    flow_dpo_beta,
    implicit_rewards,
    norm_excess,
    preserve_winner,
    root_mean_square,
    soft_label_beta,
)


class DiffusionDPOTrainer(DiffusionTrainer):
    """Trainer for Diffusion-DPO (Diffusion Model Alignment Using Direct Preference Optimization).

    On a flow model (Stable Diffusion 3, Flux, ...) it is Flow-DPO (arXiv 2501.13918, equation 6): errors are those of
    the velocity, and beta is constant unless `beta_schedule` says otherwise.

    Arguments are those of [`DiffusionTrainer`], with `args` a [`DiffusionDPOConfig`]; columns `prompt`, `chosen`,
    `rejected` and, for `loss_type="irepo"`, a soft label; and

    Args:
        ref_model: The reference, where it is not the model's start: Hub id, folder, pipeline or denoiser of the same
            architecture.

    Raises:
        ValueError: A reference of another architecture, or the trained model itself; options that contradict each
            other or the model's noise process; soft labels outside (0, 1); precomputed errors that were made from
            something else.
    """

    args: DiffusionDPOConfig
    config_class = DiffusionDPOConfig
    layout = PAIRS
    sample_name = "pairs"
    _tag_names = ["trl", "trl-diffusion-pref", "diffusion-dpo"]
    _name = "Diffusion-DPO"
    _paper = {
        "title": "Diffusion Model Alignment Using Direct Preference Optimization",
        "id": "2311.12908",
        "citation": """\
@misc{wallace2023diffusiondpo,
    title         = {{Diffusion Model Alignment Using Direct Preference Optimization}},
    author        = {Bram Wallace and Meihua Dang and Rafael Rafailov and Linqi Zhou and Aaron Lou and Senthil
                     Purushwalkam and Stefano Ermon and Caiming Xiong and Shafiq Joty and Nikhil Naik},
    year          = 2023,
    eprint        = {2311.12908},
    archivePrefix = {arXiv}
}""",
    }

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline,
        args: DiffusionDPOConfig | None = None,
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
        column = self.args.soft_label_column
        if self.args.weight_by_soft_label:
            return replace(PAIRS, scalars=(column,), ranges={column: Between(0, 1)})
        if self._is_irepo:
            return replace(PAIRS, optional_scalars=(column,), ranges={column: Between(0, 1)})
        return PAIRS

    @property
    def _is_irepo(self) -> bool:
        return self.args.loss_type == "irepo"

    @property
    def _compares_predictions(self) -> bool:
        return self.args.loss_type in ("dspo", "dspo_sdxl") or self.args.anchor_weight > 0

    def check_step(self, peft_config: LoraConfig | None) -> None:
        if self.args.beta_schedule == "flow" and not isinstance(self.noise_process, RectifiedFlow):
            raise ValueError(
                f"beta_schedule='flow' is for flow models, and the {type(self.pipeline).__name__}'s "
                f"{type(self.pipeline.scheduler).__name__} makes it a variance-preserving one. Use 'constant'."
            )
        self.reference.check(self, peft_config)

    def setup_step(self) -> None:
        args = self.args
        self.options = DiffusionDPOOptions(
            args.loss_type, cast(float, args.beta), args.label_smoothing, args.dmpo_alpha, args.margin_clip
        )
        norm = {"norm": lambda prediction, noisy: root_mean_square(prediction)}
        self.reference.setup(self, also=norm if args.norm_hinge_weight else None)
        self.auto_beta: AutomaticBeta | None = None
        if args.auto_beta:
            self.auto_beta = AutomaticBeta(self.options.beta, args.auto_beta_target)
            self.checkpointer.parts["auto_beta"] = self.auto_beta
            self.add_callback(self.auto_beta)

    # ---- One batch -----------------------------------------------------------------------------------------------

    def compute_losses(self, model: nn.Module, batch: Batch, mode: Mode) -> dict[str, Tensor]:
        args, options = self.args, self.options
        mode = self.reference.at_stored_draws(batch, mode)
        noisy = corrupt(batch, mode, self.noise_process)
        beta: float | Tensor = options.beta if self.auto_beta is None else self.auto_beta.beta
        if args.beta_schedule == "flow":
            beta = flow_dpo_beta(halves(self.noise_process.time_fraction(noisy.model_time))[0], cast(float, beta))

        prediction = self.denoise(model, noisy)
        chosen_error, rejected_error = errors = halves(self.denoise.error(prediction, noisy))
        ref_prediction = self.reference.prediction(noisy) if self._compares_predictions else None
        if ref_prediction is None:
            of_reference = self.reference.values(batch, mode, noisy)
        else:
            of_reference = self.reference.values_of(ref_prediction, noisy)
        ref_errors = halves(of_reference["error"])

        if args.winner_preserving_mu is not None:
            residuals = halves(prediction - noisy.target)
            rejected_error = preserve_winner(rejected_error, *residuals, mu=args.winner_preserving_mu)
        pair_beta = soft_label_beta(batch.scalars[args.soft_label_column], beta) if args.weight_by_soft_label else beta
        logits = diffusion_dpo_logits(
            chosen_error,
            rejected_error,
            *ref_errors,
            beta=pair_beta,
            margin_clip=options.margin_clip,
            rejected_weight=args.rejected_weight,
        )
        if ref_prediction is not None and args.loss_type.startswith("dspo"):
            chosen, target, ref_chosen = (halves(values)[0] for values in (prediction, noisy.target, ref_prediction))
            loss = dspo_loss(chosen, target, ref_chosen, logits, options)
        else:
            soft_labels = batch.scalars.get(args.soft_label_column, args.soft_label) if self._is_irepo else None
            loss = diffusion_dpo_loss(logits, options, soft_labels)
        loss = loss + args.sft_weight * chosen_error

        of_aids: dict[str, Tensor] = {}
        if args.weight_by_soft_label:
            of_aids["label_weight"] = soft_label_beta(batch.scalars[args.soft_label_column], 1.0).abs()
        if ref_prediction is not None and args.anchor_weight:
            distances = self.denoise.error(prediction, replace(noisy, target=ref_prediction))
            of_aids["anchor"] = anchor = _mean_of_both(distances)
            loss = loss + args.anchor_weight * anchor
        if args.norm_hinge_weight:
            norm, ref_norm = root_mean_square(prediction), of_reference["norm"]
            of_aids["norm_ratio"] = _mean_of_both(norm / ref_norm)
            loss = loss + args.norm_hinge_weight * _mean_of_both(norm_excess(norm, ref_norm))
        if self.auto_beta is not None:
            of_aids["beta"] = torch.full_like(logits, self.auto_beta.beta)
            of_aids["gradient_factor"] = torch.sigmoid(-logits)
            if mode.training:
                self.auto_beta.record(logits / self.auto_beta.beta)

        rewards = implicit_rewards(errors, ref_errors, beta)
        values = pair_metrics(loss, rewards, errors, noisy.model_time)
        values |= {"mse/ref_chosen": ref_errors[0], "mse/ref_rejected": ref_errors[1]}
        return values | {name: value.detach() for name, value in of_aids.items()}


def _mean_of_both(values: Tensor) -> Tensor:
    """`(B,)`, the means of chosen and rejected, from `(2B,)`."""
    return values.unflatten(0, (2, -1)).mean(dim=0)

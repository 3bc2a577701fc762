"""Diffusion-DPO and its relatives: preferences measured against a reference."""

import os
from dataclasses import replace
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from trl.trainer.utils import disable_dropout_in_model

from ...data import PAIRS, Batch, Layout, Mode, NoisyBatch, corrupt, halves
from ...data.layouts import Between, named_datasets
from ...diffusion.noise import RectifiedFlow
from ...fingerprint import weights_fingerprint
from ...training.callbacks import MoveReference
from ...training.metrics import pair_metrics
from ...training.model_setup import starting_fingerprint
from ...training.pipelines import load_reference_model
from ...training.references import AdapterOff, FrozenModel, Reference, make_reference, resolve_reference
from ...training.trainer import DiffusionTrainer
from .config import DiffusionDPOConfig
from .loss import (
    DiffusionDPOOptions,
    diffusion_dpo_logits,
    diffusion_dpo_loss,
    dspo_loss,
    flow_dpo_beta,
    implicit_rewards,
    preserve_winner,
)
from .precomputed import PrecomputedErrors


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
    train_dataset: Any
    reference: Reference
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
        kind = getattr(args, "reference", "auto")
        if ref_model is not None and kind not in ("auto", "precomputed"):
            raise ValueError(
                f"ref_model was passed, but args.reference={kind!r} makes another reference. Leave one out."
            )
        self._ref_model = ref_model
        super().__init__(model, args, train_dataset, eval_dataset, **kwargs)

    # ---- Before the first step -----------------------------------------------------------------------------------

    def make_layout(self) -> Layout:
        if not self._is_irepo:
            return PAIRS
        column = self.args.soft_label_column
        return replace(PAIRS, optional_scalars=(column,), ranges={column: Between(0, 1)})

    @property
    def _is_irepo(self) -> bool:
        return self.args.loss_type == "irepo"

    def check_step(self, peft_config: LoraConfig | None) -> None:
        args, lora = self.args, peft_config is not None or self.carried_adapter
        if args.beta_schedule == "flow" and not isinstance(self.noise_process, RectifiedFlow):
            raise ValueError(
                f"beta_schedule='flow' is for flow models, and the {type(self.pipeline).__name__}'s "
                f"{type(self.pipeline.scheduler).__name__} makes it a variance-preserving one. Use 'constant'."
            )
        kind = resolve_reference(args.reference, lora=lora, carried=self.carried_adapter)
        if args.sync_ref_model and args.shards_weights:
            raise ValueError(
                "sync_ref_model is not supported with FSDP and DeepSpeed, whose checkpoints leave it out."
            )
        if kind == "precomputed" and args.shards_weights:
            raise ValueError(
                "reference='precomputed' needs the whole model before training, which no process holds with FSDP and "
                "DeepSpeed. Use DDP, or another reference."
            )
        if self._ref_model is not None:
            own = self.family.denoiser(self.pipeline)
            self._ref_model = load_reference_model(self._ref_model, own, self.family, args)
        if args.sync_ref_model and self._ref_model is not None and lora:
            raise ValueError("sync_ref_model moves ref_model towards the trained weights, and a LoRA has others.")
        if args.sync_ref_model and self._ref_model is None and kind == "adapter_off":
            raise ValueError(
                "sync_ref_model moves the reference's weights, and the reference of a new LoRA is the base model "
                "itself. Use reference='frozen_adapter'."
            )

    def setup_step(self) -> None:
        args, lora = self.args, isinstance(self.model, PeftModel)
        self.options = DiffusionDPOOptions(
            args.loss_type, cast(float, args.beta), args.label_smoothing, args.dmpo_alpha, args.margin_clip
        )
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        kind = resolve_reference(args.reference, lora=lora, carried=self.carried_adapter)
        if self._ref_model is not None:
            self.reference = FrozenModel(cast(nn.Module, self._ref_model).to(args.device), self.accelerator)
            self._ref_model = None
        else:
            # Precomputed or not, the reference of a new LoRA is the base.
            new_lora = kind == "precomputed" and lora and not self.carried_adapter
            self.reference = make_reference("adapter_off" if new_lora else kind, self.model, self.accelerator)
        self.precomputed = self._precompute() if kind == "precomputed" else None
        if args.sync_ref_model:
            self.checkpointer.parts["reference"] = self.reference
            alpha, every = args.ref_model_mixup_alpha, args.ref_model_sync_steps
            self.add_callback(MoveReference(self.reference, lambda: self._unwrapped, alpha, every))

    def _precompute(self) -> PrecomputedErrors:
        if isinstance(self.reference, FrozenModel):
            weights = weights_fingerprint(self.reference.module)
        elif isinstance(self.reference, AdapterOff):
            weights = self.checkpointer.record["base_fingerprint"]
        else:
            weights = starting_fingerprint(self.model, self.checkpointer.record)
        record: dict[str, Any] = {
            "weights": weights,
            "noise process": self.noise_process.describe(training_times=True),
            "resolution": list(self.encoder.preparation.shape),
        }
        if self.args.loss_on_mask:
            record["loss_on_mask"] = True
        errors = PrecomputedErrors(self.args, self._reference_errors, self.row_cache, record)
        none = torch.empty(0, dtype=torch.int64)
        errors.compute("train", self.train_dataset, self.modes.training(none, 0))
        for name, dataset in named_datasets(self.eval_dataset):
            errors.compute(f"eval {name}", dataset, self.modes.evaluation(none, None))
        # accelerate keeps what it prepared, and would keep a model of the user's in memory.
        self.reference = None  # type: ignore[assignment]  # nothing asks for it any more
        self.accelerator.free_memory()
        return errors

    # ---- One batch -----------------------------------------------------------------------------------------------

    def compute_losses(self, model: nn.Module, batch: Batch, mode: Mode) -> dict[str, Tensor]:
        args, options = self.args, self.options
        ref_prediction = ref_errors = None
        if self.precomputed is not None:
            mode, ref_errors = self.precomputed.at_stored_draws(batch, mode)
        noisy = corrupt(batch, mode, self.noise_process)
        beta: float | Tensor = options.beta
        if args.beta_schedule == "flow":
            beta = flow_dpo_beta(halves(self.noise_process.time_fraction(noisy.model_time))[0], options.beta)

        prediction = self.denoise(model, noisy)
        errors = halves(self.denoise.error(prediction, noisy))
        if ref_errors is None:
            ref_prediction = self._reference_prediction(noisy)
            ref_errors = halves(self.denoise.error(ref_prediction, noisy))

        chosen_error, rejected_error = errors
        if args.winner_preserving_mu is not None:
            residuals = halves(prediction - noisy.target)
            rejected_error = preserve_winner(rejected_error, *residuals, mu=args.winner_preserving_mu)
        logits = diffusion_dpo_logits(
            chosen_error, rejected_error, *ref_errors, beta=beta, margin_clip=options.margin_clip
        )
        if ref_prediction is not None and options.loss_type in ("dspo", "dspo_sdxl"):
            chosen, target, ref_chosen = (halves(values)[0] for values in (prediction, noisy.target, ref_prediction))
            loss = dspo_loss(chosen, target, ref_chosen, logits, options)
        else:
            soft_labels = batch.scalars.get(args.soft_label_column, args.soft_label) if self._is_irepo else None
            loss = diffusion_dpo_loss(logits, options, soft_labels)
        loss = loss + args.sft_weight * chosen_error

        rewards = implicit_rewards(errors, ref_errors, beta)
        values = pair_metrics(loss, rewards, errors, noisy.model_time)
        return {**values, "mse/ref_chosen": ref_errors[0], "mse/ref_rejected": ref_errors[1]}

    def _reference_prediction(self, noisy: NoisyBatch) -> Tensor:
        with self.reference.applied() as module:
            return self.denoise(module, noisy)

    def _reference_errors(self, batch: Batch, mode: Mode) -> Tensor:
        """`(2B,)`, for precomputing."""
        noisy = corrupt(batch, mode, self.noise_process)
        return self.denoise.error(self._reference_prediction(noisy), noisy)

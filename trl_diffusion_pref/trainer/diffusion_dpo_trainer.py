"""Diffusion-DPO and its relatives: preferences measured against a reference."""

import copy
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import PeftModel
from torch import Tensor, nn
from trl.trainer.utils import disable_dropout_in_model

from ..architecture import different_parameters
from ..data import NoisyPairs, column_names, dataset_fingerprint
from ..fingerprint import weights_fingerprint
from ..likelihood import denoising_error
from ..losses import diffusion_dpo_logits, diffusion_dpo_loss, dspo_loss, flow_dpo_beta, preserve_winner
from ..noise import NoiseProcess, RectifiedFlow
from ..randomness import EVALUATION, REFERENCE, generator_for
from .base_config import DiffusionPreferenceConfig
from .diffusion_dpo_config import DiffusionDPOConfig
from .divergence import DivergenceGuard
from .model_argument import check_not_offloaded, load_pipeline
from .pairwise_trainer import PairwiseTrainer
from .references import AdapterOff, FrozenAdapter, FrozenModel, Itself, MoveReference, Reference
from .row_tables import load_or_compute


class DiffusionDPOTrainer(PairwiseTrainer):
    """Trainer for Diffusion-DPO (Diffusion Model Alignment Using Direct Preference Optimization).

    On a flow model (Stable Diffusion 3, Flux, ...) it is Flow-DPO (arXiv 2501.13918, equation 6): errors are those of
    the velocity, and beta is constant unless `beta_schedule` says otherwise.

    Arguments are those of [`PairwiseTrainer`], with `args` a [`DiffusionDPOConfig`], and

    Args:
        ref_model: The reference, where it is not the model's start: Hub id, folder, pipeline or denoiser of the same
            architecture.

    Raises:
        ValueError: A reference of another architecture, or the trained model itself; options that contradict each
            other or the model's noise process; soft labels outside (0, 1); precomputed errors that were made from
            something else.
    """

    config_class = DiffusionDPOConfig
    _tag_names = ["trl", "trl-diffusion-pref", "diffusion-dpo"]
    _name = "Diffusion-DPO"
    _paper = {"title": "Diffusion Model Alignment Using Direct Preference Optimization", "id": "2311.12908"}

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
        if ref_model is not None and args is not None and args.reference not in ("auto", "precomputed"):
            raise ValueError(
                f"ref_model was passed, but args.reference={args.reference!r} makes another reference. Leave one out."
            )
        super().__init__(model, args, train_dataset, eval_dataset, **kwargs)
        if self.args.disable_dropout:
            disable_dropout_in_model(self.model)
        # Errors (chosen, rejected) of the reference at fixed draws: `(rows, draws, 2)`, by data set.
        self._reference_errors: dict[str, Tensor] = {}
        self.reference = self._make_reference(ref_model)
        if self.args.reference == "precomputed":
            self._precompute()
            self.reference = None
            # accelerate keeps what it prepared, and would keep a model of the user's in memory.
            self.accelerator.free_memory()
        if self.args.sync_ref_model:
            self.add_callback(
                MoveReference(self, self.reference, self.args.ref_model_mixup_alpha, self.args.ref_model_sync_steps)
            )
        self.divergence_guard: DivergenceGuard | None = None
        if self.args.divergence_guard != "off":
            self.divergence_guard = DivergenceGuard(
                self, self.args.divergence_guard, self.args.divergence_margin, self.args.divergence_window
            )
            self.add_callback(self.divergence_guard)

    def make_noise_process(self, args: DiffusionDPOConfig, image_tokens: int | None = None) -> NoiseProcess:
        process = super().make_noise_process(args, image_tokens)
        if args.beta_schedule == "flow" and not isinstance(process, RectifiedFlow):
            raise ValueError(
                f"beta_schedule='flow' is for flow models, and the {type(self.pipeline).__name__}'s "
                f"{type(self.pipeline.scheduler).__name__} makes it a variance-preserving one. Use 'constant'."
            )
        return process

    # ---- Reference -----------------------------------------------------------------------------------------------

    def _make_reference(self, ref_model: Any) -> Reference:
        lora = isinstance(self.model, PeftModel)
        if self.args.sync_ref_model and self.shards_weights:
            raise ValueError(
                "sync_ref_model is not supported with FSDP and DeepSpeed, whose checkpoints leave it out."
            )
        if ref_model is not None:
            if self.args.sync_ref_model and lora:
                raise ValueError("sync_ref_model moves ref_model towards the trained weights, and a LoRA has others.")
            return FrozenModel(self._check_ref_model(ref_model), self.accelerator)
        if self.args.reference == "precomputed":
            # At its start every model is its own reference, but for a new LoRA that does not start at zero.
            return AdapterOff(self.model) if lora and not self._adapter_before else Itself(self.model)
        kind = self.args.reference
        if kind == "auto":
            kind = "copy" if not lora else "frozen_adapter" if self._adapter_before else "adapter_off"
        if kind != "copy" and not lora:
            raise ValueError(f"reference={kind!r} needs a LoRA: pass peft_config, or use reference='copy'.")
        if self.args.sync_ref_model and kind == "adapter_off":
            raise ValueError(
                "sync_ref_model moves the reference's weights, and the reference of a new LoRA is the base model "
                "itself. Use reference='frozen_adapter'."
            )
        if kind == "adapter_off":
            return AdapterOff(self.model)
        if kind == "frozen_adapter":
            return FrozenAdapter(self.model)
        return FrozenModel(copy.deepcopy(self.model), self.accelerator)

    def _check_ref_model(self, ref_model: Any) -> nn.Module:
        if isinstance(ref_model, (str, os.PathLike)):
            ref_model = load_pipeline(ref_model, self.args.model_init_kwargs)
        if isinstance(ref_model, DiffusionPipeline):
            check_not_offloaded(ref_model)
            ref_model = self.family.denoiser(ref_model)
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if ref_model is base or ref_model is self.model:
            raise ValueError(
                "ref_model is the very model that is trained, so it would change with it. Leave it out: the trainer "
                "makes its own reference."
            )
        different = different_parameters(base, ref_model)
        if different:
            raise ValueError(
                f"ref_model ({type(ref_model).__name__}) has another architecture than the trained "
                f"{type(base).__name__}: {len(different)} parameters differ, first {different[0]}. Pass a model of "
                "the same architecture."
            )
        return ref_model.to(self.args.device)

    def reference_predictions(self, noisy: NoisyPairs) -> Tensor:
        """Predictions `(2B, ...)` of the reference."""
        with self.reference.applied() as module:
            return self.predictions(module, noisy)

    def _precompute(self) -> None:
        """Computes the reference's errors for all fixed draws, after which no reference is needed."""
        if self.shards_weights:
            raise ValueError(
                "reference='precomputed' needs the whole model before training, which no process holds with FSDP and "
                "DeepSpeed. Use DDP, or another reference."
            )
        for name, dataset in [("train_dataset", self.train_dataset), *self.named_eval_datasets()]:
            if isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"reference='precomputed' needs data sets of known rows, and {name or 'eval_dataset'} is "
                    "streamed. Use another reference, or store the data."
                )
        self._reference_errors["train"] = self._errors_at(
            "train", self.train_dataset, self.args.reference_draws, self.args.prompt_dropout
        )
        for name, dataset in self.named_eval_datasets():
            self._reference_errors[f"eval {name}"] = self._errors_at(f"eval {name}", dataset, None, 0.0)

    def _errors_at(self, name: str, dataset: Dataset, draws: int | None, prompt_dropout: float) -> Tensor:
        """Errors `(rows, draws, 2)` at fixed draws; `draws=None` is the one draw that evaluation takes."""

        def compute(inputs: dict[str, Tensor]) -> Tensor:
            rows, errors = inputs["row"].tolist(), []
            for k in range(draws or 1):
                if draws is None:
                    keys = [(self.args.seed, EVALUATION, row) for row in rows]
                else:
                    keys = [(self.args.seed, REFERENCE, row, k) for row in rows]
                noisy = self.noisy_pairs(inputs, keys, prompt_dropout)
                error = denoising_error(self.reference_predictions(noisy), noisy.target)
                errors.append(torch.stack(error.chunk(2), dim=1))
            return torch.stack(errors, dim=1)

        record = {
            "what": f"reference errors, {name}",
            "negative": self.args.negative,
            "weights": self._reference_fingerprint(),
            "data": dataset_fingerprint(dataset),
            "prompts": self.prompt_table.encoded_with,
            "rows": len(dataset),
            "noise process": self.noise_process.describe(training_times=True),
            "resolution": self.sample_size(self.args),
            "seed": self.args.seed,
            "draws": draws,
            "prompt_dropout": prompt_dropout,
            "latent_sampling": self.args.latent_sampling,
            "precision": self.accelerator.mixed_precision,
        }
        own_folder = self.args.reference_errors_dir
        return load_or_compute(
            Path(own_folder) if own_folder else self.args.cache_folder(),
            record,
            lambda: self.map_rows(dataset, compute, self.args.per_device_train_batch_size),
            self.accelerator,
            name="-".join(["reference-errors", *_file_parts(name)]) if own_folder else None,
        )

    def _reference_fingerprint(self) -> str:
        """Of the weights that precomputed errors come from: the run's start, or a model of the user's."""
        if isinstance(self.reference, FrozenModel):
            return weights_fingerprint(self.reference.module)
        return self._base_fingerprint

    # ---- One batch -----------------------------------------------------------------------------------------------

    def extra_columns(self, dataset: Dataset | IterableDataset, args: DiffusionPreferenceConfig) -> tuple[str, ...]:
        column = args.soft_label_column
        if args.loss_type != "irepo" or column not in column_names(dataset):
            return ()
        if isinstance(dataset, Dataset):
            bad = [row for row, value in enumerate(dataset[column]) if value is None or not 0 < value < 1]
            if bad:
                raise ValueError(
                    f"column {column!r} holds values outside (0, 1), in {len(bad)} rows, first {bad[:10]}. "
                    "Clip them, say to 0.02..0.98: the logit of 0 or 1 is infinite."
                )
        return (column,)

    def random_keys(self, inputs: dict[str, Tensor], training: bool) -> list[tuple[int, ...]]:
        keys = super().random_keys(inputs, training)
        if not (training and self._reference_errors):
            return keys
        draws = self.args.reference_draws
        picked = [int(torch.randint(draws, (1,), generator=generator_for(*key))) for key in keys]
        return [(self.args.seed, REFERENCE, row, k) for row, k in zip(inputs["row"].tolist(), picked, strict=True)]

    def pair_values(
        self, model: nn.Module, noisy: NoisyPairs, inputs: dict[str, Tensor], keys: list
    ) -> dict[str, Tensor]:
        args, beta = self.args, self._beta(noisy)
        prediction = self.predictions(model, noisy)
        chosen_error, rejected_error = denoising_error(prediction, noisy.target).chunk(2)
        ref_prediction = None if self._reference_errors else self.reference_predictions(noisy)
        if ref_prediction is None:
            ref_errors = self._look_up_errors(model.training, keys, chosen_error.device)
        else:
            ref_errors = denoising_error(ref_prediction, noisy.target).chunk(2)
        used_rejected = rejected_error
        if args.winner_preserving_mu is not None:
            residuals = (prediction - noisy.target).chunk(2)
            used_rejected = preserve_winner(rejected_error, *residuals, mu=args.winner_preserving_mu)
        errors = (chosen_error, used_rejected, *ref_errors)
        if args.loss_type.startswith("dspo"):
            loss = dspo_loss(
                prediction.chunk(2)[0],
                noisy.target.chunk(2)[0],
                ref_prediction.chunk(2)[0],
                diffusion_dpo_logits(*errors, beta=beta, margin_clip=args.margin_clip),
                beta=beta,
                loss_type=args.loss_type,
            )
        else:
            loss = diffusion_dpo_loss(
                *errors,
                beta=beta,
                loss_type=args.loss_type,
                label_smoothing=args.label_smoothing,
                dmpo_alpha=args.dmpo_alpha,
                soft_labels=inputs.get(args.soft_label_column, args.soft_label) if args.loss_type == "irepo" else None,
                margin_clip=args.margin_clip,
            )
        loss = loss + args.sft_weight * chosen_error
        rewards = tuple(
            -(beta / 2) * (error.detach() - ref_error)
            for error, ref_error in zip((chosen_error, rejected_error), ref_errors, strict=True)
        )
        values = self.pair_metrics(loss, rewards, (chosen_error, rejected_error))
        return {**values, "mse/ref_chosen": ref_errors[0], "mse/ref_rejected": ref_errors[1]}

    def _beta(self, noisy: NoisyPairs) -> float | Tensor:
        """One for all pairs, or `(B,)` by their times."""
        if self.args.beta_schedule == "constant":
            return self.args.beta
        return flow_dpo_beta(self.noise_process.time_of(noisy.model_time.chunk(2)[0]), self.args.beta)

    def _look_up_errors(self, training: bool, keys: list, device: torch.device) -> tuple[Tensor, Tensor]:
        table = self._reference_errors.get("train" if training else f"eval {self.evaluated_name}")
        if table is None:
            raise ValueError(
                "With reference='precomputed' there is no reference to evaluate a new data set with. Pass it to the "
                "trainer as eval_dataset, or use evaluation.preference_accuracy."
            )
        rows = torch.tensor([key[2] for key in keys])
        draws = torch.tensor([key[3] for key in keys]) if training else torch.zeros_like(rows)
        chosen, rejected = table[rows, draws].to(device).unbind(dim=1)
        return chosen, rejected

    def record_step(self, means: dict[str, float]) -> None:
        if self.divergence_guard is not None:
            self.divergence_guard.record(means["mse/chosen"], means["mse/ref_chosen"])

    # ---- Checkpoints of a moving reference -----------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.sync_ref_model and self._writing_checkpoint and self.args.should_save:
            self.reference.save(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.sync_ref_model:
            self.reference.load(Path(resume_from_checkpoint))


def _file_parts(name: str) -> list[str]:
    """Of "train" or "eval <data set>": data sets are called anything, and no two files alike."""
    return [quote(part, safe="") for part in name.split(" ", 1) if part]

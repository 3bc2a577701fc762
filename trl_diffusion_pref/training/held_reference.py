"""The reference that a trainer holds: a model that is called beside the trained one, or what it once computed."""

import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from trl.trainer.utils import disable_dropout_in_model

from ..data import Batch, Mode, NoisyBatch, corrupt
from ..data.layouts import named_datasets
from ..fingerprint import weights_fingerprint
from .callbacks import MoveReference
from .model_setup import starting_fingerprint
from .pipelines import load_reference_model
from .precomputed import PrecomputedValues
from .quantised import check_reference
from .reference_config import ReferenceConfig
from .references import AdapterOff, FrozenModel, Reference, make_reference, resolve_reference
from .run import Run


# From the reference's prediction to one number per sample, `(S B,)`.
ReferenceValue = Callable[[Tensor, NoisyBatch], Tensor]


class HeldReference:
    """The reference of one run. A trainer makes it first, and calls `check` and `setup` where its own steps are.

    Args:
        ref_model: The reference, where it is not the model's start: Hub id, folder, pipeline or denoiser of the same
            architecture.
        args: The trainer's, None for the defaults.

    Attributes:
        live: The model to call; None where its errors are precomputed.
        precomputed: What it computed before; None where it is called.

    Raises:
        ValueError: A `ref_model`, and an option that makes another reference.
    """

    def __init__(
        self, ref_model: str | os.PathLike | DiffusionPipeline | nn.Module | None, args: ReferenceConfig | None
    ) -> None:
        kind = getattr(args, "reference", "auto")
        if ref_model is not None and kind not in ("auto", "precomputed"):
            raise ValueError(
                f"ref_model was passed, but args.reference={kind!r} makes another reference. Leave one out."
            )
        self._ref_model = ref_model
        self.live: Reference | None = None
        self.precomputed: PrecomputedValues | None = None

    # ---- Before the first step -----------------------------------------------------------------------------------

    def check(self, trainer: Run, peft_config: LoraConfig | None) -> None:
        """Raises where the options do not suit the model, see `DiffusionTrainer.check_step`; loads a `ref_model`.

        Raises:
            ValueError: They contradict each other, the kind of training or how it is distributed; or the reference has
                another architecture, or is the trained model itself.
        """
        args, lora = cast(ReferenceConfig, trainer.args), peft_config is not None or trainer.carried_adapter
        kind = resolve_reference(args.reference, lora=lora, carried=trainer.carried_adapter)
        if args.sync_ref_model and args.shards_weights:
            raise ValueError(
                "sync_ref_model is not supported with FSDP and DeepSpeed, whose checkpoints leave it out."
            )
        if kind == "precomputed" and args.shards_weights:
            raise ValueError(
                "reference='precomputed' needs the whole model before training, which no process holds with FSDP and "
                "DeepSpeed. Use DDP, or another reference."
            )
        own = trainer.family.denoiser(trainer.pipeline)
        if self._ref_model is not None:
            self._ref_model = load_reference_model(self._ref_model, own, trainer.family, args)
        if args.sync_ref_model and self._ref_model is not None and lora:
            raise ValueError("sync_ref_model moves ref_model towards the trained weights, and a LoRA has others.")
        if args.sync_ref_model and self._ref_model is None and kind == "adapter_off":
            raise ValueError(
                "sync_ref_model moves the reference's weights, and the reference of a new LoRA is the base model "
                "itself. Use reference='frozen_adapter'."
            )
        check_reference(own, precomputed=kind == "precomputed", moved=args.sync_ref_model and kind == "copy")

    def setup(
        self,
        trainer: Run,
        *,
        own_noise: bool = False,
        also: Mapping[str, ReferenceValue] | None = None,
    ) -> None:
        """Makes the reference from the model before it is trained, see `DiffusionTrainer.setup_step`.

        Args:
            own_noise: As the trainer calls `corrupt`.
            also: What the loss needs of the reference beside its errors, by name in the singular.
        """
        args, model = cast(ReferenceConfig, trainer.args), trainer.model
        lora = isinstance(model, PeftModel)
        self._denoise, self._process, self._own_noise = trainer.denoise, trainer.noise_process, own_noise
        self._values: dict[str, ReferenceValue] = {"error": trainer.denoise.error, **(also or {})}
        if args.disable_dropout:
            disable_dropout_in_model(model)
        kind = resolve_reference(args.reference, lora=lora, carried=trainer.carried_adapter)
        if self._ref_model is not None:
            self.live = FrozenModel(cast(nn.Module, self._ref_model).to(args.device), trainer.accelerator)
            self._ref_model = None
        else:
            # Precomputed or not, the reference of a new LoRA is the base.
            new_lora = kind == "precomputed" and lora and not trainer.carried_adapter
            self.live = make_reference("adapter_off" if new_lora else kind, model, trainer.accelerator)
        if kind == "precomputed":
            self.precomputed = self._precompute(trainer)
            # accelerate keeps what it prepared, and would keep a model of the user's in memory.
            self.live = None
            trainer.accelerator.free_memory()
        if args.sync_ref_model:
            assert self.live is not None
            trainer.checkpointer.parts["reference"] = self.live
            alpha, every = args.ref_model_mixup_alpha, args.ref_model_sync_steps
            trainer.add_callback(MoveReference(self.live, lambda: trainer.unwrapped, alpha, every))

    def _precompute(self, trainer: Run) -> PrecomputedValues:
        args, live = cast(ReferenceConfig, trainer.args), self.live
        if isinstance(live, FrozenModel):
            weights = weights_fingerprint(live.module)
        elif isinstance(live, AdapterOff):
            weights = trainer.checkpointer.record["base_fingerprint"]
        else:
            weights = starting_fingerprint(trainer.model, trainer.checkpointer.record)
        record: dict[str, Any] = {
            "weights": weights,
            "noise process": self._process.describe(training_times=True),
            "resolution": list(trainer.encoder.preparation.shape),
        }
        if args.loss_on_mask:
            record["loss_on_mask"] = True
        if self._own_noise:
            record["own noise"] = True
        names, most = list(self._values), trainer.layout.num_samples
        table = PrecomputedValues(args, names, most, self._of_batch, trainer.row_cache, record)
        none = torch.empty(0, dtype=torch.int64)
        table.compute("train", trainer.train_dataset, trainer.modes.training(none, 0))
        for name, dataset in named_datasets(trainer.eval_dataset):
            table.compute(f"eval {name}", dataset, trainer.modes.evaluation(none, None))
        return table

    def _of_batch(self, batch: Batch, mode: Mode) -> dict[str, Tensor]:
        """`(S, B)` each, for a table."""
        noisy = corrupt(batch, mode, self._process, own_noise=self._own_noise)
        found = self.values_of(self.prediction(noisy), noisy)
        return {name: value.unflatten(0, (-1, len(batch.rows))) for name, value in found.items()}

    # ---- One batch -----------------------------------------------------------------------------------------------

    @property
    def is_precomputed(self) -> bool:
        return self.precomputed is not None

    def at_stored_draws(self, batch: Batch, mode: Mode) -> Mode:
        """How noise is drawn for a batch: as the mode says, or, of precomputed errors, as it was drawn for them."""
        return mode if self.precomputed is None else self.precomputed.at_stored_draws(batch, mode)

    def errors(self, batch: Batch, mode: Mode, noisy: NoisyBatch) -> Tensor:
        """The reference's errors on a noisy batch, `(S B,)` float32 without gradient.

        Args:
            mode: Of `at_stored_draws`.
            noisy: Made with it.
        """
        return self.values(batch, mode, noisy)["error"]

    def values(self, batch: Batch, mode: Mode, noisy: NoisyBatch) -> dict[str, Tensor]:
        """Its errors, as "error", and what `setup` was asked to have beside them, `(S B,)` each."""
        if self.precomputed is not None:
            return self.precomputed.values(batch, mode)
        return self.values_of(self.prediction(noisy), noisy)

    def prediction(self, noisy: NoisyBatch) -> Tensor:
        """The reference's prediction, `(S B, ...)` without gradient; only of one that is called."""
        assert self.live is not None
        with self.live.applied() as module:
            return self._denoise(module, noisy)

    def values_of(self, prediction: Tensor, noisy: NoisyBatch) -> dict[str, Tensor]:
        """What `values` has, of a prediction that is known already."""
        return {name: value(prediction, noisy) for name, value in self._values.items()}

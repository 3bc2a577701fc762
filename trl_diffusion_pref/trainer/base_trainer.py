"""What every trainer of this package does with TRL's and transformers' loop: nothing here knows an algorithm.

transformers' `Trainer` was made for language models. Each override below is there because a diffusers model breaks the
inherited behaviour, several times without an error; the comment at each says how.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import EvalPrediction, TrainerCallback
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import HubStrategy
from trl.trainer.base_trainer import _BaseTrainer

from ..data import latent_shape, on_device
from ..families import family_for
from ..fingerprint import rounded_fingerprints, weights_fingerprint
from ..hub import save_all_but_denoiser, write_model_card
from ..noise import NoiseProcess, RectifiedFlow, noise_process
from ..run_record import write_run_record
from .base_config import DiffusionPreferenceConfig
from .card_options import card_options
from .checkpoints import check_same_base, checkpoint_problem, checkpoint_to_resume
from .denormals import flush_denormals
from .divergence import DivergenceError
from .eval_datasets import all_datasets, for_each_dataset, named_datasets
from .global_generators import restored_generators
from .hooks import TrainerHooks
from .metrics import IntervalMeans, gathered, joined
from .model_argument import check_not_offloaded, hub_id, load_pipeline
from .non_finite import non_finite_error, non_finite_losses, non_finite_weights
from .published import fill_in
from .row_tables import compute_for_rows
from .trainable import (
    apply_gradient_checkpointing,
    carries_adapter,
    check_gradient_checkpointing,
    check_trainable,
    make_trainable,
    taken_out_of_peft_model,
)
from .weight_files import copy_weights, read_denoiser, write_weights


logger = get_logger(__name__)


class DiffusionPreferenceTrainer(_BaseTrainer, TrainerHooks):
    """Base of the trainers: pipeline, adapters, encoding, saving, resuming.

    Subclasses fill in [`TrainerHooks`].
    """

    # compute_loss returns a mean over samples, which transformers then divides by the number of accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline,
        args: DiffusionPreferenceConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        *,
        data_collator: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ) -> None:
        args = self._own_args(args, model)
        self._check_datasets(train_dataset, eval_dataset)
        self.pipeline = load_pipeline(model, args.model_init_kwargs)
        self.family = family_for(self.pipeline)
        self.family.check_complete(self.pipeline)
        check_not_offloaded(self.pipeline)
        self.noise_process = self.make_noise_process(args)
        flow = isinstance(self.noise_process, RectifiedFlow)
        fill_in(args, self._name, self.family.pipeline_class, flow=flow)
        args.check_filled_in()
        # Whatever is refused in here, the caller has the pipeline back as it was.
        with taken_out_of_peft_model(self.pipeline, self.family) as (base, wrapper):
            # Whether the model came with an adapter, which is trained on.
            self._adapter_before = carries_adapter(base)
            self._base_model = hub_id(model)
            self._base_fingerprint = weights_fingerprint(base)
            self._rounded_fingerprints = rounded_fingerprints(base)
            check_same_base(Path(args.output_dir), self._base_fingerprint)

            check_trainable(base, self.family, peft_config, wrapper)
            check_gradient_checkpointing(args, self.family, base)

            self._metrics = IntervalMeans()
            # By model: one of the weights that its dtype is asked of.
            self._typical_weight: WeakKeyDictionary[nn.Module, nn.Parameter] = WeakKeyDictionary()
            self._writing_checkpoint = False
            self._pipeline_pushed = False
            encoded_train, encoded_eval = self._encode(args, train_dataset, eval_dataset)
            # Only now are its parts changed, when all that can be refused has been.
            denoiser = make_trainable(base, self.pipeline, self.family, peft_config, wrapper)
            apply_gradient_checkpointing(base, args)
        super().__init__(
            model=denoiser,
            args=args,
            data_collator=data_collator or self.make_collator(),
            train_dataset=encoded_train,
            eval_dataset=encoded_eval,
            compute_metrics=self._mean_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Which of several evaluation data sets is being evaluated; "" where there is one.
        self.evaluated_name: str | None = ""

    # ---- Construction --------------------------------------------------------------------------------------------

    def _own_args(self, args: DiffusionPreferenceConfig | None, model: Any) -> DiffusionPreferenceConfig:
        """A copy that can be changed without the caller noticing."""
        if args is None:
            name = Path(model).name if isinstance(model, (str, os.PathLike)) else type(model).__name__
            args = self.config_class(output_dir=f"{name}-{self._name}")
        if not isinstance(args, self.config_class):
            raise TypeError(
                f"args is a {type(args).__name__}; {type(self).__name__} takes a {self.config_class.__name__}."
            )
        return args.own_copy()

    def make_noise_process(self, args: DiffusionPreferenceConfig, image_tokens: int | None = None) -> NoiseProcess:
        """The process of the pipeline's scheduler with the run's options.

        Called before anything is encoded, so that what cannot be trained is refused at once, and again where the
        images' tokens are needed.

        Raises:
            ValueError: The options are not for this process.
        """
        return noise_process(
            self.pipeline.scheduler,
            image_tokens,
            timestep_sampling=args.timestep_sampling,
            timestep_shift=args.timestep_shift,
        )

    def _check_datasets(self, train_dataset: Any, eval_dataset: Any) -> None:
        self.check_dataset(train_dataset, "train_dataset")
        for_each_dataset(self.check_dataset, eval_dataset)

    def _encode(self, args: DiffusionPreferenceConfig, train_dataset: Any, eval_dataset: Any) -> tuple[Any, Any]:
        """Both encoded; the encoders are where streams need them afterwards, and else out of the way."""
        streaming = self._streaming(all_datasets(train_dataset, eval_dataset), args)
        if streaming:
            self._move_encoders(args.device)
        # The first process fills the cache, the others read it.
        with args.main_process_first(), on_device(self.pipeline, self.family, args.device):
            if isinstance(self.noise_process, RectifiedFlow) and self.noise_process.shift is None:
                shape = latent_shape(self.pipeline, self.family, args.resolution, args.num_frames)
                self.noise_process = self.make_noise_process(args, self.family.image_tokens(shape))
            self._prepare_encoding(args, train_dataset, eval_dataset)
            encoded = self.encode_dataset(train_dataset, args, "train_dataset"), self._encode_eval(eval_dataset, args)
        if not streaming:
            # Also those of a pipeline that was passed on an accelerator: training does not need them.
            self._move_encoders(torch.device("cpu"))
        return encoded

    @staticmethod
    def _streaming(datasets: list[Dataset | IterableDataset], args: DiffusionPreferenceConfig) -> bool:
        """Whether any is a stream.

        Raises:
            ValueError: It is, with workers to read it.
        """
        streaming = any(isinstance(dataset, IterableDataset) for dataset in datasets)
        if streaming and args.dataloader_num_workers > 0:
            raise ValueError(
                f"dataloader_num_workers={args.dataloader_num_workers}: a streamed data set is encoded as it is read, "
                "by the pipeline's encoders in the training process, and each worker would count its rows from 0. Set "
                "dataloader_num_workers=0."
            )
        return streaming

    def _move_encoders(self, device: torch.device) -> None:
        for encoder in self.family.encoders(self.pipeline):
            encoder.to(device).eval()

    def _encode_eval(self, eval_dataset: Any, args: DiffusionPreferenceConfig) -> Any:
        return for_each_dataset(lambda dataset, what: self.encode_dataset(dataset, args, what), eval_dataset)

    def _send_telemetry(self) -> None:
        """TRL's reads `model.config.model_type`, which diffusers models lack, and runs only where CI is unset."""

    # ---- Training ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains; see [`~transformers.Trainer.train`].

        `resume_from_checkpoint=True` takes the newest checkpoint that was written whole. One that a killed process
        left unfinished is named in a warning; given by path it is refused.

        Raises:
            ValueError: No complete checkpoint to resume from, or one of another base model.
            NonFiniteLossError: NaN or infinite loss.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, Path(self.args.output_dir), self._base_fingerprint)
        self._undo_preparation_by_evaluation()
        self._metrics = IntervalMeans()
        self.start_of_training(checkpoint)
        try:
            with flush_denormals(self.args.device):
                result = super().train(resume_from_checkpoint=checkpoint and str(checkpoint), **kwargs)
        finally:
            # The pipeline is there to sample from, also where a run stopped: no dropout.
            self.model.eval()
        # Not after a stop, while gradients are still in memory.
        self._move_encoders(self.args.device)
        return result

    def _undo_preparation_by_evaluation(self) -> None:
        """Lets training prepare the model again after an evaluation.

        An evaluation before training prepares the model without DDP, and accelerate prepares a model only once: the
        processes would then train apart without exchanging gradients, and nothing would be raised.
        """
        prepared = getattr(self.model, "_is_accelerate_prepared", False)
        inner = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        if prepared and inner is self.model and not self.shards_weights:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False
            self.model_wrapped = self.model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a batch; keeps its metrics for the next log."""
        values = self.sample_values(model, inputs, self.random_keys(inputs, training=model.training))
        loss = values["loss"].mean()
        if model.training:
            self._record(values, inputs["row"])
        return (loss, values) if return_outputs else loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.arranged(super()._prepare_inputs(inputs))

    def _record(self, values: dict[str, Tensor], rows: Tensor) -> None:
        """Averages a batch's values over all processes; stops everywhere at once if a loss is not finite."""
        samples, names = gathered(values, self.accelerator), list(values)
        problem = non_finite_losses(samples[:, names.index("loss")], rows, self.accelerator)
        if problem:
            self._save_before_stopping()
            raise non_finite_error(self.state.global_step + 1, problem, Path(self.args.output_dir))
        means = dict(zip(names, samples.mean(dim=0).tolist(), strict=True))
        # transformers logs the loss.
        self._metrics.add({name: mean for name, mean in means.items() if name != "loss"})
        self.record_step(means)

    def _save_before_stopping(self) -> None:
        """Keeps the weights of the last whole step, unless they are kept already, untrained or themselves wrecked."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        finite = not non_finite_weights(self.model)
        if self.state.global_step > 0 and finite and checkpoint_problem(folder) is not None:
            self._save_checkpoint(self.model, trial=None)

    def report_divergence(self, what: str, advice: str, *, stop: bool) -> None:
        """Warns, or saves a checkpoint and stops the run.

        Raises:
            DivergenceError: Where `stop` is set.
        """
        if not stop:
            logger.warning(f"{what} {advice}")
            return
        self._save_checkpoint(self.model, trial=None)
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        raise DivergenceError(f"{what} Training stopped; the weights are in {checkpoint}. {advice}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics' means since the last log to training logs."""
        if "loss" in logs:
            logs |= self._metrics.take()
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The inherited rule goes by names and decays GroupNorm weights called `norm1`; this one goes by types."""
        norms = [nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, RMSNorm]
        return get_parameter_names(model, norms, [r"bias"])

    # ---- Evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates; see [`~transformers.Trainer.evaluate`]. A data set given here is encoded first, like the others.

        Noise and timesteps depend on (seed, row) alone, so that two evaluations of the same weights agree.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            # The loop calls this again for each of several data sets, which are encoded by then.
            if not all(
                isinstance(dataset, (Dataset, IterableDataset)) and self.is_encoded(dataset)
                for _, dataset in named_datasets(eval_dataset)
            ):
                for_each_dataset(self.check_dataset, eval_dataset)
                if self._streaming(all_datasets(None, eval_dataset), self.args):
                    self._move_encoders(self.args.device)
                with self.args.main_process_first(), on_device(self.pipeline, self.family, self.args.device):
                    self._prepare_encoding(self.args, None, eval_dataset)
                    eval_dataset = self._encode_eval(eval_dataset, self.args)
        self.evaluated_name = eval_dataset if isinstance(eval_dataset, str) else "" if eval_dataset is None else None
        # The loaders draw from the global generators, which would shift dropout masks in the training that follows.
        with restored_generators(self.args.device):
            return super().evaluate(eval_dataset, *args, **kwargs)

    def named_eval_datasets(self) -> Iterator[tuple[str, Dataset | IterableDataset]]:
        """The evaluation data sets by the names under which `evaluate` runs them."""
        return named_datasets(self.eval_dataset)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered: a denoiser's outputs at random noise are no predictions of a data set."""
        raise NotImplementedError("Sample with trainer.pipeline, or call evaluate() for metrics of a data set.")

    @property
    def shards_weights(self) -> bool:
        """Whether no process holds all weights, so that the model cannot be called before training."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def map_rows(self, dataset: Dataset, compute: Callable[[dict[str, Tensor]], Tensor], batch_size: int) -> Tensor:
        """Computes something for each row with all processes, without gradients and in the run's precision.

        Args:
            dataset: Encoded.
            compute: From a batch on the device to a tensor `(B, ...)`.

        Returns:
            `(len(dataset), ...)` float32 on the CPU, in order, in every process.
        """
        # Every row counts here, whatever training does with a last batch that is not full.
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            loader = self._get_dataloader(dataset, "Precomputation", batch_size, SequentialSampler)
        finally:
            self.args.dataloader_drop_last = drop_last
        with restored_generators(self.args.device):
            batches = map(self._prepare_inputs, loader)
            return compute_for_rows(batches, compute, self.model, self.accelerator, len(dataset))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Per-sample values as "predictions", so that the loop gathers them and drops the padding of the last batch.

        The inherited step finds no labels and would return no loss at all.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            values = self.sample_values(model, inputs, self.random_keys(inputs, training=False))
        self._evaluated_names = list(values)
        return None, torch.stack([values[name].float() for name in values], dim=1), inputs["row"]

    def _mean_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        means = joined(prediction.predictions).astype(np.float64).mean(axis=0)
        return dict(zip(self._evaluated_names, means.tolist(), strict=True))

    # ---- Saving and loading --------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        bad = non_finite_weights(self.model)
        if bad:
            what = f"the weights of {bad[0]} are not finite, so no checkpoint was written"
            raise non_finite_error(self.state.global_step, what, Path(self.args.output_dir))
        self._writing_checkpoint = True
        try:
            if self.args.should_save:
                # Here and not with the weights: sharded weights (FSDP) are not written by `_save`.
                folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
                folder.mkdir(parents=True, exist_ok=True)
                write_run_record(folder, self._run_record())
            super()._save_checkpoint(model, trial)
        finally:
            self._writing_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Full training: a diffusers folder (in checkpoints the denoiser's alone). LoRA: PEFT's files and diffusers'.

        The inherited method writes bare weights without a config, and for LoRA only files that `load_lora_weights`
        passes over in silence.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(
            self._unwrapped,
            self.pipeline,
            self.family,
            folder,
            state_dict,
            whole_pipeline=not self._writing_checkpoint,
        )
        write_run_record(folder, self._run_record())
        torch.save(self.args, folder / "training_args.bin")
        # Last, because PEFT writes a card of its own.
        self._write_card(folder, Path(self.args.output_dir).name if self._writing_checkpoint else folder.name)

    def dtype_of(self, model: nn.Module) -> torch.dtype:
        """What a denoiser's weights are in now; a full half-precision evaluation and DeepSpeed cast them."""
        if model in self._typical_weight:
            return self._typical_weight[model].dtype
        inside = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        dtype = (inside.get_base_model() if isinstance(inside, PeftModel) else inside).dtype
        # A walk through all modules takes longer than small models' kernels. Casting leaves the parameters
        # the same objects, sharding does not; under layerwise casting none has the dtype that is computed in.
        weight = next((weight for weight in inside.parameters() if weight.dtype == dtype), None)
        if weight is not None and not self.shards_weights:
            self._typical_weight[model] = weight
        return dtype

    @property
    def _unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _run_record(self) -> dict[str, Any]:
        return {
            "trainer": type(self).__name__,
            "base_model": self._base_model,
            "base_fingerprint": self._base_fingerprint,
            "base_fingerprint_rounded": self._rounded_fingerprints,
            "pipeline_class": self.family.pipeline_class,
            "negative": self.trains_negative,
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Reads diffusers' file names, which the inherited method does not find."""
        if isinstance(self._unwrapped, PeftModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        read_denoiser(self._unwrapped, self.family, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """The inherited method only warns when it finds no file that it knows, and keeps the last weights."""
        if isinstance(self._unwrapped, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        read_denoiser(self._unwrapped, self.family, Path(self.state.best_model_checkpoint))

    # ---- Hub -----------------------------------------------------------------------------------------------------

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The inherited method copies files by names that a diffusers checkpoint lacks, and so pushes no weights."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        checkpoint, output_dir = Path(checkpoint_folder), Path(self.args.output_dir)
        lora = isinstance(self._unwrapped, PeftModel)
        copy_weights(self.family, checkpoint, output_dir, lora=lora)
        if not lora and not self._pipeline_pushed:
            # The frozen parts once; what lies in the folder may be another run's.
            save_all_but_denoiser(self.pipeline, self.family, output_dir)
            self._pipeline_pushed = True
        self.create_model_card(model_name=(self.args.hub_model_id or output_dir.name).split("/")[-1])
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes `README.md` into the output folder: what was trained, with which options, how to sample from it."""
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir), model_name, dataset_name, tags)

    def _write_card(
        self,
        folder: Path,
        model_name: str | None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        write_model_card(
            folder,
            method=self._method or self._name,
            negative=self.trains_negative,
            paper=self._paper,
            pipeline=self.pipeline,
            family=self.family,
            base_model=self._base_model,
            base_fingerprint=self._base_fingerprint,
            lora=isinstance(self._unwrapped, PeftModel),
            options=card_options(self.args, self.config_class, self.sample_name, self.state.global_step),
            model_name=model_name,
            repo_id=self.hub_model_id,
            dataset_name=dataset_name,
            tags=[*self._tag_names, *(["negative-model"] if self.trains_negative else []), *tags],
        )

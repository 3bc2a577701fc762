"""transformers' loop for a denoiser: the order of a run, and what a diffusers model breaks in it. Knows no algorithm.

transformers' `Trainer` was made for language models. Each override below is there because a diffusers model breaks the
inherited behaviour, several times without an error; the comment at each says how.
"""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import EvalPrediction, TrainerCallback
from transformers.trainer_pt_utils import get_parameter_names
from trl.trainer.base_trainer import _BaseTrainer

from ..data import Batch, EncodedDataset, EncodedStream, Layout, Mode, data_record
from ..data.pair_source import RowSource
from ..diffusion.noise import RectifiedFlow
from ..evaluation import HeldOutPreferences
from ..export.model_card import write_model_card
from ..export.weights import lora_config, run_record
from . import loaders, model_setup, pipelines
from .callbacks import EpochOfStream, SetEpoch, make_trackers_start
from .checkpoint import Checkpointer
from .config import AnyDataset, DiffusionPreferenceConfig
from .denoiser import Denoiser
from .ema import weights_to_evaluate
from .held_out import held_out_preferences
from .hub import check_token
from .metrics import UNLOGGED, each_row_once, means_of, padded
from .modes import Modes
from .monitor import StepMonitor
from .plots import plot_run
from .process_state import flush_denormals, restored_generators
from .recommended import fill_in
from .row_cache import RowCache
from .saving import SavingTrainer
from .sharded import check_sharding


class DiffusionTrainer(SavingTrainer, _BaseTrainer):
    """The one class above an algorithm, which sets `config_class`, `layout` and TRL's `_name`, `_tag_names`, `_paper`,
    and implements `compute_losses`; and `setup_step` where its step needs more than the model.

    Args:
        model: Hub id, folder or loaded pipeline. A loaded one is trained in place: afterwards it samples with the
            tuned weights or the LoRA. One that carries an adapter (`load_lora_weights`) goes on training that adapter.
        args: Options; copied, never changed. Default: the defaults, with an output folder named after the model.
        train_dataset: Column `prompt` (str) and those of the layout: what the pipeline generates, images
            (`datasets.Image`, or paths), videos (lists of such frames, or files) or audio (`datasets.Audio`, paths, or
            arrays). A streamed data set is encoded as it is read, any other once before training.
        eval_dataset: The same, or a dictionary of such data sets.
        data_collator, callbacks, optimizers: As in [`~transformers.Trainer`]; the collator takes encoded rows.
        peft_config: Trains a LoRA instead of all weights. Default `target_modules`: the family's.

    Raises:
        ValueError: Data sets or rows that cannot be used (row and column named), options that do not suit the model.
        TypeError: The model is no supported pipeline, or an argument that only other trainers take.
    """

    args: DiffusionPreferenceConfig
    model: nn.Module
    config_class: ClassVar[type[DiffusionPreferenceConfig]]
    layout: Layout = Layout()
    sample_name = "samples"  # what a batch is made of, for the model card
    several_sizes = True  # whether batches may have samples of another size than the square's
    trains_negative = False  # whether the result is a model of what is not wanted, for `guidance.negative_guidance`
    # compute_loss returns a mean over samples, which transformers then divides by the number of accumulation steps.
    loss_is_scaled_for_ga = False  # type: ignore[assignment]  # TRL's is None
    pipeline = property(lambda self: self.encoders.whole_pipeline())  # reads encoders that left memory again
    plot = plot_run

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
        **not_taken: Any,
    ) -> None:
        model_setup.check_arguments(type(self).__name__, self.config_class, args, not_taken)
        # Options, then columns, then weights: nobody should load 20 GB to learn that a column is missing.
        args = args or self.config_class(output_dir=f"{pipelines.short_name(model)}-{self._name}")
        self.args = args = args.own_copy()
        args.check_data(train_dataset, eval_dataset)
        check_token(args)
        self.family = pipelines.family_of(model, args.loading).with_denoiser(args.denoiser)
        train_dataset, eval_dataset = loaders.with_condition_columns(train_dataset, eval_dataset, self.family)
        data = (train_dataset, eval_dataset)
        self.layout = loaders.layout_of(self.make_layout(), self.family, *data, loss_on_mask=args.loss_on_mask)
        self.trains_negative = self.trains_negative or getattr(args, "negative", False)
        loading = pipelines.loading_options(model, args, self.family, lora=peft_config is not None)
        *given, sources = loaders.rows_of(*data, self.layout, self.family, args, self.prepare_rows)
        pipeline = pipelines.load_pipeline(model, loading)
        self.encoders = pipelines.encoders_of(model, pipeline, self.family, loading)
        self.family.check_complete(pipeline)
        pipelines.check_not_offloaded(pipeline)
        self.noise_process = args.noise_process(pipeline.scheduler)
        fill_in(args, self._name, self.family, flow=isinstance(self.noise_process, RectifiedFlow))
        args.check_filled_in()
        # On an error within, the caller has the pipeline back as it was.
        with model_setup.taken_out_of_peft_model(pipeline, self.family) as (base, wrapper):
            self.carried_adapter = model_setup.carries_adapter(base)
            record = run_record(type(self).__name__, *pipelines.origin(model), base, self.family, self.trains_negative)
            self.checkpointer = Checkpointer(self.encoders, Path(cast(str, args.output_dir)), record)
            self.checkpointer.check_output_dir()
            model_setup.check_trainable(base, self.family, peft_config, wrapper, args)
            self.check_step(peft_config)
            self.encoder = loaders.encoder_for(self.encoders, self.layout, args, given, self.several_sizes)
            train_dataset, eval_dataset = self.encoder.encode_all(given[0], given[1], args.device, sources)
            # Also those of a pipeline that was passed on an accelerator: training does not need them.
            self.encoders.leave_device()
            if isinstance(self.noise_process, RectifiedFlow) and self.noise_process.shift is None:
                self.noise_process = loaders.sized_process(args, pipeline.scheduler, self.family, self.encoder)
            # Only now are its parts changed, when all that can be wrong has been checked.
            self.noise_process = self.noise_process.within(*self.family.trained_times(pipeline))
            denoiser = model_setup.make_trainable(base, pipeline, self.family, peft_config, wrapper, args)
        super().__init__(
            model=denoiser,
            args=args,
            data_collator=data_collator or self.encoder.collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=self._mean_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_sharding(args, self.accelerator)
        loaders.check_one_size(train_dataset, self.several_sizes)
        self.checkpointer.record["data"] = data_record(given[0], train_dataset, self.layout)
        self.stream = loaders.stream_loader(train_dataset, args)
        make_trackers_start(self.callback_handler.callbacks)
        self.add_callback(SetEpoch(train_dataset) if self.stream is None else EpochOfStream())
        if self.stream is not None:
            self.checkpointer.parts["stream"], args.ignore_data_skip = self.stream, True  # it knows its place
        self.modes = Modes(args, self.encoder)
        shards, on_mask = self.shards_weights, args.loss_on_mask
        self.denoise = Denoiser(self.family, self.accelerator, sharded=shards, loss_on_mask=on_mask)
        self._evaluated: str | None = "eval "  # see `Mode.dataset`
        self.monitor = StepMonitor(args, self.accelerator, self.checkpointer, self._save_now, self.noise_process)
        if args.use_ema:  # before the monitor, which may save
            self.add_callback(self.checkpointer.average(self.model, args))
        self.add_callback(self.monitor)
        depends_on = {"negative": self.trains_negative, "prompts": self.encoder.prompts.encoded_with}
        self.row_cache = RowCache(self.accelerator, self.model, self._batches_in_order, args, depends_on)
        self.held_out = held_out_preferences(self)
        self.setup_step()

    # ---- What an algorithm says ----------------------------------------------------------------------------------

    def make_layout(self) -> Layout:
        """The columns to read; `self.args` and `self.family` are known, weights are not loaded yet."""
        return self.layout

    def prepare_rows(self, dataset: AnyDataset, label: str) -> tuple[AnyDataset, RowSource | None]:
        """A data set as the user passed it in rows of the layout, and what they were made of; `layout` is known."""
        return loaders.pairs_of(dataset, label, self.args) if self.layout.is_pairs else (dataset, None)

    def check_step(self, peft_config: LoraConfig | None) -> None:
        """Raises where the options do not suit the model; called before anything is encoded."""

    def setup_step(self) -> None:
        """Makes what the step needs beside the model: constants of the loss, a reference, a pool."""

    def row_weights(self) -> Tensor | None:
        """How often training draws each row, relative to others, `(N,)` from 0 on; None: each once in an epoch."""
        return None

    @abstractmethod
    def compute_losses(self, model: nn.Module, batch: Batch, mode: Mode) -> dict[str, Tensor]:
        """The algorithm: from a batch to the losses.

        Args:
            model: The trained denoiser, possibly wrapped; `self.denoise(model, noisy)` calls it.
            batch: On the device.
            mode: How to draw noise and prompts; everything in which evaluation differs from training.

        Returns:
            `(B,)` float32 tensors: `loss` with gradient, and the metrics by their logged names. `time`, the denoiser's
            times, is not logged; the divergence guard reads it, with `mse/chosen` and `mse/ref_chosen`.
        """

    # ---- Construction --------------------------------------------------------------------------------------------

    def _batches_in_order(self, dataset: EncodedDataset | EncodedStream, batch_size: int) -> Iterator[Batch]:
        """Every row of an encoded data set, whatever training does with a last batch that is not full."""
        loader = loaders.evaluation_loader(dataset, self.args, self.data_collator, batch_size)
        if loader is None:
            with self.args.changed(dataloader_drop_last=False):
                loader = self._get_dataloader(dataset, "Precomputation", batch_size, SequentialSampler)  # type: ignore[arg-type]
        return map(self._prepare_inputs, loader)

    def get_train_dataloader(self) -> Any:
        """The inherited loader knows neither buckets nor how a stream is shared and resumed."""
        if self.stream is not None:
            return self.stream
        own = loaders.training_loader(self.train_dataset, self.args, self.data_collator, self.row_weights())
        return own or super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The same for evaluation."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset  # type: ignore[index]
        own = loaders.evaluation_loader(dataset, self.args, self.data_collator, self.args.eval_batch_size)
        return own or super().get_eval_dataloader(eval_dataset)

    def _send_telemetry(self) -> None:
        """TRL's reads `model.config.model_type`, which diffusers models lack, and runs only where CI is unset."""

    # ---- Training ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; see [`~transformers.Trainer.train`].

        `resume_from_checkpoint=True` takes the newest checkpoint that is whole and did not diverge; `"auto"` starts
        where there is none. Unfinished ones are named in a warning, and errors by path. SIGTERM and SIGUSR1 save.

        Raises:
            ValueError: No complete checkpoint to resume from, or one of another base model or kind of training.
            NonFiniteLossError: NaN or infinite loss.
            Preempted: A signal ended the run after a step, which is saved; a `SystemExit` with status 0.
        """
        checkpoint = self.checkpointer.to_resume(resume_from_checkpoint, self.unwrapped, sharded=self.shards_weights)
        if not self.shards_weights and model_setup.undo_preparation(self.model, self.model_wrapped, self.accelerator):
            self.model_wrapped = self.model
        self.modes = Modes(self.args, self.encoder)
        self.monitor.reset()
        self.checkpointer.read_parts(checkpoint, self.args.process_index, self.args.world_size)
        self.encoders.release()
        try:
            stream = closing(self.stream) if self.stream else nullcontext()
            with flush_denormals(self.args.device), self.monitor.stop_signal.listening(), stream:
                result = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        finally:
            self.model.eval()  # to sample from, also where a run stopped: no dropout
        self.encoders.move(self.args.device)  # not after a stop, while gradients are still in memory
        return result

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The loop looks at max_steps only after a step, so that a run resumed at its end would take one too many."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _prepare_inputs(self, inputs: Any) -> Batch:  # type: ignore[override]  # transformers' is a dictionary
        batch = Batch.from_collated(super()._prepare_inputs(inputs))
        return batch.in_reverse() if getattr(self.args, "negative", False) else batch

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        """Mean loss of a batch; keeps its metrics for the next log."""
        if model.training:
            mode = self.modes.training(inputs.rows, self.state.global_step)
        else:
            mode = self.modes.evaluation(inputs.rows, self._evaluated)
        values = self.compute_losses(model, inputs, mode)
        if model.training:
            self.monitor.record(self.model, values, inputs.rows, self.state.global_step)
        loss = values["loss"].mean()
        return (loss, values) if return_outputs else loss

    def _save_now(self) -> Path:
        """Writes a checkpoint of this step, and removes no other to make room for it."""
        with self.args.changed(save_total_limit=None):
            self._save_checkpoint(self.model, trial=None)
        return self.checkpointer.folder(self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics' means since the last log to training logs."""
        if "loss" in logs:
            logs |= self.monitor.take_means()
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The inherited rule goes by names and decays GroupNorm weights called `norm1`; this one goes by types."""
        return get_parameter_names(model, [nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, RMSNorm], [r"bias"])

    # ---- Evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates; see [`~transformers.Trainer.evaluate`]. A data set given here is encoded first, like the others.

        Noise and timesteps depend on (seed, row) alone, so that two evaluations of the same weights agree.
        """
        model_setup.check_can_evaluate(self.accelerator, trained=self.optimizer is not None)
        eval_dataset = loaders.encoded_for_evaluation(eval_dataset, self.encoder, self.args, self.prepare_rows)
        self._evaluated = f"eval {eval_dataset or ''}" if isinstance(eval_dataset, str | None) else None
        # All of a batch, padding included; `_mean_metrics` takes each row once. The loop resets it afterwards.
        self.gather_function = self.accelerator.gather
        # The loaders draw from the global generators, which would shift dropout masks in the training that follows.
        with restored_generators(self.args.device):
            return super().evaluate(eval_dataset, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Per-sample values as "predictions", and rows as "labels", which the loop gathers.

        The inherited step finds no labels and would return no loss at all.
        """
        batch, values = self._prepare_inputs(inputs), dict[str, Tensor]()
        for prefix, weights in weights_to_evaluate(self.checkpointer.ema):
            with weights, torch.no_grad(), self.compute_loss_context_manager():
                own = self.compute_losses(model, batch, self.modes.evaluation(batch.rows, self._evaluated))
                if self.held_out is not None:
                    own |= self.held_out.values(self.denoise.of(model), batch, self._evaluated)
            values |= {f"{prefix}{name}": value for name, value in own.items() if name not in UNLOGGED}
        self._evaluated_names = list(values)
        table = torch.stack([value.float() for value in values.values()], dim=1)
        return None, *padded((table, batch.rows), self.args.eval_batch_size)

    def _mean_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        rows, values = each_row_once(prediction.label_ids, prediction.predictions)
        means = means_of(self._evaluated_names, values)
        return {**means, **HeldOutPreferences.interval(self._evaluated_names, values, rows)}

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered: a denoiser's outputs at random noise are no predictions of a data set."""
        raise NotImplementedError("Sample with trainer.pipeline, or call evaluate() for metrics of a data set.")

    def create_model_card(  # type: ignore[override]  # TRL's arguments
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Writes `README.md`: what was trained, with which options, how to sample from it."""
        if not self.is_world_process_zero():
            return
        write_model_card(
            folder or self.checkpointer.output_dir,
            method=self._name,
            paper=self._paper,
            pipeline=self.encoders.pipeline,
            family=self.family,
            record=self.checkpointer.record,
            lora=lora_config(self.unwrapped) if isinstance(self.unwrapped, PeftModel) else None,
            args=self.args,
            batch=self.sample_name,
            state=self.state,
            model_name=model_name,
            repo_id=self.hub_model_id or self.args.hub_model_id,
            dataset_name=dataset_name,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or ())],
        )

"""What a trainer writes and reads: transformers' methods for it, of which several would lose a diffusers model."""

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..data import Encoders
from ..export.weights import load_denoiser_weights
from ..families import Family
from .checkpoint import SCHEDULE
from .hub import PushingTrainer
from .monitor import StepMonitor
from .sharded import is_sharded_checkpoint, read_adapter, read_optimizer, read_weights


class SavingTrainer(PushingTrainer):
    """The part of `DiffusionTrainer` about files; `checkpointer` writes and reads them."""

    encoders: Encoders
    family: Family
    monitor: StepMonitor
    model: nn.Module
    optimizer: Any  # accelerate's, once training has begun
    lr_scheduler: Any

    @property
    def shards_weights(self) -> bool:
        """Whether no process holds all weights, so that the model cannot be called before training."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def unwrapped(self) -> nn.Module:
        """The trained denoiser, or the PEFT model around it, without what accelerate and torch wrap it in."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.monitor.check_weights(self.model, self.state.global_step)
        # Before the weights: sharded weights (FSDP) are not written by `_save`, and what makes it count comes last.
        folder = Path(self._get_output_dir(trial)) / self.checkpointer.folder(self.state.global_step).name
        self.checkpointer.write_parts(folder, self.args.process_index, should_save=self.args.should_save)
        self.accelerator.wait_for_everyone()
        with self.checkpointer.writing_checkpoint():
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The inherited method writes weights without a config, and LoRA files that `load_lora_weights` ignores."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.checkpointer.output_dir)
        self.checkpointer.write_weights(self.unwrapped, folder, state_dict, self.args)
        # Last, because PEFT writes a card of its own.
        name = (self.checkpointer.output_dir if self.checkpointer.writing else folder).name
        cast(Any, self).create_model_card(name, folder=folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Reads diffusers' file names, which the inherited method does not find, and into shards what was whole."""
        folder, trained = Path(resume_from_checkpoint), self.unwrapped
        as_now = is_sharded_checkpoint(folder) == self.is_fsdp_enabled
        if as_now and (isinstance(trained, PeftModel) or self.is_fsdp_enabled):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif isinstance(trained, PeftModel):
            read_weights(self.model_wrapped, read_adapter(trained, folder))
        elif self.is_fsdp_enabled:
            read_weights(self.model_wrapped, load_denoiser_weights(folder / self.family.denoiser_name))
        else:
            self.checkpointer.read_denoiser(trained, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The inherited method reads what was written with weights as they are now: sharded, or whole."""
        sharded = self.is_fsdp_enabled
        if checkpoint is None or self.is_deepspeed_enabled or is_sharded_checkpoint(Path(checkpoint)) == sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        read_optimizer(Path(checkpoint), self.model, self.optimizer.optimizer, sharded=sharded)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULE, weights_only=True))

    def _load_best_model(self) -> None:
        """The inherited method only warns when it finds no file that it knows, and keeps the last weights."""
        if isinstance(self.unwrapped, PeftModel) or self.shards_weights:
            super()._load_best_model()
        else:
            self.checkpointer.read_denoiser(self.unwrapped, Path(cast(str, self.state.best_model_checkpoint)))

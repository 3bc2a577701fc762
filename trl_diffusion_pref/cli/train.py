"""Training from the command line: one command for each trainer of the table `TRAINERS`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor

from ..data.encoded import EncodedDataset
from ..memory import estimate_memory
from ..training.config import DiffusionPreferenceConfig
from ..training.trainer import DiffusionTrainer
from .command import Command
from .data_sets import training_data
from .launch import config_file, launch, should_launch
from .parser import Parsed
from .resolved import options_table, resolved_options, write_run_yaml
from .run_options import DataOptions, LaunchOptions, LoraOptions, ModelOptions


Trainer = type[DiffusionTrainer]


def training_command(name: str, config_class: type[DiffusionPreferenceConfig], trainer_class: Trainer) -> Command:
    """The command that trains with one trainer."""
    kinds = [ModelOptions, DataOptions, LoraOptions, LaunchOptions, config_class]
    summary = f"trains with {trainer_class.__name__}: {trainer_class._paper['title']}"
    return Command(name, summary, kinds, partial(_run, name, trainer_class))


def build_trainer(trainer_class: Trainer, parsed: Parsed) -> DiffusionTrainer:
    """The trainer that a command line asks for, with its data encoded."""
    model, data, lora, _, config = parsed.options
    # The columns that the trainer needs; which ones is an option of some.
    train, evaluation = training_data(data, config, trainer_class.layout)
    return trainer_class(model.model, config, train, evaluation, peft_config=lora.peft_config)


def _run(name: str, trainer_class: Trainer, parsed: Parsed, words: Sequence[str]) -> int:
    start: LaunchOptions = parsed.options[3]
    if start.accelerate_config is not None:
        # A wrong name is found here also in the processes that were launched.
        config_file(start.accelerate_config)
    if should_launch(start):
        config = parsed.options[-1]
        return launch(start, name, words, "bf16" if config.bf16 else "fp16" if config.fp16 else "no")
    trainer = build_trainer(trainer_class, parsed)
    resolved = resolved_options(parsed, trainer)
    main = PartialState().is_main_process
    if start.dry_run:
        if main:
            print(dry_run_report(trainer, parsed, options_table(resolved)))
        return 0
    folder = Path(str(trainer.args.output_dir))
    if main:
        write_run_yaml(folder, name, resolved)
    train(trainer)
    if main:
        print(f"The result is in {folder}.")
    return 0


def train(trainer: DiffusionTrainer) -> None:
    """Trains, saves what users load and the log, and pushes it where the config says so."""
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def dry_run_report(trainer: DiffusionTrainer, parsed: Parsed, options: str) -> str:
    """What a run would do: options, data, room on disk, memory."""
    model, _, lora, _, config = parsed.options
    lines = ["Options", options, "", "Data"]
    for name, dataset in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset)):
        lines.append(f"  {name}: {_described(dataset)}")
    try:
        estimate = str(estimate_memory(model.model, config, lora.peft_config))
    # What it cannot estimate is no reason against the run.
    except (ValueError, TypeError) as error:
        estimate = f"cannot be estimated: {error}"
    lines += ["", "Memory of one device", *(f"  {line}" for line in estimate.splitlines())]
    return "\n".join([*lines, "", "Dry run: nothing was trained."])


def _described(dataset: Any) -> str:
    if dataset is None:
        return "none"
    if not isinstance(dataset, EncodedDataset):
        return "streamed, encoded as it is read"
    left_out = sum(dataset.left_out.values())
    row = {name: value.nbytes for name, value in dataset[0].items() if isinstance(value, Tensor)}
    samples = f", {len(dataset) * sum(row.values()) / 2**20:,.1f} MiB of latents on disk" if row else ""
    return f"{len(dataset):,} rows, {left_out:,} left out, {len(dataset.prompts):,} prompts{samples}"

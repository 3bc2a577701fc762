"""The only writer and reader of checkpoints.

A checkpoint holds the trained weights as others load them, the record of the run, what takes part through
`Checkpointed`, and transformers' files: optimizer, scheduler, random states and, last, `trainer_state.json`.
"""

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.logging import get_logger
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data import Encoders
from ..export.weights import (
    RUN_RECORD,
    load_denoisers,
    lora_config,
    read_run_record,
    save_all_but_denoiser,
    save_averaged,
    save_denoisers,
    save_lora,
    save_pipeline,
    write_run_record,
)
from .config import DiffusionPreferenceConfig
from .ema import EMA, WeightsEMA


logger = get_logger(__name__)

# transformers writes this file last.
_LAST_WRITTEN = "trainer_state.json"
# Written with the optimizer's state.
SCHEDULE = "scheduler.pt"
# What differs between adapters that cannot take each other's weights, or would compute something else with them.
_ADAPTER_OPTIONS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora")


class Checkpointed(Protocol):
    """State beside the trained weights that a resumed run needs: moving references, trajectory pools, guards.

    Attributes:
        description: What it is, for messages.
        per_process: Whether every process has its own.
    """

    description: str
    per_process: bool

    def reset(self) -> None:
        """Forgets what an earlier call of `train` left."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what `state_dict` gave, on the CPU."""

    def depends_on(self) -> dict[str, Any]:
        """Options by name without which the state would mean something else; strings, numbers and lists."""


class Checkpointer:
    """Writes and reads the checkpoints of one run.

    Args:
        encoders: Of the run's pipeline; they come back to memory while it is saved.
        output_dir: The folder that holds `checkpoint-<step>`.
        record: What the weights are trained from; its `base_fingerprint` tells bases apart.

    Attributes:
        parts: What takes part, by the stem of its file.
        ema: The moving average of the weights, where there is one; a part too.
        writing: Whether a checkpoint is being written, and not the finished model.
    """

    def __init__(self, encoders: Encoders, output_dir: Path, record: dict[str, Any]) -> None:
        self.encoders, self.pipeline, self.family = encoders, encoders.pipeline, encoders.family
        self.output_dir, self.record = output_dir, record
        self.parts: dict[str, Checkpointed] = {}
        self.ema: WeightsEMA | None = None
        self.writing = self._frozen_parts_written = False

    def average(self, model: nn.Module, args: DiffusionPreferenceConfig) -> WeightsEMA:
        """Averages the weights of a run's model, unwrapped, from now on; the result is to be added as a callback."""
        self.ema = WeightsEMA(model, args, lambda folder: self._read_part(EMA, self._file(folder, EMA, 0)))
        self.parts[EMA] = self.ema
        return self.ema

    # ---- Writing -------------------------------------------------------------------------------------------------

    def folder(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    @contextmanager
    def writing_checkpoint(self) -> Iterator[None]:
        """Within it, `write_weights` writes what a checkpoint needs, and not the frozen parts."""
        self.writing = True
        try:
            yield
        finally:
            self.writing = False

    def write_parts(self, folder: Path, process_index: int, *, should_save: bool) -> None:
        """Writes the run's record and every part; before transformers writes what makes the checkpoint count."""
        folder.mkdir(parents=True, exist_ok=True)
        if should_save:
            write_run_record(folder, self.record)
        for name, part in self.parts.items():
            if part.per_process or should_save:
                tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in part.state_dict().items()}
                file = self._file(folder, name, process_index)
                save_file(tensors, file, metadata={"record": json.dumps(part.depends_on())})

    def write_weights(
        self, model: nn.Module, folder: Path, state_dict: dict[str, Tensor] | None, args: DiffusionPreferenceConfig
    ) -> None:
        """Full training: a diffusers folder, in checkpoints the denoiser's alone. LoRA: PEFT's files and diffusers'.

        Args:
            model: The trained denoiser, or the PEFT model around it, unwrapped.
            state_dict: Gathered weights, where the module itself holds shards only.
            args: Of the run; written beside the weights, without secrets.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(model, PeftModel):
            kohya = args.lora_format == "kohya"
            save_lora(self.pipeline, self.family, model, folder, state_dict, kohya=kohya)
        elif self.writing:
            save_denoisers(model, self.family.denoiser_name, folder, state_dict)
        else:
            save_pipeline(self.pipeline, self.family, folder, state_dict, encoders=self.encoders.present())
        if not self.writing:
            self._write_average(folder)
        write_run_record(folder, self.record)
        torch.save(args.without_secrets(), folder / "training_args.bin")

    def _write_average(self, folder: Path) -> None:
        """Writes the moving average, where there is one, beside weights that are not a checkpoint's.

        Checkpoints have it as a part, in float32.
        """
        if self.ema is not None:
            kohya = self.ema.args.lora_format == "kohya"
            with self.ema.applied():
                save_averaged(self.pipeline, self.family, self.ema.model, folder, self.record, kohya=kohya)

    def mark_as_diverged(self, folder: Path, reason: str, *, should_save: bool) -> None:
        """Writes into a checkpoint's record that its weights diverged; it is then resumed from only by its path."""
        if should_save:
            write_run_record(folder, {**self.record, "diverged": reason})

    def copy_to_output(self, checkpoint: Path, *, lora: bool) -> None:
        """Copies a checkpoint's weights and record, not the optimizer's state, to where they are pushed from."""
        folder = self.output_dir
        if not lora and not self._frozen_parts_written:
            # Once; what lies in the folder may be another run's.
            with self.encoders.present():
                save_all_but_denoiser(self.pipeline, self.family, folder)
            self._frozen_parts_written = True
        if lora:
            # For load_lora_weights, where the pipeline has it, and for kohya's scripts, where it was asked for.
            for file in [*checkpoint.glob("adapter_*"), *checkpoint.glob("*_lora_weights*.safetensors")]:
                shutil.copy(file, folder / file.name)
        else:
            for name in self.family.trained_ranges(self.pipeline):
                shutil.copytree(checkpoint / name, folder / name, dirs_exist_ok=True)
        # The checkpoint is the present step's.
        self._write_average(folder)
        shutil.copy(checkpoint / RUN_RECORD, folder / RUN_RECORD)

    # ---- Reading -------------------------------------------------------------------------------------------------

    def to_resume(self, asked: str | bool | None, model: nn.Module, *, sharded: bool) -> Path | None:
        """The checkpoint that a training goes on from, or None.

        Args:
            asked: As `train` takes it: True for the newest whole one, "auto" for that or none, or a folder.
            model: That is trained, unwrapped; the checkpoint must hold weights of its kind.
            sharded: Whether weights are written in shards by FSDP or DeepSpeed, whose files are theirs to check.

        Raises:
            ValueError: There is no whole one, the folder asked for is not whole or holds something else than what is
                trained.
        """
        if asked is None or asked is False:
            return None
        if asked is True or asked == "auto":
            folder, passed_over = last_usable_checkpoint(self.output_dir)
            if passed_over:
                logger.warning(f"Passing over unfinished or diverged checkpoints: {', '.join(passed_over)}.")
            if folder is None and asked == "auto":
                logger.warning(f"There is no complete checkpoint in {self.output_dir}, so the run begins.")
                return None
            if folder is None:
                raise ValueError(
                    f"There is no complete checkpoint in {self.output_dir} to resume from. Call train() without "
                    "resume_from_checkpoint to start from the beginning, or with 'auto' to start where there is none."
                )
        else:
            folder = Path(asked)
            problem = checkpoint_problem(folder)
            if (read_run_record(folder) or {}).get("diverged"):
                logger.warning(f"{folder} holds weights that diverged; this run goes on from them.")
            if problem:
                raise ValueError(
                    f"Cannot resume from {folder}: {problem}. train(resume_from_checkpoint=True) takes the newest "
                    "complete checkpoint instead."
                )
        self._check_base(folder, "Pass the base that it was trained from as model.")
        if not sharded:
            if not (folder / SCHEDULE).is_file():
                raise ValueError(
                    f"Cannot resume from {folder}: the state of optimizer and schedule ({SCHEDULE}) is missing. It "
                    "is a finished model, or was saved with save_only_model=True. Pass one of the run's checkpoint "
                    "folders."
                )
            self._check_kind(folder, model)
        self._check_whole(folder)
        return folder

    def check_output_dir(self) -> None:
        """Raises where the output folder holds checkpoints of another base model.

        Raises:
            ValueError: Names the checkpoint and both bases.
        """
        for folder in checkpoints(self.output_dir):
            self._check_base(folder, "Give this run another output_dir, or remove the old checkpoints.")

    def read_parts(self, folder: Path | None, process_index: int, processes: int) -> None:
        """Reads what `write_parts` wrote; without a folder parts start from the beginning.

        Raises:
            ValueError: A part is missing, or was written with other options; the message says what differs.
        """
        for name, part in self.parts.items():
            part.reset()
            if folder is None:
                continue
            file = self._file(folder, name, process_index)
            written = len(list(folder.glob(f"{name}-*.safetensors"))) if part.per_process else 1
            if written not in (0, processes if part.per_process else 1):
                # What differs may be the number of processes itself, without which some parts mean nothing.
                self._check_options(part, self._file(folder, name, 0))
                logger.warning(
                    f"{folder} holds the {part.description} of {written} processes and there are {processes} now, so "
                    "they begin again."
                )
                continue
            if not file.is_file():
                raise ValueError(
                    f"{folder} holds no {part.description} ({file.name}), so it was written with other options. "
                    "Resume with the options of the run, or start a new one."
                )
            self._check_options(part, file)
            self._read_part(name, file)

    def _read_part(self, name: str, file: Path) -> None:
        with safe_open(file, "pt") as opened:
            self.parts[name].load_state_dict({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118

    @staticmethod
    def _check_options(part: Checkpointed, file: Path) -> None:
        """Raises where a part was written with other options."""
        with safe_open(file, "pt") as opened:
            stored = json.loads((opened.metadata() or {}).get("record", "{}"))
        different = [
            f"{key} was {stored.get(key)!r} and is {value!r}"
            for key, value in json.loads(json.dumps(part.depends_on())).items()
            if stored.get(key) != value
        ]
        if different:
            raise ValueError(
                f"The {part.description} in {file} cannot be continued: {'; '.join(different)}. Resume with the "
                "options of the run, or start a new one."
            )

    def read_denoiser(self, denoiser: nn.Module, folder: Path) -> None:
        """Loads the weights of full training."""
        load_denoisers(denoiser, self.family.denoiser_name, folder)

    def _file(self, folder: Path, name: str, process_index: int) -> Path:
        suffix = f"-{process_index}" if self.parts[name].per_process else ""
        return folder / f"{name}{suffix}.safetensors"

    def _check_base(self, folder: Path, remedy: str) -> None:
        record, own = read_run_record(folder), self.record["base_fingerprint"]
        names = None if record is None else record.get("denoisers")
        if names and names != self.record.get("denoisers"):
            raise ValueError(
                f"{folder} holds {' and '.join(names)} and this run trains {' and '.join(self.record['denoisers'])}. "
                "Set the option denoiser as it was, or give this run another output_dir."
            )
        if record is not None and record["base_fingerprint"] != own:
            raise ValueError(
                f"{folder} was trained from another base model ({record['base_model'] or 'a local pipeline'}, "
                f"fingerprint {record['base_fingerprint']}; the one passed has {own}). {remedy}"
            )

    def _check_kind(self, folder: Path, model: nn.Module) -> None:
        """Raises where a checkpoint holds a LoRA and full weights are trained, the reverse, or another LoRA."""
        holds_lora, trains_lora = (folder / ADAPTER_CONFIG).is_file(), isinstance(model, PeftModel)
        if holds_lora != trains_lora:
            kinds = ("full weights", "a LoRA")
            raise ValueError(
                f"{folder} holds {kinds[holds_lora]} and this run trains {kinds[trains_lora]}. Make the trainer "
                f"{'with' if holds_lora else 'without'} peft_config, or start a new run."
            )
        if isinstance(model, PeftModel):
            stored, own = LoraConfig.from_pretrained(str(folder)), lora_config(model)
            different = [
                f"{name} was {_plain(getattr(stored, name, None))!r} and is {_plain(getattr(own, name, None))!r}"
                for name in _ADAPTER_OPTIONS
                if _plain(getattr(stored, name, None)) != _plain(getattr(own, name, None))
            ]
            if different:
                raise ValueError(
                    f"{folder} holds another LoRA: {'; '.join(different)}. Resume with its peft_config, or start a "
                    "new run."
                )
        else:
            for name in self.family.trained_ranges(self.pipeline):
                if not (folder / name).is_dir():
                    raise ValueError(f"{folder} holds no folder {name}, so it is no full checkpoint.")

    @staticmethod
    def _check_whole(folder: Path) -> None:
        """Raises a ValueError about a file of tensors that is cut off, which torch would report from deep inside."""
        for file in folder.rglob("*"):
            if file.suffix not in (".pt", ".pth", ".bin", ".safetensors"):
                continue
            try:
                if file.suffix == ".safetensors":
                    with safe_open(file, "pt"):
                        pass
                else:
                    zipfile.ZipFile(file).close()
            except (SafetensorError, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"Cannot resume from {folder}: {file.relative_to(folder)} is cut off or damaged ({error}). Resume "
                    "from an earlier checkpoint."
                ) from error


def _plain(value: Any) -> Any:
    """PEFT keeps targets as a set, and writes a list."""
    return sorted(value) if isinstance(value, (set, list, tuple)) else value


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, newest step first."""
    found = [
        (int(step), folder)
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdigit() and folder.is_dir()
    ]
    return [folder for _, folder in sorted(found, reverse=True)]


def checkpoint_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        json.loads((folder / _LAST_WRITTEN).read_text())
    except FileNotFoundError:
        return f"{_LAST_WRITTEN}, which is written last, is missing, so the checkpoint is unfinished"
    except json.JSONDecodeError:
        return f"{_LAST_WRITTEN} is cut off, so the checkpoint is unfinished"
    if read_run_record(folder) is None:
        return f"{RUN_RECORD} is missing, so it was not written by this package"
    return None


def last_usable_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint that did not diverge, and the names of newer ones that are not or did."""
    passed_over: list[str] = []
    for folder in checkpoints(output_dir):
        if checkpoint_problem(folder) is None and "diverged" not in (read_run_record(folder) or {}):
            return folder, passed_over
        passed_over.append(folder.name)
    return None, passed_over

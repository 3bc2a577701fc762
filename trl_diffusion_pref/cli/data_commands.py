"""Commands about data, models and files: encode, inspect, estimate-memory, export, push."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import yaml
from accelerate import PartialState

from ..algorithms import TRAINERS
from ..data.encoded import EncodedDataset
from ..encode import encode_dataset
from ..export import export_lora, merge_lora
from ..export.push import push_folder
from ..inspection import inspect_dataset
from ..memory import estimate_memory, fit_memory
from ..training.config import DiffusionPreferenceConfig
from ..training.documented import documented
from .command import Command
from .data_sets import training_data
from .functions import arguments_from, as_mapping, options_of
from .parser import Parsed, UsageError
from .run_options import DataOptions, LaunchOptions, LoraOptions, ModelOptions, model_named


@documented
@dataclass(kw_only=True)
class TrainerOptions:
    """
    > Trainer

        trainer (`str`, *optional*, defaults to `"mapo"`):
            The command that will train, such as `mapo` or `diffusion-sft`. Its options are then options here.
    """

    trainer: str = "mapo"

    def __post_init__(self) -> None:
        if self.trainer not in TRAINERS:
            raise UsageError(f"trainer {self.trainer!r} is none of {', '.join(TRAINERS)}.")


# ---- encode --------------------------------------------------------------------------------------------------------


@documented
@dataclass(kw_only=True)
class EncodeOptions:
    """
    > What is encoded

        output (`str`, *optional*):
            Folder for the encoded data set, which `dataset_name` then takes, also on another machine. Default: it
            stays in the cache, where a training run with the same options finds it.
    """

    output: str | None = None


def _run_encode(parsed: Parsed, words: Sequence[str]) -> int:
    trainer, model, data, target, config = parsed.options
    rows, _ = training_data(data, config, TRAINERS[trainer.trainer][1].layout)
    if isinstance(rows, EncodedDataset):
        raise UsageError(f"{data.dataset_name[0]} is encoded already.")
    encoded = encode_dataset(model.model, rows, config, output=target.output)
    left_out = sum(encoded.left_out.values())
    where = target.output or config.dataset_cache or "the cache"
    if PartialState().is_main_process:
        print(f"{len(encoded):,} rows encoded, {left_out:,} left out, in {where}")
    return 0


# ---- inspect -------------------------------------------------------------------------------------------------------

_INSPECT = options_of(
    inspect_dataset,
    types_of={
        "source": list[str],
        "model": str | None,
        "resolution": str | None,
        "column_map": dict[str, str] | str | None,
    },
    subject="What is looked at",
)


@documented
@dataclass(kw_only=True)
class InspectOutput:
    """
    > Output

        json (`str`, *optional*):
            File for the findings as JSON.
    """

    json: str | None = None


def _run_inspect(parsed: Parsed, words: Sequence[str]) -> int:
    options, output = parsed.options
    arguments = arguments_from(options)
    source = arguments.pop("source")
    arguments["column_map"] = as_mapping("column_map", arguments["column_map"]) or None
    if arguments["model"] is not None:
        arguments["model"] = model_named(arguments["model"])
    found = inspect_dataset(source[0] if len(source) == 1 else source, **arguments)
    if output.json:
        found.to_json(output.json)
    print(found)
    return 0


# ---- estimate-memory -----------------------------------------------------------------------------------------------


@documented
@dataclass(kw_only=True)
class DeviceOptions:
    """
    > Device

        device_type (`str`, *optional*):
            `cuda` or `cpu`. Default: `cpu` with `use_cpu`, else `cuda`.
        card (`str`, *optional*):
            Size of a card, such as `24GB`: prints whether the config fits, its largest batch, and which options would
            make it fit.
    """

    device_type: Literal["cuda", "cpu"] | None = None
    card: str | None = None


def _run_estimate(parsed: Parsed, words: Sequence[str]) -> int:
    _, model, lora, device, config = parsed.options
    asked = (model.model, config, lora.peft_config, device.device_type)
    print(estimate_memory(*asked) if device.card is None else fit_memory(device.card, *asked))
    return 0


# ---- export and push -----------------------------------------------------------------------------------------------


@documented
@dataclass(kw_only=True)
class ExportOptions:
    """
    > What is written

        source (`str`):
            Output folder or checkpoint of a run that trained a LoRA, or its id on the Hub.
        target (`str`):
            File that ends with ".safetensors", or a folder; with `merge` a folder that is new or empty.
        merge (`bool`, *optional*, defaults to `False`):
            Writes a whole pipeline with the LoRA merged into its weights.
        lora_format (`str`, *optional*, defaults to `"kohya"`):
            Names in the file, without `merge`: `"kohya"` for ComfyUI and kohya's scripts.
        base (`str`, *optional*):
            What the LoRA was trained on, with `merge`. Default: the Hub id that the source names.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Of the merged weights.
    """

    source: str
    target: str
    merge: bool = False
    lora_format: Literal["kohya"] = "kohya"
    base: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        if not self.merge and (self.base is not None or self.dtype != "float32"):
            raise UsageError("base and dtype have no effect without --merge.")


def _run_export(parsed: Parsed, words: Sequence[str]) -> int:
    (options,) = parsed.options
    if options.merge:
        base = None if options.base is None else model_named(options.base)
        print(merge_lora(options.source, options.target, base, getattr(torch, options.dtype)))
    else:
        print(export_lora(options.source, options.target, options.lora_format))
    return 0


_PUSH = options_of(push_folder, leave_out=("token",), subject="What is uploaded")


def _run_push(parsed: Parsed, words: Sequence[str]) -> int:
    print(push_folder(**arguments_from(parsed.options[0])))
    return 0


# ---- The table -----------------------------------------------------------------------------------------------------


class _OfTrainer(Command):
    """A command that has the options of the trainer which `--trainer` names."""

    def parse(self, words: Sequence[str]) -> Parsed:
        config = config_of(words)
        return self.parser([config if kind is DiffusionPreferenceConfig else kind for kind in self.kinds]).read(words)


def config_of(words: Sequence[str]) -> type[DiffusionPreferenceConfig]:
    """The config of the trainer that a command line names.

    Raises:
        UsageError: There is no such trainer.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--trainer", nargs="?")
    first.add_argument("--config", nargs="?")
    given, _ = first.parse_known_args(list(words))
    name = given.trainer
    if name is None and given.config and Path(given.config).is_file():
        try:
            document = yaml.safe_load(Path(given.config).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            document = None  # which the command's own parser explains
        name = document.get("trainer") if isinstance(document, dict) else None
    return TRAINERS[TrainerOptions(trainer=name or TrainerOptions.trainer).trainer][0]


# A training run's file may be given to the commands before it.
_OF_TRAINING = [field.name for kind in (DataOptions, LoraOptions, LaunchOptions) for field in fields(kind)]

DATA_COMMANDS = [
    _OfTrainer(
        "encode",
        "encodes a data set once, for later runs or another machine",
        [TrainerOptions, ModelOptions, DataOptions, EncodeOptions, DiffusionPreferenceConfig],
        _run_encode,
        unused=_OF_TRAINING,
    ),
    Command(
        "inspect",
        "says what is in a data set: bad rows, duplicates, contradictions, sizes",
        [_INSPECT, InspectOutput],
        _run_inspect,
        positional=("source",),
        rest=True,
    ),
    _OfTrainer(
        "estimate-memory",
        "says what training will need, without loading weights",
        [TrainerOptions, ModelOptions, LoraOptions, DeviceOptions, DiffusionPreferenceConfig],
        _run_estimate,
        unused=_OF_TRAINING,
    ),
    Command(
        "export",
        "writes a trained LoRA in kohya's format, or merged into its base",
        [ExportOptions],
        _run_export,
        positional=("source", "target"),
    ),
    Command(
        "push",
        "uploads what a run has saved to the Hub",
        [_PUSH],
        _run_push,
        positional=("folder", "repo_id"),
    ),
]

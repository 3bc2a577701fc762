"""The options that a run had in the end, and `run.yaml`, which starts it again."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ..diffusion.noise import RectifiedFlow
from ..export.files import write_whole
from ..training.recommended import published, recommended
from ..training.trainer import DiffusionTrainer
from ..version import __version__
from .parser import PROGRAM, Parsed


RUN_FILE = "run.yaml"
# Never written; and what belongs to one start of a run, not to the run.
_SECRET = ("hub_token", "push_to_hub_token")
_OF_THE_START = ("dry_run", "resume_from_checkpoint", "accelerate_config", "num_processes")
_SECRET_KEYS = ("token", "use_auth_token")


@dataclass(frozen=True)
class ResolvedOption:
    """An option's value and where it came from.

    Args:
        origin: "--name", a file, "default", or what the model's value was taken from.
        told: Whether `run.yaml` has it: what was given, what depends on the model, and the algorithm's own.
    """

    name: str
    value: Any
    origin: str
    told: bool


def resolved_options(parsed: Parsed, trainer: DiffusionTrainer) -> list[ResolvedOption]:
    """Every option of a run, in the order in which the command's help has them."""
    config = trainer.args
    flow = isinstance(trainer.noise_process, RectifiedFlow)
    of_model = recommended(trainer._name, trainer.family, flow=flow)
    source = f"{trainer.family.pipeline_class}: {published(trainer._name, trainer.family, flow=flow).source}"
    # As the user's config had them, which the trainer filled in.
    before = next(options for options in parsed.options if isinstance(options, type(config)))
    own = [*config.own_options(), "seed", "output_dir"]
    resolved = []
    for options in parsed.options:
        for field in fields(options):
            name = field.name
            if not field.init or name in _SECRET:
                continue
            given = name in parsed.given
            value = parsed.given[name] if given else getattr(config if options is before else options, name)
            filled = options is before and name in of_model and not given and getattr(before, name) is None
            origin = parsed.origins.get(name, source if filled else "default")
            told = (given or filled or (options is before and name in own)) and name not in _OF_THE_START
            resolved.append(ResolvedOption(name, _without_secrets(value), origin, told and value is not None))
    return resolved


def run_yaml(command: str, options: Sequence[ResolvedOption]) -> str:
    """A file for `--config` with which the same command does the same again."""
    lines = [f"# {PROGRAM} {command} --config {RUN_FILE}", f"# trl-diffusion-pref {__version__}"]
    for option in options:
        if option.told:
            line = yaml.safe_dump({option.name: _plain(option.value)}, allow_unicode=True, sort_keys=False).rstrip(
                "\n"
            )
            # A comment behind a value of several lines would become part of it.
            lines.append(line if "\n" in line else f"{line}  # {option.origin}")
    return "\n".join(lines) + "\n"


def write_run_yaml(folder: Path, command: str, options: Sequence[ResolvedOption]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RUN_FILE, run_yaml(command, options).encode())
    return folder / RUN_FILE


def options_table(options: Sequence[ResolvedOption]) -> str:
    """Lines "name = value (origin)" of what was given, of what depends on the model, and of the algorithm's own."""
    shown = [(f"{option.name} = {_shown(option.value)}", option.origin) for option in options if option.told]
    width = max(len(text) for text, _ in shown)
    return "\n".join(f"  {text:{min(width, 60)}}  {origin}" for text, origin in shown)


def _shown(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False) if not isinstance(value, str) else value


def _plain(value: Any) -> Any:
    """What YAML knows of a value: enumerations by their values."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return getattr(value, "value", value)


def _without_secrets(value: Any) -> Any:
    """The value without tokens in it, at any depth; JSON, as flags have mappings, becomes a mapping."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = json.loads(value)
    if isinstance(value, dict):
        return {key: _without_secrets(entry) for key, entry in value.items() if key not in _SECRET_KEYS}
    return [_without_secrets(entry) for entry in value] if isinstance(value, list) else value

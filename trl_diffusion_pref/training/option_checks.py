"""Checks of a config's options: what can be rejected without a model or data is rejected when the config is made."""

import dataclasses
import functools
import math
import types
import warnings
from collections.abc import Iterable, Mapping
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType


# transformers' own options. Names that the installed version lacks are left out.
LOOP_RANGES = {
    "learning_rate": "[0, inf)",
    "weight_decay": "[0, inf)",
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "[0, inf)",
    "max_grad_norm": "[0, inf]",
    "warmup_steps": "[0, inf)",
    "warmup_ratio": "[0, 1]",
    "per_device_train_batch_size": "[1, inf)",
    "per_device_eval_batch_size": "[1, inf)",
    "gradient_accumulation_steps": "[1, inf)",
    "eval_accumulation_steps": "[1, inf)",
    "eval_delay": "[0, inf)",
    "save_total_limit": "[1, inf)",
    "dataloader_num_workers": "[0, inf)",
    # What numpy's global generator takes.
    "seed": "[0, 4294967295]",
    "data_seed": "[0, 4294967295]",
}
# Options of transformers for language models and classifiers, with the value at which they do nothing.
_NOT_FOR_DENOISERS = {"label_smoothing_factor": 0.0, "neftune_noise_alpha": None, "use_liger_kernel": False}
# Both None and infinity are in use for "gradients are not clipped".
_NO_LIMIT = "max_grad_norm"
_IGNORE_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")


@functools.cache
def _types_of_options(config_class: type) -> dict[str, tuple[Any, ...]]:
    """The types that each option's annotation allows."""
    unions = (Union, types.UnionType)
    hints = get_type_hints(config_class)
    return {name: get_args(hint) if get_origin(hint) in unions else (hint,) for name, hint in hints.items()}


def check_types(config: TrainingArguments) -> None:
    """Checks choices, whole numbers, finite numbers and booleans against the annotations.

    Annotations that allow several types besides None are left to whoever reads the option.

    Raises:
        ValueError: A value that the annotation does not allow.
    """
    allowed = _types_of_options(type(config))  # type: ignore[arg-type]  # mypy looks at the instances' hash
    for field in dataclasses.fields(config):
        value, kinds = getattr(config, field.name), [kind for kind in allowed[field.name] if kind is not type(None)]
        if value is None:
            simple = len(kinds) == 1 and (kinds[0] in (bool, int, float) or get_origin(kinds[0]) is Literal)
            optional = len(kinds) < len(allowed[field.name]) or field.default is None or field.name == _NO_LIMIT
            if simple and not optional:
                raise ValueError(f"{field.name}=None: set a value, or leave it out for {field.default!r}.")
            continue
        choices: list[Any] | None = None
        if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
            choices = list(get_args(kinds[0]))
        elif kinds and isinstance(kinds[0], type) and issubclass(kinds[0], Enum) and kinds[1:] in ([], [str]):
            choices = [member.value for member in kinds[0]]
        problem = None
        if choices is not None and value not in choices:
            raise ValueError(f"{field.name}={value!r} is none of {', '.join(map(str, choices))}.")
        if kinds == [bool] and not isinstance(value, bool):
            problem = "True or False"
        elif kinds == [int] and (isinstance(value, bool) or not isinstance(value, Integral)):
            problem = "a whole number"
        elif kinds == [float] and (isinstance(value, bool) or not isinstance(value, Real)):
            problem = "a number"
        elif kinds == [float] and (math.isnan(value) or math.isinf(value) and field.name != _NO_LIMIT):
            problem = "a finite number"
        if problem is not None:
            raise ValueError(f"{field.name}={value!r}: it must be {problem}.")


def check_ranges(config: TrainingArguments, ranges: Mapping[str, str]) -> None:
    """Checks numbers against intervals such as "[0, 1)"; None is in every range.

    Raises:
        ValueError: A number is outside its interval.
    """
    for name, interval in ranges.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        low, high = map(float, interval[1:-1].split(","))
        inside = (value >= low if interval[0] == "[" else value > low) and (
            value <= high if interval[-1] == "]" else value < high
        )
        if not inside and math.isinf(high):
            raise ValueError(f"{name}={value}: it must be {range_in_words(interval)}.")
        if not inside:
            raise ValueError(f"{name}={value} is outside {interval}.")


def range_in_words(interval: str) -> str:
    """As messages and helps write it: "at least 1", "positive", "in [0, 1)"."""
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"in {interval}"
    return f"at least {low}" if interval[0] == "[" else "positive"


def check_effects(config: TrainingArguments, effective_with: Mapping[str, tuple[str, tuple[Any, ...]]]) -> None:
    """Checks that no option was set that does nothing beside another one.

    Args:
        effective_with: By option: which other option decides, and at which of its values the first has an effect.

    Raises:
        ValueError: An option is not at its default and has no effect.
    """
    for name, (decider, values) in effective_with.items():
        value, decided = getattr(config, name), getattr(config, decider)
        if value != config.__dataclass_fields__[name].default and decided not in values:
            options = " or ".join(f"{decider}={each!r}" for each in values)
            raise ValueError(
                f"{name}={value!r} does nothing with {decider}={decided!r}, only with {options}. Leave it out, or "
                f"change {decider}."
            )


def check_loop(config: TrainingArguments) -> None:
    """Checks transformers' own options where transformers would fail later, or do something else without an error.

    Called before transformers' `__post_init__`, which replaces some of the values.

    Raises:
        ValueError: An option has a value that cannot be used.
    """
    check_ranges(config, LOOP_RANGES)
    if config.max_steps == 0 or config.max_steps < -1:
        raise ValueError(f"max_steps={config.max_steps}: it must be at least 1, or -1 to train num_train_epochs.")
    if config.max_steps == -1:
        check_ranges(config, {"num_train_epochs": "(0, inf)"})
    for name in ("logging", "eval", "save"):
        steps = getattr(config, f"{name}_steps")
        if steps is None or getattr(config, f"{name}_strategy") != "steps":
            continue
        if steps <= 0 or (steps > 1 and steps != int(steps)):
            raise ValueError(
                f"{name}_steps={steps}: with {name}_strategy='steps' it must be a whole number of steps, or a number "
                f"between 0 and 1 for a share of the run. {name}_strategy='no' switches it off."
            )
    for name, off in _NOT_FOR_DENOISERS.items():
        value = getattr(config, name, off)
        if value != off:
            smoothing = name == "label_smoothing_factor" and hasattr(config, "label_smoothing")
            advice = "Use label_smoothing." if smoothing else "Leave it out."
            raise ValueError(f"{name}={value!r} is for language models and classifiers, not for denoisers. {advice}")
    folder = Path(config.output_dir).expanduser() if config.output_dir else Path()
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"output_dir={config.output_dir!r}: {path} is a file. Choose another folder.")


def check_trackers(report_to: Iterable[str]) -> None:
    """Checks that transformers knows the trackers, and that they are installed.

    Raises:
        ValueError: It does not, or they are not.
    """
    # transformers never lists flyte as available, nor azure_ml beside mlflow.
    installed = {*get_available_reporting_integrations(), "flyte", "azure_ml"}
    for name in report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise ValueError(f"report_to={name!r} is no tracker that transformers knows: 'none', 'all' or {known}.")
        if name not in installed:
            raise ValueError(f"report_to={name!r}: it is not installed. Install it, or set report_to='none'.")


def check_schedule(config: TrainingArguments) -> None:
    """Checks the learning rate schedule by making one.

    Raises:
        ValueError: Options that the schedule does not take, lacks, or ignores.
    """
    kind, options = SchedulerType(config.lr_scheduler_type), config.lr_scheduler_kwargs or {}
    for name in ("warmup_steps", "warmup_ratio"):
        if getattr(config, name, None) and kind in _IGNORE_WARMUP:
            raise ValueError(
                f"{name}={getattr(config, name)} does nothing with lr_scheduler_type={kind.value!r}. Use "
                "lr_scheduler_type='constant_with_warmup' or another schedule that has a warm-up."
            )
    problem = None
    if not isinstance(options, dict):
        problem = "it must be a dictionary, on a command line in JSON"
    elif kind in ("constant", "constant_with_warmup"):
        problem = "this schedule takes no options" if options else None
    else:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate or 1.0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                get_scheduler(
                    kind, optimizer, num_warmup_steps=0, num_training_steps=100, scheduler_specific_kwargs=options
                )
        except Exception as error:
            problem = str(error)
    if problem is not None:
        raise ValueError(f"lr_scheduler_kwargs={options!r} with lr_scheduler_type={kind.value!r}: {problem}.")

"""The options of a command from the signature and the docstring of the function that it calls."""

import json
import os
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, field, make_dataclass
from inspect import Parameter, cleandoc, signature
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .parser import UsageError


def options_of(
    function: Callable[..., Any],
    *,
    leave_out: Collection[str] = (),
    rename: Mapping[str, str] | None = None,
    types_of: Mapping[str, Any] | None = None,
    helps: Mapping[str, str] | None = None,
    subject: str = "Options",
) -> type:
    """A dataclass with one field for each argument of a function.

    Args:
        function: With annotations, and a docstring with "Args:" that describes every argument.
        leave_out: Arguments that the command gives itself.
        rename: New names of arguments.
        types_of: Types of arguments that a command line cannot have as they are annotated.
        helps: Descriptions in place of the docstring's.
        subject: Heading of the help.

    Raises:
        TypeError: An argument has no description, or a type that needs one of `types_of`.
    """
    rename, types_of = dict(rename or {}), dict(types_of or {})
    hints, helps = get_type_hints(function), {**argument_helps(function), **(helps or {})}
    made = []
    for name, parameter in signature(function).parameters.items():
        if name in leave_out or parameter.kind is Parameter.VAR_KEYWORD:
            continue
        if name not in helps:
            raise TypeError(f"{function.__name__}: its docstring says nothing about {name}.")
        kind = types_of[name] if name in types_of else _simple(hints[name])
        if kind is None:
            raise TypeError(f"{function.__name__}: {name} is a {hints[name]}, which a command line cannot have.")
        default = MISSING if parameter.default is Parameter.empty else parameter.default
        made.append((rename.get(name, name), kind, field(default=default, metadata={"help": helps[name]})))
    class_name = "".join(word.capitalize() for word in function.__name__.split("_")) + "Options"
    options = make_dataclass(class_name, made, kw_only=True)
    options.__doc__ = "\n".join(["", f"> {subject}", *(f"    {name} (`option`):" for name, *_ in made)])
    return options


def arguments_from(options: Any, rename: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The function's arguments from an instance of what `options_of` made."""
    back = {new: old for old, new in (rename or {}).items()}
    return {back.get(name, name): value for name, value in vars(options).items()}


def argument_helps(function: Callable[..., Any]) -> dict[str, str]:
    """By argument, what the "Args:" of a docstring say; "%" is doubled, since argparse formats helps with it."""
    found = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", cleandoc(function.__doc__ or ""), re.DOTALL | re.MULTILINE)
    helps = {}
    for names, text in re.findall(r"^    ([\w, \n]+): (.*(?:\n {8}.*|\n)*)", found[1] if found else "", re.MULTILINE):
        for name in re.split(r",\s+", names):
            helps[name] = " ".join(text.split()).replace("%", "%%")
    return helps


def _simple(hint: Any) -> Any:
    """What a flag can have of an annotation: one type, or one and None; None where there is no such type."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    optional = type(None) in kinds
    plain = {_without_paths(kind) for kind in kinds if kind is not type(None)}
    if len(plain) != 1:
        return None
    (kind,) = plain
    if get_origin(kind) in (list, Sequence):
        (kind,) = get_args(kind)
        kind = list[_without_paths(kind)]  # type: ignore[misc]  # a type that is known at run time
    elif kind not in (bool, int, float, str) and get_origin(kind) is not Literal:
        return None
    return kind | None if optional else kind


def _without_paths(kind: Any) -> Any:
    is_path = kind in (os.PathLike, Path) or get_origin(kind) is os.PathLike
    return str if is_path else kind


def as_mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping, or one that a flag has as JSON; empty for None.

    Raises:
        UsageError: It is none.
    """
    if value is None or isinstance(value, dict):
        return dict(value or {})
    try:
        read = json.loads(value)
    except json.JSONDecodeError as error:
        raise UsageError(f"--{name}: {value!r} is no JSON ({error}). Write it as '{{\"key\": 1}}'.") from error
    if not isinstance(read, dict):
        raise UsageError(f"--{name} must be a JSON object, such as '{{\"key\": 1}}', not {value!r}.")
    return read

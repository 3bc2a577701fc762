"""From a command line and a YAML file to dataclasses, and where each value came from.

On TRL's `TrlParser`, which makes a flag of each field of a dataclass. What is added: unknown and repeated options are
refused with the nearest name, values of YAML are checked as flags are, and the help is grouped by subject.
"""

import argparse
import difflib
import inspect
import json
import re
import shutil
from argparse import ArgumentTypeError, Namespace
from collections.abc import Collection, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from trl import TrlParser


PROGRAM = "trl-diffusion-pref"
_UNSET = object()
_OTHER = "Further options"


class UsageError(ValueError):
    """A command line or a YAML file that cannot be used; the message is one line."""


@dataclass(frozen=True)
class Parsed:
    """What a command got.

    Args:
        options: One instance of each of the parser's dataclasses.
        given: Values that were given, by name of the option, as they were written.
        origins: By name of a given option, "--name" or the YAML file.
    """

    options: tuple[Any, ...]
    given: dict[str, Any]
    origins: dict[str, str]


class OptionParser(TrlParser):
    """Reads the options of one command.

    Args:
        command: Its name.
        kinds: Dataclasses whose fields are the options. Headings of their docstrings ("> subject") group the help.
        description: For the help.
        unused: Options that the file may have for other commands, and that this one does not read.
    """

    def __init__(self, command: str, kinds: Sequence[type], description: str, unused: Collection[str] = ()) -> None:
        super().__init__(
            list(kinds),  # type: ignore[arg-type]  # dataclasses
            prog=f"{PROGRAM} {command}",
            usage=f"{PROGRAM} {command} [--config FILE] [--option value ...]",
            description=description,
            formatter_class=_Manual,
            allow_abbrev=False,
        )
        self.kinds, self.unused = list(kinds), set(unused)
        self._hints = {name: hint for kind in reversed(self.kinds) for name, hint in get_type_hints(kind).items()}
        help_of_config = "YAML file with options by their names; flags win over it"
        self.add_argument("--config", metavar="FILE", help=help_of_config)
        for action in self._actions:
            # Required options may stand in the file; `read` looks whether they were given.
            action.required = False
            if getattr(action.type, "__name__", "") == "string_to_bool":
                # TrlParser lets `--flag` stand alone only where the default is no None.
                action.nargs, action.const = "?", True
        self._named = {action.dest: action for action in reversed(self._actions)}
        self._group_by_subject()

    def read(self, words: Sequence[str]) -> Parsed:
        """Parses a command line.

        Raises:
            UsageError: An option that does not exist, comes twice in the file, has a value of another type, or is
                missing.
            ValueError: A dataclass refuses its values.
        """
        flags = self._from_flags(words)
        path = flags.pop("config", None)
        from_file = {} if path is None else self._from_file(Path(path))
        given = {**from_file, **flags}
        origins = {name: f"--{name}" if name in flags else str(path) for name in given}
        options = []
        for kind in self.kinds:
            own = [field for field in fields(kind) if field.init]
            for field in own:
                if field.name not in given and field.default is MISSING and field.default_factory is MISSING:
                    raise UsageError(
                        f"{field.name} is missing: add --{field.name}, or {field.name} in a --config file."
                    )
            options.append(kind(**{field.name: given[field.name] for field in own if field.name in given}))
        return Parsed(tuple(options), given, origins)

    def error(self, message: str) -> Any:
        """argparse would print its usage, which is a page long here, and end the process."""
        # It names all spellings of an option.
        raise UsageError(re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message))

    def _from_flags(self, words: Sequence[str]) -> dict[str, Any]:
        # argparse fills in defaults only where an attribute is missing.
        namespace = Namespace(**dict.fromkeys(self._named, _UNSET))
        spelled = [self._option_string_actions.get(word.partition("=")[0]) for word in words]
        names = [action.dest for action in spelled if action is not None and action.dest != "help"]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"--{twice} is given twice. Give it once; a list has its values behind one --{twice}.")
        _, unknown = self.parse_known_args(list(words), namespace)
        for word in unknown:
            if not word.startswith("-"):
                raise UsageError(f"{word!r} is not an option's value here; options begin with --.")
            name = word.partition("=")[0]
            raise UsageError(f"There is no option {name}.{self._nearest(name.lstrip('-'), '--')}")
        given = {name: value for name, value in vars(namespace).items() if value is not _UNSET and name != "help"}
        for name, value in given.items():
            self._check_json(f"--{name}", name, value)
        return given

    def _check_json(self, where: str, name: str, value: Any) -> None:
        """Of a text that is to become a mapping; the libraries' own messages do not name the option."""
        if _takes(dict, self._kinds_of(name)) and isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                json.loads(value)
            except json.JSONDecodeError as error:
                raise UsageError(f"{where}: {value!r} is no JSON ({error}).") from error

    def _from_file(self, path: Path) -> dict[str, Any]:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--config {path} cannot be read: {error}") from error
        try:
            document = yaml.load(text, Loader=_NoRepeatedKeys)
        except yaml.YAMLError as error:
            raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        if document is None:
            return {}
        if not isinstance(document, dict):
            raise UsageError(f"{path} holds a {type(document).__name__}; it must hold options as 'name: value'.")
        values = {}
        for key, value in document.items():
            name = str(key).replace("-", "_")
            if name in self.unused and name not in self._named:
                continue
            if name not in self._named or name in ("help", "config"):
                raise UsageError(f"{path}: there is no option {key!r}.{self._nearest(name)}")
            values[name] = self._value(path, name, value)
        return values

    def _value(self, path: Path, name: str, value: Any) -> Any:
        """A value of the file, as a flag's would be read."""
        action, kinds = self._named[name], self._kinds_of(name)
        if value is None:
            if type(None) in kinds or action.default is None:
                return None
            raise UsageError(f"{path}: {name} is empty; give it a value, or remove the line.")
        if value is False and "no" in (action.choices or ()):
            # What YAML makes of a plain no.
            return self._word(path, name, "no")
        if isinstance(value, bool) and (bool in kinds or str not in kinds):
            if bool in kinds:
                return value
            raise UsageError(f"{path}: {name}: {str(value).lower()} is no {_kind_name(action)}.")
        if isinstance(value, dict):
            if _takes(dict, kinds):
                return value
            raise UsageError(f"{path}: {name} takes a {_kind_name(action)}, not a mapping.")
        if isinstance(value, list):
            if action.nargs == "+":
                return [self._word(path, name, str(entry)) for entry in value]
            if _takes(list, kinds):
                return value
            raise UsageError(f"{path}: {name} takes one {_kind_name(action)}, not a list.")
        word = str(value).lower() if isinstance(value, bool) else str(value)
        self._check_json(f"{path}: {name}", name, word)
        read = self._word(path, name, word)
        return [read] if action.nargs == "+" else read

    def _word(self, path: Path, name: str, word: str) -> Any:
        action = self._named[name]
        try:
            value = action.type(word) if callable(action.type) else word
        except (ValueError, TypeError, ArgumentTypeError) as error:
            raise UsageError(f"{path}: {name}: {word!r} is no {_kind_name(action)}.") from error
        choices = list(action.choices or [])
        if choices and value not in choices:
            raise UsageError(f"{path}: {name}: {word!r} is none of {', '.join(map(str, choices))}.")
        return value

    def _kinds_of(self, name: str) -> tuple[Any, ...]:
        if name not in self._hints:
            return ()
        hint = self._hints[name]
        return get_args(hint) if type(None) in get_args(hint) or _is_union(hint) else (hint,)

    def _nearest(self, name: str, prefix: str = "") -> str:
        found = nearest(name.replace("-", "_"), self._named)
        return f" The nearest is {prefix}{found}." if found else f" {self.prog} --help lists all."

    def _group_by_subject(self) -> None:
        """Moves each option into a group of the help that is named after its subject."""
        subjects: dict[str, str] = {"config": "The file of options"}
        for kind in self.kinds:
            subjects |= subjects_of(kind)
        groups: dict[str, argparse._ArgumentGroup] = {}
        ordered = dict.fromkeys(subjects.values())
        for subject in [*ordered, _OTHER]:
            groups[subject] = self.add_argument_group(subject)
        for action in self._actions:
            if action.dest != "help":
                self._optionals._group_actions.remove(action)
                groups[subjects.get(action.dest, _OTHER)]._group_actions.append(action)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of several names, or None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)), None)


def subjects_of(kind: type) -> dict[str, str]:
    """By name of an option, the heading ("> subject") of the docstring under which it stands.

    Of a class and its bases; what is nearer to the class comes first.
    """
    subjects: dict[str, str] = {}
    for base in kind.__mro__:
        subject = ""
        # Without the indentation that docstrings have before Python 3.13.
        for line in inspect.cleandoc(base.__dict__.get("__doc__") or "").splitlines():
            if heading := re.match(r"\s*> (?!\[!)(?:Parameters (?:that (?:control )?|for ))?(.+)", line):
                subject = heading[1][0].upper() + heading[1][1:]
            elif subject and (option := re.match(r"\s+(\w+) ?\(.*\):$", line)):
                subjects.setdefault(option[1], subject)
    return subjects


def _takes(container: type, kinds: Iterable[Any]) -> bool:
    return any(getattr(kind, "__origin__", kind) is container for kind in kinds)


def _is_union(hint: Any) -> bool:
    return bool(get_args(hint)) and getattr(hint, "__origin__", None) not in (list, dict, tuple)


def _kind_name(action: argparse.Action) -> str:
    names = {"int": "whole number", "float": "number", "string_to_bool": "boolean (true or false)", "str": "text"}
    return names.get(getattr(action.type, "__name__", ""), "value")


class _Manual(argparse.HelpFormatter):
    """Shows an option once, by its name and the kind of its value, and defaults that say something."""

    def __init__(self, prog: str) -> None:
        width = max(60, min(100, shutil.get_terminal_size().columns))
        super().__init__(prog, max_help_position=8, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(name for name in action.option_strings if "_" in name or name.count("-") <= 2)[:60]
        if action.choices:
            value = "|".join(map(str, action.choices))
            value = value if len(value) <= 60 else "NAME"
        else:
            kinds = {"int": "N", "float": "X", "string_to_bool": "true|false"}
            value = str(action.metavar or kinds.get(getattr(action.type, "__name__", ""), "TEXT"))
        value = f"[{value}]" if action.nargs == "?" else value
        return f"{action.option_strings[0]} {value}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, argparse.SUPPRESS, "", False)
        return (action.help or "") + (" (default: %(default)s)" if shown and action.nargs != 0 else "")


class _NoRepeatedKeys(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML's own loader silently takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                where = f"lines {lines[key.value]} and {line}"
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands there twice, in {where}")
            lines[key.value] = line
        return super().construct_mapping(node, deep)

"""The command line: `trl-diffusion-pref COMMAND`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ..host_libraries import quiet_imports
from ..version import __version__
from .command import Command
from .parser import PROGRAM, OptionParser, Parsed, UsageError, nearest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The words after the program's name; default those of this process.

    Returns:
        The exit status: 0, 2 where the command, its options or its data cannot be used, 1 where a run stopped.
    """
    words, debug = _without_debug(list(sys.argv[1:] if argv is None else argv))
    name = words[0] if words and not words[0].startswith("-") else ""
    try:
        return _run(words, debug)
    # What a user can mend; with --debug it is shown with its traceback.
    except (ValueError, TypeError, OSError, ImportError) as error:
        training = _comes_from_training(error)
        if debug or (training and not _raised_here(error)):
            raise
        print(f"{PROGRAM}{' ' * bool(name)}{name}: {_told(error)}", file=sys.stderr)
        return 1 if training else 2
    except (ArithmeticError, RuntimeError) as error:
        # These say what to do; others are defects, whose traceback is needed.
        if debug or type(error).__name__ not in ("DivergenceError", "NonFiniteLossError", "PushError"):
            raise
        print(f"{PROGRAM} {name}: {_told(error)}", file=sys.stderr)
        return 1


def make_parser(command: str) -> OptionParser:
    """The parser of one command, for scripts that add options of their own.

    Raises:
        UsageError: There is no such command.
    """
    return _command(command).parser()


def check(argv: Sequence[str]) -> Parsed | None:
    """Reads a command line without running it; None where it only asks for help or the version.

    Raises:
        UsageError: It cannot be used.
        ValueError: A config refuses its values.
    """
    words, _ = _without_debug(list(argv))
    if not words or words[0] in ("-h", "--help", "--version"):
        return None
    return _command(words[0]).parse(words[1:])


def _run(words: list[str], debug: bool) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    command = _command(words[0])
    # Processes that it starts get the same words.
    return command.run(command.parse(words[1:]), [*words[1:], *["--debug"] * debug])


def _commands() -> dict[str, Command]:
    """All commands; their modules import torch and the host libraries, which takes seconds."""
    with quiet_imports():
        from .commands import commands
    return commands()


def _command(name: str) -> Command:
    known = _commands()
    if name not in known:
        similar = nearest(name, known)
        which = f"The nearest is {similar}." if similar else f"There are {', '.join(known)}."
        raise UsageError(f"There is no command {name!r}. {which}")
    return known[name]


def _help() -> str:
    known = _commands()
    width = max(map(len, known)) + 2
    lines = [f"usage: {PROGRAM} COMMAND [--option value ...]", "", "Preference training of diffusion models.", ""]
    lines += [f"  {name:{width}}{command.summary}" for name, command in known.items()]
    lines += [
        "",
        f"{PROGRAM} COMMAND --help explains the options of a command. Every option may also stand in a YAML file,",
        "--config run.yaml, over which flags win. --debug shows the traceback of an error. --version",
    ]
    return "\n".join(lines)


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """Takes the word `--debug` away; before a value it is transformers' option of that name."""
    for number, word in enumerate(words):
        following = words[number + 1] if number + 1 < len(words) else "--"
        if word == "--debug" and (number == 0 or following.startswith("-")):
            return words[:number] + words[number + 1 :], True
    return words, False


def _comes_from_training(error: BaseException) -> bool:
    """Whether it was raised in the loop, where a `ValueError` is no user's mistake."""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_name == "_inner_training_loop":
            return True
        trace = trace.tb_next
    return False


def _raised_here(error: BaseException) -> bool:
    """Whether this package raised it: then its message is for the user, also from within the loop."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1])


def _told(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, (ValueError, RuntimeError, ArithmeticError)) else " ".join(text.split())

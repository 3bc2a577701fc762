"""Starts a command again under `accelerate launch`, as `trl` does it."""

import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch

from .parser import UsageError, nearest
from .run_options import LaunchOptions


# Set for the processes that were launched, whose command line is the same.
_LAUNCHED = "TRL_DIFFUSION_PREF_LAUNCHED"


def should_launch(options: LaunchOptions) -> bool:
    """Whether this process is to start the others, in place of training itself."""
    return options.accelerate_config is not None and _LAUNCHED not in os.environ


def config_file(name: str) -> Path:
    """A file of `accelerate config`, or one of those that come with this package.

    Raises:
        UsageError: There is none.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(files(__package__))) / "accelerate_configs"
    shipped = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in shipped:
        similar = nearest(name, shipped)
        which = f" The nearest is {similar}." if similar else ""
        raise UsageError(f"accelerate_config {name!r} is no file, and none of {', '.join(shipped)}.{which}")
    return folder / f"{name}.yaml"


def launch(options: LaunchOptions, command: str, words: Sequence[str]) -> int:
    """Runs `trl-diffusion-pref COMMAND WORDS` in the processes that a config asks for, and waits for them.

    Returns:
        The exit status.

    Raises:
        UsageError: The config is no file.
    """
    # It takes a second.
    from accelerate.commands.launch import launch_command, launch_command_parser

    file = config_file(str(options.accelerate_config))
    processes = options.num_processes
    if processes is None and file.parent.name == "accelerate_configs":
        processes = max(torch.cuda.device_count(), 1)
    arguments = ["--config_file", str(file), "--quiet"]
    if processes is not None:
        arguments += ["--num_processes", str(processes)]
    parsed = launch_command_parser().parse_args([*arguments, "-m", __package__, command, *words])
    os.environ[_LAUNCHED] = "1"
    try:
        launch_command(parsed)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1
    # A process of torchrun's that failed has said why.
    except Exception as error:
        if type(error).__name__ != "ChildFailedError":
            raise
        print(f"A process failed: {error}".splitlines()[0], file=sys.stderr)
        return 1
    finally:
        del os.environ[_LAUNCHED]
    return 0

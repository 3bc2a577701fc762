"""Starts a command again under `accelerate launch`, as `trl` does it."""

import os
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .parser import UsageError, nearest
from .run_options import LaunchOptions


# Set for the processes that were launched, whose command line is the same.
_LAUNCHED = "TRL_DIFFUSION_PREF_LAUNCHED"
_SHIPPED = Path(str(files(__package__))) / "accelerate_configs"


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
    shipped = sorted(file.stem for file in _SHIPPED.glob("*.yaml"))
    if name not in shipped:
        similar = nearest(name, shipped)
        which = f" The nearest is {similar}." if similar else ""
        raise UsageError(f"accelerate_config {name!r} is no file, and none of {', '.join(shipped)}.{which}")
    return _SHIPPED / f"{name}.yaml"


def launch(options: LaunchOptions, command: str, words: Sequence[str], precision: str) -> int:
    """Runs `trl-diffusion-pref COMMAND WORDS` in the processes that a config asks for, and waits for them.

    Args:
        precision: "no", "bf16" or "fp16", as the run's config has it; the files that come with this package have none
            of their own.

    Returns:
        The exit status of the process that failed first, or 0.

    Raises:
        UsageError: The config is no file.
    """
    # It takes a second.
    from accelerate.commands.launch import launch_command, launch_command_parser

    if "LOCAL_RANK" in os.environ:
        raise UsageError(
            "accelerate_config starts processes, and torchrun or accelerate started this one. Leave it out."
        )
    file = config_file(str(options.accelerate_config))
    processes = options.num_processes
    arguments = ["--config_file", str(file)]
    if file.parent == _SHIPPED:
        processes = processes or max(torch.cuda.device_count(), 1)
        arguments += ["--mixed_precision", precision]
    if processes is not None:
        arguments += ["--num_processes", str(processes)]
    parsed = launch_command_parser().parse_args([*arguments, "-m", __package__, command, *words])
    os.environ[_LAUNCHED] = "1"
    try:
        launch_command(parsed)
    # The processes have said why they failed.
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    finally:
        del os.environ[_LAUNCHED]
    return 0

"""All commands by name: one for each trainer, and what stands around a training run."""

from ..algorithms import TRAINERS
from .command import Command
from .data_commands import DATA_COMMANDS
from .demo import DEMO, completion_command
from .sampling_commands import SAMPLING_COMMANDS
from .train import training_command


def commands() -> dict[str, Command]:
    """The commands, in the order of the help."""
    listed = [training_command(name, *kinds) for name, kinds in TRAINERS.items()]
    listed += [*DATA_COMMANDS, *SAMPLING_COMMANDS, DEMO, completion_command(commands)]
    return {command.name: command for command in listed}

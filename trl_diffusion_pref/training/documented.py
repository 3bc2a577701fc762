"""Describes options once: the docstring of a config is its manual, and what a command line prints."""

import re
import sys
from dataclasses import fields
from types import MappingProxyType
from typing import TypeVar


Options = TypeVar("Options")


def documented(config_class: type[Options]) -> type[Options]:
    """Class decorator, above `@dataclass`, that takes the command line's helps from the class's docstring.

    An option's text stands there under a line "name (`type`, *optional*, defaults to `value`):", further indented.
    Options that have `metadata={"help": ...}` need none.

    Raises:
        TypeError: An option that the class adds or changes has no text, or a text is about no option of the class.
    """
    if sys.flags.optimize > 1:  # `python -OO` removes docstrings
        return config_class
    entries = re.findall(r"^( +)(\w+) \(`.*\):\n((?:\1 +.+\n)+)", config_class.__doc__ or "", re.MULTILINE)
    # argparse formats helps with "%".
    helps = {name: " ".join(text.split()).replace("%", "%%") for _, name, text in entries}
    own = [option for option in fields(config_class) if option.name in config_class.__annotations__]  # type: ignore[arg-type]
    for option in own:
        if option.name in helps:
            option.metadata = MappingProxyType({**option.metadata, "help": helps.pop(option.name)})
    wrong = [*(option.name for option in own if not option.metadata.get("help")), *helps]
    if wrong:
        raise TypeError(
            f"{config_class.__name__}: {', '.join(wrong)}: every option that the class defines needs a text in its "
            "docstring, or metadata={'help': ...}, and every text there an option that the class defines."
        )
    return config_class

"""A command: its options, and what it does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .parser import OptionParser, Parsed, UsageError


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Args:
        name: As it is written.
        summary: One line, which begins with a verb.
        kinds: Dataclasses of its options.
        run: Gets the options and the words after the command's name; returns the exit status.
        positional: Options whose values may stand without a flag, at the beginning, in this order.
    """

    name: str
    summary: str
    kinds: Sequence[type]
    run: Callable[[Parsed, Sequence[str]], int]
    positional: Sequence[str] = ()

    def parser(self) -> OptionParser:
        places = "".join(f" {name.upper()}" for name in self.positional)
        parser = OptionParser(self.name, self.kinds, f"{self.summary[0].upper()}{self.summary[1:]}.")
        parser.usage = (parser.usage or "").replace(self.name, self.name + places, 1)
        return parser

    def parse(self, words: Sequence[str]) -> Parsed:
        """Reads the words after the command's name.

        Raises:
            UsageError: They cannot be used.
        """
        return self.parser().read(self._with_flags(words))

    def _with_flags(self, words: Sequence[str]) -> list[str]:
        first = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
        leading, rest = list(words[:first]), list(words[first:])
        if len(leading) > len(self.positional):
            place = leading[len(self.positional)]
            raise UsageError(f"{place!r} is not an option's value here; options begin with --.")
        flags = [part for name, word in zip(self.positional, leading, strict=False) for part in (f"--{name}", word)]
        return flags + rest

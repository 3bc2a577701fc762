"""A command: its options, and what it does."""

from collections.abc import Callable, Collection, Sequence
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
        rest: Whether the last of them takes all further words.
        unused: Options that its file may have for other commands.
    """

    name: str
    summary: str
    kinds: Sequence[type]
    run: Callable[[Parsed, Sequence[str]], int]
    positional: Sequence[str] = ()
    rest: bool = False
    unused: Collection[str] = ()

    def parser(self, kinds: Sequence[type] | None = None) -> OptionParser:
        """Its parser; with `kinds` in place of its own, where these depend on what was given."""
        places = "".join(f" {name.upper()}" for name in self.positional)
        about = f"{self.summary[0].upper()}{self.summary[1:]}."
        parser = OptionParser(self.name, kinds or self.kinds, about, self.unused)
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
        if len(leading) > len(self.positional) and self.rest:
            flags = [f"--{self.positional[-1]}", *leading[len(self.positional) - 1 :]]
            leading = leading[: len(self.positional) - 1]
            rest = flags + rest
        if len(leading) > len(self.positional):
            place = leading[len(self.positional)]
            raise UsageError(f"{place!r} is not an option's value here; options begin with --.")
        flags = [part for name, word in zip(self.positional, leading, strict=False) for part in (f"--{name}", word)]
        return flags + rest

"""The command line `trl-diffusion-pref`.

`main` runs a command, `check` reads one without running it, and `make_parser` gives its parser.
"""

from .main import check, main, make_parser
from .parser import UsageError


__all__ = ["UsageError", "check", "main", "make_parser"]

"""The command line `trl-diffusion-pref`; `main` runs a command, `check` reads one without running it."""

from .main import check, main
from .parser import UsageError


__all__ = ["UsageError", "check", "main"]

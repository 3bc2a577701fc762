"""Runs an example as a user does."""

import importlib.util
from pathlib import Path
from typing import Any


EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: str) -> Any:
    """What `main` of `examples/{name}.py` returns for a command line."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(arguments))

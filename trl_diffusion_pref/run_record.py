"""The small JSON file beside trained weights that says what they were trained from."""

import json
from pathlib import Path
from typing import Any


RUN_RECORD = "trl_diffusion_pref.json"


def write_run_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes what a folder's weights were trained from."""
    unfinished = folder / f"{RUN_RECORD}.unfinished"
    unfinished.write_text(json.dumps(record, indent=2) + "\n")
    unfinished.replace(folder / RUN_RECORD)


def read_run_record(folder: Path) -> dict[str, Any] | None:
    """The record, or None where there is none that can be read."""
    try:
        return json.loads((folder / RUN_RECORD).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None

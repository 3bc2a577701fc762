"""Which checkpoints in a folder are whole, and of which base model they are."""

import json
from pathlib import Path

from accelerate.logging import get_logger
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..run_record import RUN_RECORD, read_run_record


logger = get_logger(__name__)

# transformers writes this file last.
_LAST_WRITTEN = "trainer_state.json"


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, newest step first."""
    found = [
        (int(step), folder)
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdigit() and folder.is_dir()
    ]
    return [folder for _, folder in sorted(found, reverse=True)]


def checkpoint_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        json.loads((folder / _LAST_WRITTEN).read_text())
    except FileNotFoundError:
        return f"{_LAST_WRITTEN}, which is written last, is missing, so the checkpoint is unfinished"
    except json.JSONDecodeError:
        return f"{_LAST_WRITTEN} is cut off, so the checkpoint is unfinished"
    if read_run_record(folder) is None:
        return f"{RUN_RECORD} is missing, so it was not written by this package"
    return None


def last_complete_checkpoint(output_dir: Path) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint, and the names of newer ones that are not."""
    incomplete = []
    for folder in checkpoints(output_dir):
        if checkpoint_problem(folder) is None:
            return str(folder), incomplete
        incomplete.append(folder.name)
    return None, incomplete


def checkpoint_to_resume(asked: str | bool | None, output_dir: Path, base_fingerprint: str) -> Path | None:
    """The checkpoint that a training goes on from, or None.

    Args:
        asked: As `train` takes it: True for the newest whole one in `output_dir`, or a folder.

    Raises:
        ValueError: There is no whole one, the folder asked for is not whole, or of another base model.
    """
    if asked is True:
        newest, incomplete = last_complete_checkpoint(output_dir)
        if incomplete:
            logger.warning(f"Passing over unfinished checkpoints: {', '.join(incomplete)}.")
        if newest is None:
            raise ValueError(
                f"There is no complete checkpoint in {output_dir} to resume from. Call train() without "
                "resume_from_checkpoint to start anew."
            )
        return Path(newest)
    if not asked:
        return None
    problem = checkpoint_problem(Path(asked))
    if problem:
        raise ValueError(f"Cannot resume from {asked}: {problem}.")
    check_checkpoint_base(Path(asked), base_fingerprint, "Pass the base that it was trained from as model.")
    return Path(asked)


def check_same_base(output_dir: Path, base_fingerprint: str) -> None:
    """Refuses an output folder with checkpoints of another base model.

    Raises:
        ValueError: Names the checkpoint and both bases.
    """
    for folder in checkpoints(output_dir):
        check_checkpoint_base(
            folder, base_fingerprint, "Give this run another output_dir, or remove the old checkpoints."
        )


def check_checkpoint_base(folder: Path, base_fingerprint: str, remedy: str) -> None:
    """Refuses one checkpoint of another base model, see `check_same_base`."""
    record = read_run_record(folder)
    if record is not None and record["base_fingerprint"] != base_fingerprint:
        raise ValueError(
            f"{folder} was trained from another base model ({record['base_model'] or 'a local pipeline'}, "
            f"fingerprint {record['base_fingerprint']}; the one passed has {base_fingerprint}). {remedy}"
        )

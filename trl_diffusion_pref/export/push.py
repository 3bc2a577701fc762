"""Uploads what a trainer saved to the Hub, now or later."""

import os
import re
import shlex
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from peft.utils import CONFIG_NAME as PEFT_CONFIG

from .card_contents import comparison
from .files import write_whole
from .weights import RUN_RECORD, read_run_record


# Beside a saved model: checkpoints, what is being written, and pickles (the optimizer's state, transformers' options),
# which nobody should have to load from somebody else.
NOT_PUSHED = ("_*", ".*", "checkpoint-*", "*.bin", "*.pt", "*.pth")
_PIPELINE_INDEX, _CARD = "model_index.json", "README.md"
# The calls of a card's code that name its own repository; a full model's card has only the last.
_OWN_NAME = (
    r'load_lora_weights\("([^"]*)"',
    r'PeftModel\.from_pretrained\([\w.]+, "([^"]*)"',
    r'negative_guidance\(pipeline, "([^"]*)"',
    r'Pipeline\.from_pretrained\("([^"]*)"',
)


class PushError(RuntimeError):
    """An upload to the Hub failed; what it should have uploaded is on disk, and the message says how to push it."""


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads a folder that a trainer saved, without its checkpoints, optimizer and options.

    The model card in the folder is completed first: its code gets the repository's name, and a comparison that was
    made after the training its section.

    Args:
        folder: `output_dir` of a run, or a LoRA's checkpoint.
        repo_id: "user/name", or "name" for one's own account; made if it does not exist.
        private: Whether a new repository is private; None for the account's default.
        token: Default: the one that `hf auth login` stored.
        revision: A branch, made if it does not exist. Default: main.
        commit_message: Default: "Upload " and the folder's name.

    Returns:
        The address of what was pushed.

    Raises:
        ValueError: No folder with a whole pipeline or a LoRA that a trainer of this package saved.
        PushError: The Hub cannot be reached or refuses.
    """
    path = Path(folder)
    check_can_be_pushed(path)
    api = HfApi(token=token)
    try:
        repo_id = make_repository(api, repo_id, private, revision)
        complete_card(path, repo_id)
        upload(api, path, repo_id, revision, commit_message or f"Upload {path.resolve().name}")
    except Exception as error:
        raise PushError(explained(error, path, repo_id, private, revision)) from error
    return f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def check_can_be_pushed(folder: Path) -> None:
    """Raises where a folder holds nothing that others could load.

    Raises:
        ValueError: Says what is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Pass the output_dir of a run.")
    if read_run_record(folder) is None:
        raise ValueError(f"{folder} holds no {RUN_RECORD}, so no trainer of this package saved a model there.")
    if not ((folder / _PIPELINE_INDEX).is_file() or (folder / PEFT_CONFIG).is_file()):
        raise ValueError(
            f"{folder} holds neither a whole pipeline ({_PIPELINE_INDEX}) nor a LoRA ({PEFT_CONFIG}). Checkpoints of "
            "full training hold the denoiser alone: pass the folder that save_model wrote."
        )


def make_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Makes a repository and a branch where they do not exist; returns the repository's whole name.

    Args:
        api: With the token.
        repo_id, private, revision: See `push_folder`.
    """
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def upload(api: HfApi, folder: Path, repo_id: str, revision: str | None, commit_message: str | None) -> CommitInfo:
    """Uploads a saved model in one commit, without what nobody needs to load it."""
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        ignore_patterns=list(NOT_PUSHED),
    )


def complete_card(folder: Path, repo_id: str) -> None:
    """Gives the code in a folder's model card the name under which it is pushed, and adds a comparison made since."""
    file = folder / _CARD
    if not file.is_file():
        return
    before, fence, rest = file.read_text(encoding="utf-8").partition("```python\n")
    code, end, after = rest.partition("```")
    for call in _OWN_NAME:
        if found := re.search(call, code):
            code = code[: found.start(1)] + repo_id + code[found.end(1) :]
            break
    if (section := comparison(folder)) and "\n## Comparison\n" not in after:
        after = after.replace("\n## Data\n", f"\n## Comparison\n\n{section}\n\n## Data\n", 1)
    write_whole(file, (before + fence + code + end + after).encode())


def push_command(folder: Path, repo_id: str, private: bool | None, revision: str | None) -> str:
    """The command that pushes a folder later."""
    words = ["trl-diffusion-pref", "push", str(folder), repo_id]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision else []
    return shlex.join(words)


def first_line(error: BaseException) -> str:
    """Of an error's message; huggingface_hub's have several, and begin with empty ones."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def explained(error: BaseException, folder: Path, repo_id: str, private: bool | None, revision: str | None) -> str:
    """What failed, that the weights are safe, and the command that pushes them."""
    return (
        f"Pushing to {repo_id} failed ({first_line(error)}). The weights are in {folder}. When the Hub can be reached "
        "and `hf auth login` has stored a token that may write there, push them with\n"
        f"    {push_command(folder, repo_id, private, revision)}"
    )

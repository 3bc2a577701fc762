"""A stand-in for the Hub's API that keeps what is pushed."""

import shutil
from pathlib import Path

import pytest


class FakeHub:
    """Stands in for the Hub: keeps what is uploaded as folders."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commits = folder, 0

    def create_repo(self, repo_id, **kwargs):
        return type("Url", (), {"repo_id": repo_id})()

    def upload_folder(self, repo_id, folder_path, path_in_repo="", ignore_patterns=(), **kwargs):
        self.commits += 1
        target = self.folder / f"commit-{self.commits}" / path_in_repo
        shutil.copytree(folder_path, target, ignore=shutil.ignore_patterns(*ignore_patterns))
        return type(
            "Job", (), {"is_done": lambda self: True, "done": lambda self: True, "result": lambda self: None}
        )()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: fake)
    return fake

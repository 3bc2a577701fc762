"""README.md and docs/: every block of code is run or checked, and links lead somewhere.

Python blocks run as pasted, in order. Command lines are read by the program that they name, without running it.

Stand-ins: the embedded pipeline for names of the Hub, four pairs in a folder for the reader's data, one training step.
"""

import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from helpers.pages import PAGES, blocks, page_id
from helpers.shell_lines import check, check_yaml, commands
from PIL import Image

from trl_diffusion_pref import families
from trl_diffusion_pref.shapes import pipeline_folder, preference_pairs


STAND_INS = {
    r'"(stable-diffusion-v1-5|stabilityai)/[^"]*"': f'"{pipeline_folder()}"',
    r"max_steps=\d+": "max_steps=1, disable_tqdm=True",
    r"per_device_train_batch_size=\d+": "per_device_train_batch_size=2",
    # On a machine without a GPU this precision has to be asked for.
    r"bf16=True": "bf16=True, use_cpu=True",
}


def python_blocks(page: Path) -> list[str]:
    found = [text for language, text in blocks(page) if language == "python"]
    for pattern, stand_in in STAND_INS.items():
        found = [re.sub(pattern, lambda _, value=stand_in: value, text) for text in found]
    return found


@pytest.fixture
def readers_folder(tmp_path, monkeypatch) -> Path:
    """The working directory of a reader who has the file `pairs.jsonl` that the pages load."""
    pairs = preference_pairs(4, seed=7)
    for index, row in enumerate(pairs):
        for column in ("chosen", "rejected"):
            row[column].save(tmp_path / f"{column}-{index}.png")
    pairs = pairs.remove_columns(["chosen", "rejected"]).map(
        lambda _, index: {"chosen": f"chosen-{index}.png", "rejected": f"rejected-{index}.png"}, with_indices=True
    )
    pairs.to_json(tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    # A page may register a family, which other tests must not see.
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=page_id)
def test_the_python_blocks_of_a_page_run_in_order(page, readers_folder, monkeypatch):
    # A module that can be imported, since transformers pickles the config, whose class a page may define.
    module = ModuleType(f"blocks_of_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for number, block in enumerate(python_blocks(page), start=1):
        # A traceback then names page and block in place of the file.
        exec(compile(block, f"{page.name}, Python block {number}", "exec"), vars(module))
    if hasattr(module, "image"):
        assert isinstance(module.image, Image.Image)


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


CHECKED = ("sh", "bash", "yaml", "toml", "json")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(language in CHECKED for language, _ in blocks(page))], ids=page_id
)
def test_the_command_lines_and_files_of_a_page_are_valid(page, readers_folder):
    for language, text in blocks(page):
        if language in ("sh", "bash"):
            for words in commands(text):
                check(words, page)
        elif language == "yaml":
            # A block that begins with "# name.yaml" is the file of that name in later commands.
            named = re.match(r"# (\S+\.yaml)", text)
            check_yaml(text, page, readers_folder / (named[1] if named else "unnamed.yaml"))
        elif language == "toml":
            tomllib.loads(text)
        elif language == "json":
            for line in text.splitlines():
                json.loads(line)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_of_a_page_has_a_language_that_is_checked(page):
    # What is meant for no program is `text`, maths, or a directive of the site.
    languages = {language for language, _ in blocks(page)}
    assert languages <= {"python", "text", "math", "{toctree}", "{eval-rst}", *CHECKED}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text()):
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {path}"
        assert not fragment or fragment in anchors(linked), f"{linked.name} has no heading for #{fragment}"

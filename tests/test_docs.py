"""README.md and docs/: the Python blocks of each page run as pasted, in order, and links lead somewhere.

Stand-ins: the embedded pipeline for names of the Hub, four pairs in a folder for the reader's data, one training step.
"""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import trl_diffusion_pref
from trl_diffusion_pref import families
from trl_diffusion_pref.shapes import pipeline_folder, preference_pairs


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
STAND_INS = {
    r'"(stable-diffusion-v1-5|stabilityai)/[^"]*"': f'"{pipeline_folder()}"',
    r"max_steps=\d+": "max_steps=1, disable_tqdm=True",
    r"per_device_train_batch_size=\d+": "per_device_train_batch_size=2",
    # On a machine without a GPU this precision has to be asked for.
    r"bf16=True": "bf16=True, use_cpu=True",
}


def python_blocks(page: Path) -> list[str]:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for pattern, stand_in in STAND_INS.items():
        blocks = [re.sub(pattern, lambda _, value=stand_in: value, block) for block in blocks]
    return blocks


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


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text()):
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {path}"
        assert not fragment or fragment in anchors(linked), f"{linked.name} has no heading for #{fragment}"


def test_the_pages_mention_every_public_name():
    pages = "".join(page.read_text() for page in PAGES)
    missing = [name for name in trl_diffusion_pref.__all__ if not re.search(rf"\b{name}\b", pages)]
    assert not [name for name in missing if name != "__version__"]

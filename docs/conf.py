"""How Sphinx builds the documentation: `make docs`.

The source folder is the repository's root, so that a link from a page to another one, to a table in benchmarks/results
or to a script is the same on the site as on GitHub.
"""

import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from transformers import TrainingArguments


sys.path.insert(0, str(Path(__file__).parent))

from _docstrings import to_restructured_text  # noqa: E402

from trl_diffusion_pref import __version__  # noqa: E402


# Address of the public repository. Once it is set, every page links to its source there.
REPOSITORY = ""

project = "trl_diffusion_pref"
author = "The trl_diffusion_pref contributors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/results/*.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = ["docs/_build", ".venv*", ".git", "tests", "trl_diffusion_pref"]

# The anchors of headings are GitHub's.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "amsmath"]

napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_default_options = {"member-order": "bysource", "show-inheritance": True}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "trl_diffusion_pref"
html_static_path = ["static"]
html_css_files = ["site.css"]
# The root's index.html leads to docs/index.html.
html_extra_path = ["site"]
html_theme_options = (
    {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": ""} if REPOSITORY else {}
)


def convert_docstring(app: Sphinx, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_restructured_text(lines)


def hide_options_in_signature(
    app: Sphinx, what: str, name: str, item: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A config's signature would have two hundred options, which its docstring describes."""
    if isinstance(item, type) and is_dataclass(item) and issubclass(item, TrainingArguments):
        return "(**options)", None
    return signature, returns


def setup(app: Sphinx) -> None:
    # Before napoleon, which is called at 500.
    app.connect("autodoc-process-docstring", convert_docstring, priority=400)
    app.connect("autodoc-process-signature", hide_options_in_signature)

"""README.md and docs/: names, options, defaults and numbers that the pages mention are those of the code."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import datasets
import diffusers
import pytest
import yaml
from helpers.pages import API_PAGES, PAGES, ROOT, blocks, inline_code, page_id
from peft import LoraConfig
from PIL import Image

from trl_diffusion_pref import TRAINERS
from trl_diffusion_pref.cli.commands import commands
from trl_diffusion_pref.training.config import DiffusionPreferenceConfig


PUBLIC = ("rewards", "evaluation", "guidance", "export", "preference_data", "shapes", "families", "inspection")
PUBLIC += ("memory", "cli")
MODULES = ["trl_diffusion_pref", *(f"trl_diffusion_pref.{name}" for name in (*PUBLIC, "diffusion.noise"))]
# The page about other people's scripts names their options; it has a test of its own.
OTHERS_OPTIONS = ("coming_from.md",)
# Of `from_pretrained`, and of the authors' scripts.
OTHER_ARGUMENTS = {"dtype", "text_encoder_3"}
OTHER_FLAGS = {"scale_lr"}


def api_entries() -> list[str]:
    """Full names of what the API pages describe."""
    text = "".join(page.read_text() for page in API_PAGES)
    return re.findall(r"^\.\. (?:auto\w+|py:\w+):: (\S+)$", text, flags=re.MULTILINE)


def named(path: str) -> Any:
    """The object of a dotted name, whose first parts are modules."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            item = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            item = getattr(item, part)
        return item
    raise AssertionError(path)


@pytest.mark.parametrize("module", MODULES)
def test_the_api_pages_have_every_public_name(module):
    entries = set(api_entries())
    names = importlib.import_module(module).__all__
    missing = [name for name in names if not {f"{module}.{name}", f"trl_diffusion_pref.{name}"} & entries]
    assert not missing


def test_the_api_pages_have_the_functions_of_likelihoods():
    module = importlib.import_module("trl_diffusion_pref.diffusion.elbo")
    functions = inspect.getmembers(module, inspect.isfunction)
    names = {f"{module.__name__}.{name}" for name, item in functions if item.__module__ == module.__name__}
    assert names and names <= set(api_entries())


def test_the_api_pages_describe_nothing_twice_and_nothing_that_is_not_there():
    entries = api_entries()
    assert len(entries) == len(set(entries))
    for entry in entries:
        named(entry)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in API_PAGES], ids=page_id)
def test_what_a_page_imports_is_on_an_api_page(page):
    entries = {entry.removeprefix("trl_diffusion_pref.").rpartition(".")[2] for entry in api_entries()}
    for language, text in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl_diffusion_pref"):
                assert {alias.name for alias in node.names} <= entries | set(PUBLIC)


@cache
def known_options() -> set[str]:
    """Options of every command and every example, as they are written after "--"."""
    options = {"help", "version"}
    for command in commands().values():
        for action in command.parser()._actions:
            options |= {string.removeprefix("--") for string in action.option_strings}
    scripts = [*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]
    for script in (*scripts, ROOT / "trl_diffusion_pref/shapes/train.py"):
        options |= set(re.findall(r'add_argument\(\s*"--(\w+)"', script.read_text()))
    return options


@cache
def known_arguments() -> set[str]:
    """Options of the configs, and arguments of public functions and of what the pages pass to host libraries."""
    names = {option.name for config, _ in TRAINERS.values() for option in fields(config)} | OTHER_ARGUMENTS
    for entry in api_entries():
        names |= arguments_of(named(entry))
    pipelines = (diffusers.StableDiffusionPipeline, diffusers.FluxPipeline)
    for function in (
        LoraConfig,
        Image.Image.resize,
        datasets.load_dataset,
        *(pipeline.__call__ for pipeline in pipelines),
    ):
        names |= arguments_of(function)
    return names


def arguments_of(item: Any) -> set[str]:
    if not callable(item):
        return set()
    try:
        names = set(inspect.signature(item).parameters)
    except (TypeError, ValueError):
        return set()
    if isinstance(item, type):
        for _, method in inspect.getmembers(item, inspect.isfunction):
            names |= set(inspect.signature(method).parameters)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in OTHERS_OPTIONS], ids=page_id)
def test_the_flags_that_a_page_names_exist(page):
    flags = {flag for span in inline_code(page) for flag in re.findall(r"(?<![\w-])--([a-z]\w*)", span)}
    assert not flags - known_options() - OTHER_FLAGS


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in OTHERS_OPTIONS], ids=page_id)
def test_the_options_that_a_page_sets_exist(page):
    for span in inline_code(page):
        if option := re.match(r"(\w+)=[^=]", span):
            assert option[1] in known_arguments(), f"`{span}`"
        try:
            calls = [node for node in ast.walk(ast.parse(span)) if isinstance(node, ast.Call)]
        except SyntaxError:
            continue
        for call in calls:
            given = {keyword.arg for keyword in call.keywords if keyword.arg}
            name = call.func.id if isinstance(call.func, ast.Name) else ""
            config = next((config for config, _ in TRAINERS.values() if config.__name__ == name), None)
            if config is not None:
                assert given <= {option.name for option in fields(config)}, f"`{span}`"
            else:
                assert given <= known_arguments(), f"`{span}`"


CONFIGS = {config.__name__: config for config, _ in TRAINERS.values()}
CONFIGS["DiffusionPreferenceConfig"] = DiffusionPreferenceConfig


def quoted_defaults() -> dict[str, dict[str, str]]:
    """By config and option, the default that docs/papers.md gives."""
    found: dict[str, dict[str, str]] = {}
    for section in re.split(r"^\| option of ", (ROOT / "docs/papers.md").read_text(), flags=re.MULTILINE)[1:]:
        config = re.match(r"`(\w+)`", section)[1]
        found[config] = dict(re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", section, flags=re.MULTILINE))
    return found


@pytest.mark.parametrize("config", CONFIGS)
def test_the_paper_index_has_the_defaults_of_the_code(config):
    options = CONFIGS[config](output_dir="unused", use_cpu=True)
    by_model = set(TABLES_OF_MODELS[config])
    for name, quoted in quoted_defaults()[config].items():
        if quoted == "the model's":
            assert name in by_model
        else:
            value = getattr(options, name)
            assert ast.literal_eval(quoted.strip("`")) == getattr(value, "value", value), name


@pytest.mark.parametrize("config", [config for config, _ in TRAINERS.values()], ids=lambda config: config.__name__)
def test_the_paper_index_has_every_option_of_an_algorithm(config):
    assert set(config(output_dir="unused", use_cpu=True).own_options()) <= set(quoted_defaults()[config.__name__])


def _tables_of_models() -> dict[str, list[str]]:
    """By config, the options that docs/hyperparameters.md has a column of."""
    sections = re.split(r"^## ", (ROOT / "docs/hyperparameters.md").read_text(), flags=re.MULTILINE)[1:]
    columns = {
        text.partition("\n")[0]: re.findall(r"`(\w+)`", re.search(r"^\| pipeline .*$", text, re.MULTILINE)[0])
        for text in sections
    }
    assert columns.keys() == {trainer._name for _, trainer in TRAINERS.values()}
    return {config.__name__: columns[trainer._name] for config, trainer in TRAINERS.values()} | {
        "DiffusionPreferenceConfig": []
    }


TABLES_OF_MODELS = _tables_of_models()


def test_rows_with_measured_numbers_stand_in_a_result_file():
    results = {line for path in ROOT.glob("benchmarks/results/*.md") for line in path.read_text().splitlines()}
    page = (ROOT / "docs/which_method.md").read_text()
    rows = [row for row in re.findall(r"^\|.*\|$", page, flags=re.MULTILINE) if re.search(r"\d%|\d\.\d\d", row)]
    assert len(rows) > 15 and not [row for row in rows if row not in results]


def test_the_site_lists_every_page_once():
    listed = []
    for page in [ROOT / "docs/index.md", ROOT / "docs/api/index.md"]:
        for language, text in blocks(page):
            if language == "{toctree}":
                listed += [
                    (page.parent / f"{name}.md").resolve() for name in text.splitlines() if name[:1] not in ("", ":")
                ]
    pages = [*ROOT.glob("docs/*.md"), *API_PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    assert sorted(listed) == sorted(page for page in pages if page != ROOT / "docs/index.md")


@pytest.fixture(scope="module")
def docstrings() -> ModuleType:
    spec = spec_from_file_location("docs_docstrings", ROOT / "docs/_docstrings.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_option_of_a_docstring_becomes_an_entry_with_type_and_default(docstrings):
    option = ["    size (`int` or `str`, *optional*, defaults to `8`):", "        A side."]
    lines = docstrings.to_restructured_text(["Options.", "", "> Parameters of the loss", "", *option])
    start = lines.index(".. py:attribute:: size")
    assert ".. rubric:: Parameters of the loss" in lines[:start]
    assert lines[start + 1 :] == ["    :type: int | str", "    :value: 8", "", "    A side."]


def test_markdown_of_a_docstring_becomes_restructured_text(docstrings):
    text = "See [`MaPOTrainer`], `a_b` and `x`s of *args.\n\n```python\nprint(1)\n```"
    assert docstrings.to_restructured_text(text.split("\n")) == [
        r"See :py:obj:`~.MaPOTrainer`, ``a_b`` and ``x``\ s of \*args.",
        *("", "", ".. code-block:: python", "", "    print(1)", ""),
    ]


def test_the_files_for_a_public_repository_are_valid():
    parsed = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github").rglob("*.yml")}
    assert {"bug.yml", "feature.yml", "new_model_or_method.yml"} <= parsed.keys()
    for name in ("bug.yml", "feature.yml", "new_model_or_method.yml"):
        assert {"name", "description", "body"} <= parsed[name].keys()
    job = parsed["ci.yml"]["jobs"]["test"]
    assert job["timeout-minutes"] == 90 and {"run": ".ci/run"} in job["steps"]
    assert {"python-version": "3.11"} in [step.get("with") for step in job["steps"]]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["license"] == "Apache-2.0"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-c", ROOT / "docs"]
    result = subprocess.run([*command, ROOT, tmp_path / "html"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "html/index.html").exists()
    page = (tmp_path / "html/docs/api/configs.html").read_text()
    assert 'id="trl_diffusion_pref.MaPOConfig.snr_value"' in page
    shutil.rmtree(tmp_path / "html")

"""The rules of the layout: imports go one way, files are short, and private names of host libraries stay in two."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trl_diffusion_pref


ROOT = Path(trl_diffusion_pref.__file__).parent
# Each may import what stands before it.
ORDER = ["version", "host_libraries", "diffusion", "fingerprint", "families", "export", "data", "inspection"]
ORDER += ["guidance", "rewards", "evaluation", "preference_data", "training", "algorithms", "encode", "memory", "cli"]
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path.name != "version.py")


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of each import, relative ones as `trl_diffusion_pref.…`."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = ["trl_diffusion_pref", *path.parts[: len(path.parts) - node.level]]
                module = ".".join([*package, *([module] if module else [])])
            found += [(module, alias.name) for alias in node.names]
    return found


def part(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else path.stem


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    here = part(path)
    if here == "__init__":
        return
    for module, _ in imports(path):
        parts = module.split(".")
        if parts[0] != "trl_diffusion_pref" or len(parts) == 1 or parts[1] == here:
            continue
        # Shapes use nothing of the trainers, only what samples from a pipeline.
        before = ["host_libraries", "evaluation"] if here == "shapes" else ORDER[: ORDER.index(here)]
        # The demo, and names for its pipeline and pairs.
        before = [*before, "shapes"] if here == "cli" else before
        assert parts[1] in before, f"{path} imports {module}, which stands after it"


def test_no_import_leads_in_a_circle():
    """Imports within functions and of type checkers included."""
    modules = {
        ".".join(["trl_diffusion_pref", *path.with_suffix("").parts]).removesuffix(".__init__") for path in FILES
    }
    graph = {}
    for path in FILES:
        module = ".".join(["trl_diffusion_pref", *path.with_suffix("").parts]).removesuffix(".__init__")
        names = {f"{found}.{name}" if f"{found}.{name}" in modules else found for found, name in imports(path)}
        graph[module] = names & modules
    # Raises a CycleError that shows the circle.
    TopologicalSorter(graph).prepare()


def test_no_file_is_longer_than_400_lines():
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in FILES}
    assert not {path: length for path, length in lengths.items() if length > 400}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_algorithms_do_not_import_each_other(path):
    if path.parts[0] != "algorithms" or len(path.parts) < 3:
        return
    for module, _ in imports(path):
        if module.startswith("trl_diffusion_pref.algorithms."):
            assert module.split(".")[2] == path.parts[1], f"{path} imports {module}"


@pytest.mark.parametrize("path", [path for path in FILES if path.match("algorithms/*/loss.py")], ids=str)
def test_losses_import_torch_and_the_standard_library_alone(path):
    foreign = {module.split(".")[0] for module, _ in imports(path)} - sys.stdlib_module_names - {"torch"}
    assert not foreign


@pytest.mark.parametrize("path", FILES, ids=str)
def test_private_names_of_the_host_libraries_stay_in_the_base(path):
    if path in (Path("training/trainer.py"), Path("training/data_config.py")):
        return
    for module, name in imports(path):
        if module.split(".")[0] in ("trl", "transformers", "diffusers", "accelerate", "peft", "datasets"):
            private = [part for part in [*module.split("."), name] if part.startswith("_")]
            assert not private, f"{path} imports {module}.{name}"


def test_nothing_depends_on_torchvision():
    assert not [path for path in FILES for module, _ in imports(path) if module.split(".")[0] == "torchvision"]

"""The rules of the layout: imports go one way, and private names of the host libraries stay in trainer/base_*."""

import ast
from pathlib import Path

import pytest

import trl_diffusion_pref


ROOT = Path(trl_diffusion_pref.__file__).parent
# Each may import what stands before it.
ORDER = ["losses", "noise", "likelihood", "trajectories", "randomness", "architecture", "fingerprint", "run_record"]
ORDER += ["version", "families", "data", "guidance", "evaluation", "hub", "trainer", "memory"]
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
        assert here != "shapes", f"{path} is a user of nothing in the package, but imports {module}"
        assert parts[1] in ORDER[: ORDER.index(here)], f"{path} imports {module}, which stands after it"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_algorithms_do_not_import_each_other(path):
    if path.parts[0] != "trainer" or not path.stem.endswith(("_trainer", "_config")):
        return
    algorithm = path.stem.rsplit("_", 1)[0]
    for module, _ in imports(path):
        name = module.rsplit(".", 1)[-1]
        if module.startswith("trl_diffusion_pref.trainer.") and name.endswith(("_trainer", "_config")):
            assert name.rsplit("_", 1)[0] in (algorithm, "base", "row", "pairwise"), f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_private_names_of_the_host_libraries_stay_in_the_base(path):
    if path.parts[0] == "trainer" and path.name.startswith("base_"):
        return
    for module, name in imports(path):
        if module.split(".")[0] in ("trl", "transformers", "diffusers", "accelerate", "peft", "datasets"):
            private = [part for part in [*module.split("."), name] if part.startswith("_")]
            assert not private, f"{path} imports {module}.{name}"


def test_nothing_depends_on_torchvision():
    assert not [path for path in FILES for module, _ in imports(path) if module.split(".")[0] == "torchvision"]

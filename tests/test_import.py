"""What `import trl_diffusion_pref` costs and prints, in processes of their own."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import trl_diffusion_pref


ROOT = Path(trl_diffusion_pref.__file__).parent.parent


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)


def test_importing_the_package_loads_no_torch():
    assert run("import sys, trl_diffusion_pref; print('torch' in sys.modules)").stdout == "False\n"


def test_importing_the_package_takes_no_time_beyond_trl():
    code = (
        "import time, trl; start = time.perf_counter(); import trl_diffusion_pref; print(time.perf_counter() - start)"
    )
    assert float(run(code).stdout) < 0.3


@pytest.mark.newest
@pytest.mark.filterwarnings("ignore")
def test_import_and_config_print_nothing(tmp_path):
    result = run(f"import trl_diffusion_pref; trl_diffusion_pref.MaPOConfig(output_dir={str(tmp_path / 'x')!r})")
    assert (result.stdout, result.stderr) == ("", "")


def test_only_known_notices_are_hidden_and_only_while_importing():
    code = """
import logging
from trl_diffusion_pref.host_libraries import quiet_imports
names = "bitsandbytes.backends.cpu.ops", "transformers.utils.import_utils"
texts = "Failed to load CPU gemm_4bit_forward: no", "`X` requires torchvision (not installed); falling back"
def log(when):
    for name, text in zip(names, texts):
        logging.getLogger(name).warning(f"{text} {when}")
        logging.getLogger(name).warning(f"other {when}")
with quiet_imports():
    log("inside")
log("after")
"""
    logged = run(code).stderr.splitlines()
    assert [line for line in logged if line.endswith("inside")] == ["other inside"] * 2
    assert len([line for line in logged if line.endswith("after")]) == 4


def test_every_public_name_is_listed_and_imported_by_star():
    names = set(trl_diffusion_pref.__all__)
    assert names <= set(dir(trl_diffusion_pref))
    namespace: dict = {}
    exec("from trl_diffusion_pref import *", namespace)
    assert names <= set(namespace)


def test_type_checkers_and_the_table_know_the_same_names():
    tree = ast.parse(Path(trl_diffusion_pref.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported == {
        name: module for name, module in trl_diffusion_pref._MODULES.items() if name in trl_diffusion_pref.__all__
    }


def test_a_config_survives_pickling(tmp_path):
    config = trl_diffusion_pref.MaPOConfig(output_dir=str(tmp_path), beta=0.25)
    assert pickle.loads(pickle.dumps(config)).beta == 0.25


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'KTOTrainer'"):
        trl_diffusion_pref.KTOTrainer  # noqa: B018

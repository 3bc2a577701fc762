"""Shared fixtures. Nothing here downloads: pipelines are built from small configs of the real classes."""

import os
import tempfile


# Before any import that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="trl_diffusion_pref_tests_")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core of its own: with more threads they would wait for each other most of the time.
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest  # noqa: E402
from datasets import Dataset  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402
from helpers.pipelines import build_tiny_pipeline  # noqa: E402

from trl_diffusion_pref import MaPOConfig  # noqa: E402
from trl_diffusion_pref.shapes import preference_pairs  # noqa: E402


# The longest files, which begin first. Each of their tests may run in any worker; the tests of any other file run in
# one worker, since they share fixtures.
SPLIT = ("test_examples.py", "test_estimate.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SPLIT)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return nodeid if file.endswith(SPLIT) else file

    return ByFile(config, log)


@pytest.fixture
def tiny_pipeline() -> StableDiffusionPipeline:
    return build_tiny_pipeline()


@pytest.fixture(scope="session")
def pairs() -> Dataset:
    """Sixteen pairs of drawn shapes."""
    return preference_pairs(16, seed=7)


@pytest.fixture
def config(tmp_path):
    """Makes configs for short runs that write below the test's folder."""

    def make(**options) -> MaPOConfig:
        defaults = {
            "output_dir": str(tmp_path / "output"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "activation_checkpointing": False,
        }
        return MaPOConfig(**{**defaults, **options})

    return make


@pytest.fixture
def image_run(tmp_path):
    """Makes the options of a run of two steps on images of 16 pixels."""

    def make(**more) -> dict:
        defaults = {
            "output_dir": str(tmp_path / "output"),
            "dataset_cache_dir": str(tmp_path / "cache"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "resolution": 16,
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": [],
            "activation_checkpointing": False,
        }
        return {**defaults, **more}

    return make

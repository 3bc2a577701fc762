"""Shared fixtures. Nothing here downloads: pipelines are built from small configs of the real classes."""

import os
import tempfile


# Before any import that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="trl_diffusion_pref_tests_")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest  # noqa: E402
from datasets import Dataset  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402
from helpers.pipelines import build_tiny_pipeline  # noqa: E402

from trl_diffusion_pref import MaPOConfig  # noqa: E402
from trl_diffusion_pref.shapes import preference_pairs  # noqa: E402


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

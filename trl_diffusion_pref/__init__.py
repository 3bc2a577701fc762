"""Preference trainers for diffusion and flow models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .host_libraries import quiet_imports
from .version import __version__


if TYPE_CHECKING:
    from .algorithms import TRAINERS
    from .algorithms.diffusion_dpo.config import DiffusionDPOConfig
    from .algorithms.diffusion_dpo.trainer import DiffusionDPOTrainer
    from .algorithms.mapo.config import MaPOConfig
    from .algorithms.mapo.trainer import MaPOTrainer
    from .algorithms.self_npo.config import SelfNPOConfig
    from .algorithms.self_npo.trainer import SelfNPOTrainer
    from .data.load import load_pairs
    from .memory import MemoryEstimate, estimate_memory
    from .training.divergence import DivergenceError
    from .training.monitor import NonFiniteLossError


__all__ = [
    "TRAINERS",
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "DivergenceError",
    "MaPOConfig",
    "MaPOTrainer",
    "MemoryEstimate",
    "NonFiniteLossError",
    "SelfNPOConfig",
    "SelfNPOTrainer",
    "__version__",
    "estimate_memory",
    "load_pairs",
]

# Where each public name lives. It is imported when it is first used, since torch and the host libraries take seconds.
_MODULES = {
    "DiffusionDPOConfig": "algorithms.diffusion_dpo.config",
    "DiffusionDPOTrainer": "algorithms.diffusion_dpo.trainer",
    "DivergenceError": "training.divergence",
    "MaPOConfig": "algorithms.mapo.config",
    "MaPOTrainer": "algorithms.mapo.trainer",
    "MemoryEstimate": "memory",
    "NonFiniteLossError": "training.monitor",
    "SelfNPOConfig": "algorithms.self_npo.config",
    "SelfNPOTrainer": "algorithms.self_npo.trainer",
    "TRAINERS": "algorithms",
    "estimate_memory": "memory",
    "load_pairs": "data.load",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with quiet_imports():
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

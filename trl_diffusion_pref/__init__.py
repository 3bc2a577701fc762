"""Preference trainers for diffusion and flow models."""

from .memory import MemoryEstimate, estimate_memory
from .trainer.diffusion_dpo_config import DiffusionDPOConfig
from .trainer.diffusion_dpo_trainer import DiffusionDPOTrainer
from .trainer.divergence import DivergenceError
from .trainer.mapo_config import MaPOConfig
from .trainer.mapo_trainer import MaPOTrainer
from .trainer.non_finite import NonFiniteLossError
from .trainer.self_npo_config import SelfNPOConfig
from .trainer.self_npo_trainer import SelfNPOTrainer
from .version import __version__


__all__ = [
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
]

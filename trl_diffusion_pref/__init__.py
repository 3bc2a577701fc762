"""Preference trainers for diffusion and flow models."""

from .trainer.mapo_config import MaPOConfig
from .trainer.mapo_trainer import MaPOTrainer
from .version import __version__


__all__ = ["MaPOConfig", "MaPOTrainer", "__version__"]

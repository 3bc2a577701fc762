"""What the papers say: one folder per algorithm, with its options, its loss and its trainer."""

from .diffusion_dpo.config import DiffusionDPOConfig
from .diffusion_dpo.trainer import DiffusionDPOTrainer
from .mapo.config import MaPOConfig
from .mapo.trainer import MaPOTrainer
from .self_npo.config import SelfNPOConfig
from .self_npo.trainer import SelfNPOTrainer


# Config and trainer by the algorithm's name on a command line.
TRAINERS = {
    "mapo": (MaPOConfig, MaPOTrainer),
    "diffusion-dpo": (DiffusionDPOConfig, DiffusionDPOTrainer),
    "self-npo": (SelfNPOConfig, SelfNPOTrainer),
}

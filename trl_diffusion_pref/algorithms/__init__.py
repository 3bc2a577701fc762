"""What the papers say: one folder per algorithm, with its options, its loss and its trainer."""

from collections.abc import Iterator
from typing import Any

from ..training.config import DiffusionPreferenceConfig
from ..training.trainer import DiffusionTrainer
from .diffusion_dpo.config import DiffusionDPOConfig
from .diffusion_dpo.trainer import DiffusionDPOTrainer
from .diffusion_kto.config import DiffusionKTOConfig
from .diffusion_kto.trainer import DiffusionKTOTrainer
from .diffusion_nft.config import DiffusionNFTConfig
from .diffusion_nft.trainer import DiffusionNFTTrainer
from .diffusion_sft.config import DiffusionSFTConfig
from .diffusion_sft.trainer import DiffusionSFTTrainer
from .flow_rwr.config import FlowRWRConfig
from .flow_rwr.trainer import FlowRWRTrainer
from .mapo.config import MaPOConfig
from .mapo.trainer import MaPOTrainer
from .rank_dpo.config import RankDPOConfig
from .rank_dpo.trainer import RankDPOTrainer
from .self_npo.config import SelfNPOConfig
from .self_npo.trainer import SelfNPOTrainer


# Config and trainer by the algorithm's name on a command line.
TRAINERS: dict[str, tuple[type[DiffusionPreferenceConfig], type[DiffusionTrainer]]] = {
    "mapo": (MaPOConfig, MaPOTrainer),
    "diffusion-dpo": (DiffusionDPOConfig, DiffusionDPOTrainer),
    "rank-dpo": (RankDPOConfig, RankDPOTrainer),
    "self-npo": (SelfNPOConfig, SelfNPOTrainer),
    "diffusion-kto": (DiffusionKTOConfig, DiffusionKTOTrainer),
    "diffusion-sft": (DiffusionSFTConfig, DiffusionSFTTrainer),
    "flow-rwr": (FlowRWRConfig, FlowRWRTrainer),
    "diffusion-nft": (DiffusionNFTConfig, DiffusionNFTTrainer),
}


def trainer_of(config: DiffusionPreferenceConfig) -> type[DiffusionTrainer]:
    """The trainer that takes a config: one of the table, or of an algorithm from outside.

    Raises:
        TypeError: There is none.
    """
    kinds = {trainer.config_class: trainer for trainer in _subclasses(DiffusionTrainer)}
    kind = next((kinds[config_class] for config_class in type(config).__mro__ if config_class in kinds), None)
    if kind is None:
        raise TypeError(
            f"cfg is a {type(config).__name__}. Pass the config that the trainer will get: "
            f"{', '.join(config_class.__name__ for config_class, _ in TRAINERS.values())}."
        )
    return kind


def _subclasses(kind: Any) -> Iterator[type[DiffusionTrainer]]:
    for trainer in kind.__subclasses__():
        yield trainer
        yield from _subclasses(trainer)

"""Preference trainers for diffusion and flow models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .host_libraries import quiet_imports
from .version import __version__


if TYPE_CHECKING:
    from .algorithms import TRAINERS
    from .algorithms.diffusion_dpo.config import DiffusionDPOConfig
    from .algorithms.diffusion_dpo.trainer import DiffusionDPOTrainer
    from .algorithms.diffusion_kto.config import DiffusionKTOConfig
    from .algorithms.diffusion_kto.trainer import DiffusionKTOTrainer
    from .algorithms.diffusion_nft.config import DiffusionNFTConfig
    from .algorithms.diffusion_nft.trainer import DiffusionNFTTrainer
    from .algorithms.diffusion_sft.config import DiffusionSFTConfig
    from .algorithms.diffusion_sft.trainer import DiffusionSFTTrainer
    from .algorithms.flow_rwr.config import FlowRWRConfig
    from .algorithms.flow_rwr.trainer import FlowRWRTrainer
    from .algorithms.mapo.config import MaPOConfig
    from .algorithms.mapo.trainer import MaPOTrainer
    from .algorithms.rank_dpo.config import RankDPOConfig
    from .algorithms.rank_dpo.trainer import RankDPOTrainer
    from .algorithms.self_npo.config import SelfNPOConfig
    from .algorithms.self_npo.trainer import SelfNPOTrainer
    from .data.encoded import EncodedDataset, load_encoded_dataset
    from .data.load import load_pairs
    from .encode import encode_dataset
    from .inspection import DatasetInspection, inspect_dataset
    from .memory import MemoryEstimate, MemoryFit, estimate_memory, fit_memory
    from .preference_data import make_pairs, make_rankings, relabel
    from .training.divergence import DivergenceError
    from .training.monitor import NonFiniteLossError
    from .training.preemption import Preempted
    from .training.rounds import train_in_rounds
    from .training.sample_callback import SampleCallback


__all__ = [
    "TRAINERS",
    "DatasetInspection",
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "DiffusionKTOConfig",
    "DiffusionKTOTrainer",
    "DiffusionNFTConfig",
    "DiffusionNFTTrainer",
    "DiffusionSFTConfig",
    "DiffusionSFTTrainer",
    "DivergenceError",
    "EncodedDataset",
    "FlowRWRConfig",
    "FlowRWRTrainer",
    "MaPOConfig",
    "MaPOTrainer",
    "MemoryEstimate",
    "MemoryFit",
    "NonFiniteLossError",
    "Preempted",
    "RankDPOConfig",
    "RankDPOTrainer",
    "SampleCallback",
    "SelfNPOConfig",
    "SelfNPOTrainer",
    "__version__",
    "encode_dataset",
    "estimate_memory",
    "fit_memory",
    "inspect_dataset",
    "load_encoded_dataset",
    "load_pairs",
    "train_in_rounds",
    "make_pairs",
    "make_rankings",
    "relabel",
]

# Where each public name lives. It is imported when it is first used, since torch and the host libraries take seconds.
_MODULES = {
    "DatasetInspection": "inspection",
    "DiffusionDPOConfig": "algorithms.diffusion_dpo.config",
    "DiffusionDPOTrainer": "algorithms.diffusion_dpo.trainer",
    "DiffusionKTOConfig": "algorithms.diffusion_kto.config",
    "DiffusionKTOTrainer": "algorithms.diffusion_kto.trainer",
    "DiffusionNFTConfig": "algorithms.diffusion_nft.config",
    "DiffusionNFTTrainer": "algorithms.diffusion_nft.trainer",
    "DiffusionSFTConfig": "algorithms.diffusion_sft.config",
    "DiffusionSFTTrainer": "algorithms.diffusion_sft.trainer",
    "DivergenceError": "training.divergence",
    "EncodedDataset": "data.encoded",
    "FlowRWRConfig": "algorithms.flow_rwr.config",
    "FlowRWRTrainer": "algorithms.flow_rwr.trainer",
    "MaPOConfig": "algorithms.mapo.config",
    "MaPOTrainer": "algorithms.mapo.trainer",
    "MemoryEstimate": "memory",
    "MemoryFit": "memory",
    "NonFiniteLossError": "training.monitor",
    "Preempted": "training.preemption",
    "RankDPOConfig": "algorithms.rank_dpo.config",
    "RankDPOTrainer": "algorithms.rank_dpo.trainer",
    "SampleCallback": "training.sample_callback",
    "SelfNPOConfig": "algorithms.self_npo.config",
    "SelfNPOTrainer": "algorithms.self_npo.trainer",
    "TRAINERS": "algorithms",
    "encode_dataset": "encode",
    "estimate_memory": "memory",
    "fit_memory": "memory",
    "inspect_dataset": "inspection",
    "load_encoded_dataset": "data.encoded",
    "load_pairs": "data.load",
    "train_in_rounds": "training.rounds",
    "make_pairs": "preference_data",
    "make_rankings": "preference_data",
    "relabel": "preference_data",
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

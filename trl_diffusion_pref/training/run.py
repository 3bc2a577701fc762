"""What the parts that a trainer holds ask of it."""

from typing import Any, Protocol

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn
from transformers import TrainerCallback

from ..data import DatasetEncoder, Layout
from ..diffusion.noise import NoiseProcess
from ..families import Family
from .checkpoint import Checkpointer
from .config import DiffusionPreferenceConfig
from .denoiser import Denoiser
from .modes import Modes
from .row_cache import RowCache


class Run(Protocol):
    """A `DiffusionTrainer`, as its parts see it while it is made."""

    carried_adapter: bool
    modes: Modes

    @property
    def args(self) -> DiffusionPreferenceConfig: ...

    @property
    def family(self) -> Family: ...

    @property
    def pipeline(self) -> DiffusionPipeline: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def encoder(self) -> DatasetEncoder: ...

    @property
    def noise_process(self) -> NoiseProcess: ...

    @property
    def model(self) -> nn.Module: ...

    @property
    def unwrapped(self) -> nn.Module: ...

    @property
    def accelerator(self) -> Accelerator: ...

    @property
    def denoise(self) -> Denoiser: ...

    @property
    def row_cache(self) -> RowCache: ...

    @property
    def checkpointer(self) -> Checkpointer: ...

    @property
    def shards_weights(self) -> bool: ...

    @property
    def train_dataset(self) -> Any: ...

    @property
    def eval_dataset(self) -> Any: ...

    def add_callback(self, callback: TrainerCallback) -> None: ...

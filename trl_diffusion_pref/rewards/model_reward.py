"""What the rewards that run a model have in common: loading, the device, batches, decoding of samples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.decode.cell import CellProblem
from ..data.decode.image import decode_image
from ..host_libraries import quiet_loading
from .scoring import RewardError, checked_scores, column_slice


def wide(values: Tensor) -> Tensor:
    """In float32, or in float64 as they are: half precision would give many samples equal scores."""
    return values if values.dtype == torch.float64 else values.float()


class ModelReward(ABC):
    """A reward that is computed by a model.

    The model is loaded at the first call, so that a reward costs nothing until it is used. It moves to the device for
    a call and back to the CPU after it, because the model that is trained needs the device's memory.

    Args:
        name: Scores are logged as `scores/<name>`.
        batch_size: Samples in one forward pass. Scores do not depend on it, apart from rounding.
        device: Where the model runs; the GPU if there is one, else the CPU.
        dtype: Of the weights and activations; what follows the embeddings is computed in float32 at least.
        keep_on_device: Leave the model on the device after a call.

    Raises:
        ValueError: `batch_size` is not a positive integer.
    """

    def __init__(
        self,
        *,
        name: str,
        batch_size: int,
        device: str | torch.device | None,
        dtype: torch.dtype,
        keep_on_device: bool,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; it must be a positive integer")
        self.name = self.__name__ = name
        self.batch_size = batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype
        self.keep_on_device = keep_on_device
        self._model: nn.Module | None = None

    def __call__(self, prompts: Sequence[str], samples: Sequence[Any], **columns: Any) -> list[float]:
        """Scores samples.

        Args:
            prompts: One per sample.
            samples: Images as `data.decode.image.decode_image` takes them: PIL images, paths or bytes.
            **columns: Read by the rewards that say so; ignored by others.

        Returns:
            One number per sample, higher is better.

        Raises:
            RewardError: A sample that cannot be decoded, or a score that is not finite.
            ValueError: Another number of prompts than of samples.
        """
        rows = self._rows(prompts, samples, columns)
        if rows.ndim != 1:
            raise TypeError(f"{type(self).__name__}._score returned {tuple(rows.shape)}, not one number per sample")
        return checked_scores(self.name, rows, len(samples))

    def _rows(self, prompts: Sequence[str], samples: Sequence[Any], columns: dict[str, Any]) -> Tensor:
        """`_score` of all samples, in batches: `(samples, ...)` float64 on the CPU."""
        if len(prompts) != len(samples):
            raise ValueError(f"{len(prompts)} prompts for {len(samples)} samples; pass one prompt per sample")
        if not len(samples):
            return torch.zeros(0, dtype=torch.float64)
        rows = []
        model = self.load()
        try:
            model.to(self.device)
            with torch.no_grad():
                for first in range(0, len(samples), self.batch_size):
                    last = min(first + self.batch_size, len(samples))
                    decoded = [self._decoded(samples[index], index) for index in range(first, last)]
                    batch = column_slice(columns, len(samples), first, last)
                    rows.append(self._score(list(prompts[first:last]), decoded, batch).cpu().double())
        finally:
            if not self.keep_on_device:
                model.to("cpu")
        return torch.cat(rows)

    def _decoded(self, sample: Any, index: int) -> Any:
        try:
            return self._decode(sample)
        except CellProblem as problem:
            raise RewardError(self.name, str(problem), index) from problem

    def load(self) -> nn.Module:
        """Loads the model to the CPU if it is not loaded yet, and returns it."""
        if self._model is None:
            with quiet_loading():
                model = self._load()
            self._model = model.to(self.dtype).eval().requires_grad_(False)
        return self._model

    def _decode(self, sample: Any) -> Any:
        """What `_score` gets for a sample; an image unless a reward overrides it.

        Raises:
            CellProblem: It cannot be decoded.
        """
        return decode_image(sample)

    @abstractmethod
    def _load(self) -> nn.Module:
        """The model with its weights, on the CPU; keeps what else the reward needs in attributes."""

    @abstractmethod
    def _score(self, prompts: list[str], samples: list[Any], columns: dict[str, Any]) -> Tensor:
        """Scores of one batch of decoded samples, `(batch,)`, computed on `self.device`."""

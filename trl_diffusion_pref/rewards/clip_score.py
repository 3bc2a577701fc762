"""CLIPScore (Hessel et al. 2021, arXiv:2104.08718): the similarity of an image and its prompt by CLIP."""

from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from .clip import CLIPReward


class CLIPScore(CLIPReward):
    """The cosine of the embeddings of image and prompt.

    Args:
        model: Weights in the format of transformers' `CLIPModel`, with their processor; a repository on the Hub or a
            folder.
        scale: "cosine" as it is, "paper" for `2.5 max(cos, 0)` (equation 1), "torchmetrics" for `100 max(cos, 0)`.
        name, batch_size, device, dtype, keep_on_device: See `ModelReward`.

    Raises:
        ValueError: Another `scale`.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        *,
        scale: Literal["cosine", "paper", "torchmetrics"] = "cosine",
        name: str = "clip_score",
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        keep_on_device: bool = False,
    ) -> None:
        super().__init__(
            model,
            model,
            name=name,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            keep_on_device=keep_on_device,
        )
        if scale not in ("cosine", "paper", "torchmetrics"):
            raise ValueError(f"scale={scale!r}; choose 'cosine', 'paper' or 'torchmetrics'")
        self.scale = scale

    def _score(self, prompts: list[str], samples: list[Image.Image], columns: dict[str, Any]) -> Tensor:
        cosines = self._cosines(prompts, samples)
        if self.scale == "cosine":
            return cosines
        return {"paper": 2.5, "torchmetrics": 100.0}[self.scale] * cosines.clamp(min=0)

"""PickScore (Kirstain et al. 2023, Pick-a-Pic, arXiv:2305.01569): a CLIP ViT-H trained on users' choices."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .clip import CLIPReward
from .model_reward import wide


class PickScore(CLIPReward):
    """`exp(logit_scale) * cos(image, prompt)`, about 18 to 24 for the published weights.

    The softmax of the scores of two images is the probability that users prefer the one to the other.

    Args:
        model: Weights in the format of transformers' `CLIPModel`; a repository on the Hub or a folder.
        processor: Image processor and tokenizer, likewise.
        name, batch_size, device, dtype, keep_on_device: See `ModelReward`.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        name: str = "pickscore",
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        keep_on_device: bool = False,
    ) -> None:
        super().__init__(
            model,
            processor,
            name=name,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            keep_on_device=keep_on_device,
        )

    def _score(self, prompts: list[str], samples: list[Image.Image], columns: dict[str, Any]) -> Tensor:
        return wide(self._clip.logit_scale).exp() * self._cosines(prompts, samples)

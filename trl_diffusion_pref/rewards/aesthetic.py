"""LAION's aesthetic predictor v2 (Schuhmann 2022): how much people like an image, whatever its prompt is."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel

from .clip import image_vectors
from .loading import load_renamed, load_weights, published_file
from .mlp_head import LinearHead
from .model_reward import ModelReward
from .pixels import crop_short_side


class Aesthetic(ModelReward):
    """Linear layers on the unit embedding of the image by CLIP ViT-L/14; about 1 to 10. Prompts are ignored.

    The head was trained on the ratings of SAC, Logos and AVA; the author's file is `sac+logos+ava1-l14-linearMSE.pth`
    in github.com/christophschuhmann/improved-aesthetic-predictor, and the default has the same weights.

    Args:
        model: CLIP's weights in the format of transformers' `CLIPModel`; a repository on the Hub or a folder.
        head: Where the head is, likewise.
        head_file: Its file, safetensors or PyTorch's format.
        name, batch_size, device, dtype, keep_on_device: See `ModelReward`.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        head_file: str = "aesthetic-model.pth",
        *,
        name: str = "aesthetic",
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        keep_on_device: bool = False,
    ) -> None:
        super().__init__(name=name, batch_size=batch_size, device=device, dtype=dtype, keep_on_device=keep_on_device)
        self.model, self.head, self.head_file = model, head, head_file

    def _load(self) -> nn.Module:
        clip = CLIPModel.from_pretrained(self.model)
        # Prompts are ignored, so half of the model can stay away.
        del clip.text_model
        config: Any = clip.config
        self._size = int(config.vision_config.image_size)
        path = published_file(self.head, self.head_file)
        self._clip, self._head = clip, LinearHead(config.projection_dim)
        load_renamed(self._head, load_weights(path), path)
        return nn.ModuleList([self._clip, self._head])

    def _score(self, prompts: list[str], samples: list[Image.Image], columns: dict[str, Any]) -> Tensor:
        pixels = torch.stack([crop_short_side(image, self._size) for image in samples])
        return self._head(image_vectors(self._clip, pixels))

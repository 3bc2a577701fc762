"""Embeddings of images and texts by CLIP models, for the rewards that are built on them."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from .loading import load_image_processor
from .model_reward import ModelReward, wide


def pooled(features: Any) -> Tensor:
    """The vectors `(batch, dim)` of `get_image_features` and its like, which is an object since transformers 5."""
    return features if isinstance(features, Tensor) else features.pooler_output


def unit(vectors: Tensor) -> Tensor:
    """`(batch, dim)` in float32 at least, each of length 1."""
    return torch.nn.functional.normalize(wide(vectors), dim=-1)


def image_vectors(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Unit vectors `(batch, dim)` of images `(batch, 3, height, width)`."""
    return unit(pooled(model.get_image_features(pixel_values=pixels.to(model.device, model.dtype))))


class CLIPReward(ModelReward):
    """A reward from the cosine between a CLIP model's embeddings of image and prompt.

    Args:
        model: Weights in the format of transformers' `CLIPModel`; a repository on the Hub or a folder.
        processor: Image processor and tokenizer, likewise.
        name, batch_size, device, dtype, keep_on_device: See `ModelReward`.
    """

    def __init__(
        self,
        model: str,
        processor: str,
        *,
        name: str,
        batch_size: int,
        device: str | torch.device | None,
        dtype: torch.dtype,
        keep_on_device: bool,
    ) -> None:
        super().__init__(name=name, batch_size=batch_size, device=device, dtype=dtype, keep_on_device=keep_on_device)
        self.model, self.processor = model, processor

    def _load(self) -> CLIPModel:
        self._image_processor = load_image_processor(self.processor)
        self._tokenizer = AutoTokenizer.from_pretrained(self.processor)
        return self._keep(CLIPModel.from_pretrained(self.model))

    def _keep(self, clip: CLIPModel) -> CLIPModel:
        text: Any = clip.config.text_config
        self._clip, self._length = clip, int(text.max_position_embeddings)
        return clip

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        """`(batch, 3, height, width)` float32, normalised."""
        # Older versions take an image of three pixels in height for one with its channels first unless told.
        return self._image_processor(images, return_tensors="pt", input_data_format="channels_last").pixel_values

    def _cosines(self, prompts: list[str], images: list[Image.Image]) -> Tensor:
        """`(batch,)` in [-1, 1]. Prompts are cut to the model's length, 77 tokens."""
        model = self._clip
        tokens = self._tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=self._length,
            return_tensors="pt",
        ).to(model.device)
        texts = pooled(model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"]))
        return (image_vectors(model, self._pixels(images)) * unit(texts)).sum(dim=-1)

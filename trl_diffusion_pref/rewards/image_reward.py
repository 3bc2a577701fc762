"""ImageReward (Xu et al. 2023, arXiv:2304.05977): BLIP trained on experts' rankings, on transformers' BLIP classes."""

import json
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from .loading import load_renamed, load_weights, published_file
from .mlp_head import LinearHead
from .model_reward import ModelReward
from .pixels import crop_short_side


# Of the raw scores on the authors' data.
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_TOKENS = 35
# Of every ViT that BLIP uses.
_HEAD_WIDTH = 64


class ImageReward(ModelReward):
    """A score of how well an image fits its prompt and how good it looks, with mean 0 and deviation 1 on their data.

    BERT reads the prompt and attends to the image's patches; linear layers turn the state of its first token into a
    number, which is normalised. Prompts are cut to 35 tokens.

    Args:
        model: Where `ImageReward.pt` and `med_config.json` are; a repository on the Hub or a folder.
        tokenizer: BERT's, likewise.
        name, batch_size, device, dtype, keep_on_device: See `ModelReward`.
    """

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        *,
        name: str = "image_reward",
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        keep_on_device: bool = False,
    ) -> None:
        super().__init__(name=name, batch_size=batch_size, device=device, dtype=dtype, keep_on_device=keep_on_device)
        self.model, self.tokenizer = model, tokenizer

    def _load(self) -> nn.Module:
        self._tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        # BLIP's own tokens for decoding and encoding; they matter only in a prompt that spells them.
        self._tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
        path = published_file(self.model, "ImageReward.pt")
        weights = _renamed(load_weights(path))
        config = json.loads(published_file(self.model, "med_config.json").read_text())
        self._size, vision_config = _vision_config(weights)
        vision = BlipVisionModel(vision_config)
        text = BlipTextModel(_text_config(config, vision.config.hidden_size), add_pooling_layer=False)
        model = nn.ModuleDict({"vision": vision, "text": text, "mlp": LinearHead(text.config.hidden_size)})
        load_renamed(model, weights, path)
        self._vision, self._text, self._mlp = vision, text, model["mlp"]
        return model

    def _score(self, prompts: list[str], samples: list[Image.Image], columns: dict[str, Any]) -> Tensor:
        pixels = torch.stack([crop_short_side(image, self._size) for image in samples]).to(self.device, self.dtype)
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
        ).to(self.device)
        states = self._text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=self._vision(pixel_values=pixels).last_hidden_state,
            # The class is a decoder so that it has cross attention; without a causal mask it is BERT.
            is_decoder=False,
        ).last_hidden_state
        return (self._mlp(states[:, 0]) - _MEAN) / _STD


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published weights under the names of transformers' classes, without BLIP's unused projections."""
    within = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding",
        "blocks": "encoder.layers",
        "attn.qkv": "self_attn.qkv",
        "attn.proj": "self_attn.projection",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
    }
    renamed = {}
    for name, value in weights.items():
        if name.startswith("blip.visual_encoder."):
            name = name.removeprefix("blip.visual_encoder.")
            for old, new in within.items():
                name = name.replace(old, new)
            if name.startswith("norm."):
                name = f"post_layer{name}"
            name = f"vision.{name}"
        elif name.startswith("blip.text_encoder."):
            if name.endswith("embeddings.position_ids"):
                continue
            name = f"text.{name.removeprefix('blip.text_encoder.')}"
        elif name.startswith(("blip.vision_proj.", "blip.text_proj.")):
            continue
        renamed[name] = value
    return renamed


def _vision_config(weights: dict[str, Tensor]) -> tuple[int, BlipVisionConfig]:
    """Size of the images, and sizes as in the weights: the published ones are a ViT-L/16 at 224 pixels."""
    patches = weights["vision.embeddings.patch_embedding.weight"]
    positions = weights["vision.embeddings.position_embedding"].shape[1] - 1
    layers = {name.split(".")[3] for name in weights if name.startswith("vision.encoder.layers.")}
    size = round(positions**0.5) * patches.shape[-1]
    config = BlipVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=weights["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=patches.shape[0] // _HEAD_WIDTH,
        patch_size=patches.shape[-1],
        image_size=size,
        # timm's, on which BLIP was trained; the default of transformers is ten times as large.
        layer_norm_eps=1e-6,
    )
    return size, config


def _text_config(config: dict[str, Any], vision_width: int) -> BlipTextConfig:
    names = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "hidden_act",
        "layer_norm_eps",
        "pad_token_id",
    ]
    return BlipTextConfig(**{name: config[name] for name in names}, encoder_hidden_size=vision_width, is_decoder=True)

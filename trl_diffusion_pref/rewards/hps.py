"""HPSv2.1 (Wu et al. 2023, arXiv:2306.09341): an open_clip ViT-H/14 trained on human preferences."""

import html
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from .clip import CLIPReward
from .loading import load_renamed, load_weights, published_file
from .pixels import pad_short_side


class HPS(CLIPReward):
    """The cosine of image and prompt, about 0.2 to 0.35 for the published weights; papers print it times 100.

    The image's long side is resized to 224 pixels and the rest is padded with black, so that nothing is cropped.
    HPSv2's own package cleans prompts with ftfy before; prompts with broken encodings are scored differently here.

    Args:
        model: Where the checkpoint is; a repository on the Hub or a folder.
        checkpoint: Its file, with the weights of open_clip's ViT-H/14. "HPS_v2_compressed.pt" is version 2.0.
        base: The same model in transformers' format, of which configuration and tokenizer are read; likewise.
        name, batch_size, device, dtype, keep_on_device: See `ModelReward`.
    """

    def __init__(
        self,
        model: str = "xswu/HPSv2",
        checkpoint: str = "HPS_v2.1_compressed.pt",
        base: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        name: str = "hps",
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        keep_on_device: bool = False,
    ) -> None:
        super().__init__(
            model,
            base,
            name=name,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            keep_on_device=keep_on_device,
        )
        self.checkpoint = checkpoint

    def _load(self) -> CLIPModel:
        self._tokenizer = AutoTokenizer.from_pretrained(self.processor)
        path = published_file(self.model, self.checkpoint)
        weights = load_weights(path)
        clip = CLIPModel(AutoConfig.from_pretrained(self.processor))
        load_renamed(clip, from_open_clip(weights.get("state_dict", weights)), path)
        vision: Any = clip.config.vision_config
        self._size = int(vision.image_size)
        return self._keep(clip)

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        return torch.stack([pad_short_side(image, self._size) for image in images])

    def _score(self, prompts: list[str], samples: list[Image.Image], columns: dict[str, Any]) -> Tensor:
        # open_clip's tokenizer undoes HTML's escapes, twice.
        return self._cosines([html.unescape(html.unescape(prompt)).strip() for prompt in prompts], samples)


# From open_clip's names to those of `CLIPModel`. Those of a layer, for both towers:
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# Others, with the parameter's own name.
_OTHERS = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    # The misspelling is transformers'.
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
# open_clip multiplies by them from the right, transformers uses linear layers.
_TRANSPOSED = ("text_projection", "visual.proj")


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an open_clip model under the names of transformers' `CLIPModel`.

    Names that are unknown are kept, so that loading raises an error that lists them.
    """
    renamed = {}
    for name, value in weights.items():
        tower, _, inner = name.rpartition("transformer.resblocks.")
        if name in _OTHERS:
            renamed[_OTHERS[name]] = value.T.contiguous() if name in _TRANSPOSED else value
        elif inner and tower in ("", "visual."):
            number, _, parameter = inner.partition(".")
            layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            renamed.update(_layer_weights(layer, parameter, value))
        else:
            renamed[name] = value
    return renamed


def _layer_weights(layer: str, parameter: str, value: Tensor) -> dict[str, Tensor]:
    module, _, kind = parameter.rpartition(".")
    if parameter in ("attn.in_proj_weight", "attn.in_proj_bias"):
        # Queries, keys and values are one matrix in open_clip.
        kind = parameter.removeprefix("attn.in_proj_")
        return {
            f"{layer}.self_attn.{part}_proj.{kind}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)
        }
    return {f"{layer}.{_LAYER.get(module, module)}.{kind}": value}

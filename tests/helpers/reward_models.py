"""Folders of the layouts in which reward models are published, with tiny random models of the real classes."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from helpers.tiny import clip_tokenizer


PROMPTS = ["a red circle", "a blue square", "a very large green triangle that is outlined and a small red one"]
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])
# Of a preprocessor_config.json as published for CLIP ViT-H and L, but for the size.
CLIP_PROCESSOR = {
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": CLIP_MEAN.tolist(),
    "image_processor_type": "CLIPImageProcessor",
    "image_std": CLIP_STD.tolist(),
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 28},
}


def images(*sizes: tuple[int, int], seed: int = 0) -> list[Image.Image]:
    """Noise of the given widths and heights."""
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def fill(parameters: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Random values of a size at which every weight matters, for tensors of the given shapes."""
    generator = torch.Generator().manual_seed(seed)
    filled = {}
    for name, value in sorted(parameters.items()):
        noise = torch.randn(value.shape, generator=generator)
        is_norm = value.ndim == 1 and name.endswith("weight")
        filled[name] = 1 + 0.1 * noise if is_norm else noise / max(math.prod(value.shape[1:]), 16) ** 0.5
    return filled


def clip_config(hidden_act: str = "gelu") -> CLIPConfig:
    tokenizer = clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_act=hidden_act,
    )
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)


def clip_model(config: CLIPConfig, seed: int = 7) -> CLIPModel:
    model = CLIPModel(config).eval()
    model.load_state_dict(fill(model.state_dict(), seed))
    return model


def clip_folder(folder: Path, seed: int = 7) -> Path:
    """Weights, configuration, tokenizer and image processor, as in `openai/clip-vit-large-patch14`."""
    clip_model(clip_config(), seed).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP_PROCESSOR))
    return folder


def bert_tokenizer() -> BertTokenizer:
    """One token per letter."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*special, *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})


def normalized(pixels: np.ndarray) -> np.ndarray:
    """`(height, width, 3)` of 0 to 255 as `(3, height, width)` float64, normalised."""
    return ((pixels.astype(np.float64) / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)

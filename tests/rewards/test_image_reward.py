"""ImageReward on a folder of the published layout, against BLIP's forward pass written out in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.reward_models import PROMPTS, bert_tokenizer, fill, images, normalized
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from trl_diffusion_pref.rewards import ImageReward


VISION, TEXT, TOKENS = 128, 48, 35
# The published file's entries; the sizes are small.
CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 59,
    "encoder_width": 768,
    "add_cross_attention": True,
}
SAMPLES = images((32, 32), (90, 30), (35, 32))


def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Of `ImageReward.pt`, by name."""
    image, text = "blip.visual_encoder", "blip.text_encoder"
    shapes: dict[str, tuple[int, ...]] = {
        f"{image}.cls_token": (1, 1, VISION),
        f"{image}.pos_embed": (1, 5, VISION),
        f"{image}.patch_embed.proj.weight": (VISION, 3, 16, 16),
        f"{image}.patch_embed.proj.bias": (VISION,),
        f"{text}.embeddings.word_embeddings.weight": (59, TEXT),
        f"{text}.embeddings.position_embeddings.weight": (64, TEXT),
        **norm(f"{image}.norm", VISION),
        **norm(f"{text}.embeddings.LayerNorm", TEXT),
        **linear("blip.vision_proj", 16, VISION),
        **linear("blip.text_proj", 16, TEXT),
    }
    for number in range(2):
        block = f"{image}.blocks.{number}"
        shapes |= norm(f"{block}.norm1", VISION) | norm(f"{block}.norm2", VISION)
        shapes |= linear(f"{block}.attn.qkv", 3 * VISION, VISION) | linear(f"{block}.attn.proj", VISION, VISION)
        shapes |= linear(f"{block}.mlp.fc1", 160, VISION) | linear(f"{block}.mlp.fc2", VISION, 160)
        layer = f"{text}.encoder.layer.{number}"
        for kind, source in (("attention", TEXT), ("crossattention", VISION)):
            shapes |= linear(f"{layer}.{kind}.self.query", TEXT, TEXT)
            shapes |= linear(f"{layer}.{kind}.self.key", TEXT, source)
            shapes |= linear(f"{layer}.{kind}.self.value", TEXT, source)
            shapes |= linear(f"{layer}.{kind}.output.dense", TEXT, TEXT) | norm(
                f"{layer}.{kind}.output.LayerNorm", TEXT
            )
        shapes |= linear(f"{layer}.intermediate.dense", 64, TEXT) | linear(f"{layer}.output.dense", TEXT, 64)
        shapes |= norm(f"{layer}.output.LayerNorm", TEXT)
    widths = (TEXT, 1024, 128, 64, 16, 1)
    for place, index in zip((0, 2, 4, 6, 7), range(5), strict=True):
        shapes |= linear(f"mlp.layers.{place}", widths[index + 1], widths[index])
    return shapes


class Published:
    """The authors' forward pass for one prompt without padding and one image."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = {name: value.double() for name, value in weights.items()}

    def linear(self, values: Tensor, name: str) -> Tensor:
        return values @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, values: Tensor, name: str, eps: float) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(values, values.shape[-1:], weight, bias, eps)

    @staticmethod
    def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        parts = [part.view(len(part), heads, -1).transpose(0, 1) for part in (query, key, value)]
        query, key, value = parts
        weights = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        return (weights @ value).transpose(0, 1).flatten(1)

    def image(self, pixels: Tensor) -> Tensor:
        name = "blip.visual_encoder"
        patches = F.conv2d(
            pixels[None],
            self.weights[f"{name}.patch_embed.proj.weight"],
            self.weights[f"{name}.patch_embed.proj.bias"],
            stride=16,
        )[0]
        values = torch.cat([self.weights[f"{name}.cls_token"][0], patches.flatten(1).T])
        values = values + self.weights[f"{name}.pos_embed"][0]
        for number in range(2):
            block = f"{name}.blocks.{number}"
            inner = self.linear(self.norm(values, f"{block}.norm1", 1e-6), f"{block}.attn.qkv")
            values = values + self.linear(self.attention(*inner.chunk(3, dim=-1), heads=2), f"{block}.attn.proj")
            inner = F.gelu(self.linear(self.norm(values, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
            values = values + self.linear(inner, f"{block}.mlp.fc2")
        return self.norm(values, f"{name}.norm", 1e-6)

    def attend(self, values: Tensor, source: Tensor, name: str) -> Tensor:
        parts = [
            self.linear(of, f"{name}.self.{part}")
            for part, of in (("query", values), ("key", source), ("value", source))
        ]
        output = self.linear(self.attention(*parts, heads=4), f"{name}.output.dense")
        return self.norm(output + values, f"{name}.output.LayerNorm", 1e-12)

    def score(self, ids: Tensor, pixels: Tensor) -> float:
        name = "blip.text_encoder"
        patches = self.image(pixels)
        values = self.weights[f"{name}.embeddings.word_embeddings.weight"][ids]
        values = values + self.weights[f"{name}.embeddings.position_embeddings.weight"][: len(ids)]
        values = self.norm(values, f"{name}.embeddings.LayerNorm", 1e-12)
        for number in range(2):
            layer = f"{name}.encoder.layer.{number}"
            values = self.attend(values, values, f"{layer}.attention")
            values = self.attend(values, patches, f"{layer}.crossattention")
            inner = self.linear(F.gelu(self.linear(values, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
            values = self.norm(inner + values, f"{layer}.output.LayerNorm", 1e-12)
        state = values[0]
        for place in (0, 2, 4, 6, 7):
            state = self.linear(state, f"mlp.layers.{place}")
        return (state.item() - 0.16717362830052426) / 1.0333394966054072


def pixels_of(image: Image.Image) -> Tensor:
    short = min(image.size)
    size = [32 if side == short else int(32 * side / short) for side in image.size]
    left, top = (round((side - 32) / 2) for side in size)
    image = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    return torch.tensor(normalized(np.asarray(image)))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("image_reward")
    weights = fill({name: torch.empty(shape) for name, shape in published_shapes().items()})
    positions = torch.arange(64).expand(1, -1)
    torch.save({**weights, "blip.text_encoder.embeddings.position_ids": positions}, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(CONFIG))
    bert_tokenizer().save_pretrained(folder / "bert")
    return folder, weights


def test_image_reward_equals_the_published_model(published):
    folder, weights = published
    reward = ImageReward(str(folder), str(folder / "bert"))
    prompts = [PROMPTS[0], "a", PROMPTS[2]]
    # The third prompt is cut to 35 tokens.
    rows = [bert_tokenizer()(prompt, truncation=True, max_length=TOKENS)["input_ids"] for prompt in prompts]
    assert [len(row) for row in rows][1:] == [3, TOKENS]
    model = Published(weights)
    expected = [model.score(torch.tensor(row), pixels_of(image)) for row, image in zip(rows, SAMPLES, strict=True)]
    assert max(expected) - min(expected) > 0.1
    assert reward(prompts, SAMPLES) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    # In float64 the small constants of layer norms count too.
    precise = ImageReward(str(folder), str(folder / "bert"), batch_size=1, dtype=torch.float64)
    assert precise(prompts, SAMPLES) == pytest.approx(expected, abs=1e-7)


def test_image_reward_with_another_shape_of_weights_is_refused(published, tmp_path):
    folder, weights = published
    torch.save({**weights, "mlp.layers.7.weight": torch.zeros(2, 16)}, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=r"(?s)ImageReward.pt does not hold .*mlp.layers.7.weight"):
        ImageReward(str(tmp_path), str(folder / "bert"))(["a"], SAMPLES[:1])

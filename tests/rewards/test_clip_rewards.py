"""The rewards on CLIP, on folders of the published layouts, against their formulas in float64."""

import numpy as np
import pytest
import torch
from helpers.reward_models import PROMPTS, clip_config, clip_folder, clip_model, fill, images, normalized
from helpers.tiny import clip_tokenizer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from trl_diffusion_pref.rewards import HPS, Aesthetic, CLIPScore, PickScore
from trl_diffusion_pref.rewards.mlp_head import LinearHead


SAMPLES = images((28, 28), (60, 20), (3, 5))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(clip_folder(tmp_path_factory.mktemp("clip")))


def cosine(prompt: str, image: Image.Image) -> tuple[float, float]:
    """exp(logit_scale) times cosine, and the cosine, of one prompt without padding and one image, in float64."""
    model = clip_model(clip_config()).double()
    ids = clip_tokenizer()(prompt, truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    short = min(image.size)
    size = [28 if side == short else int(28 * side / short) for side in image.size]
    left, top = (size[0] - 28) // 2, (size[1] - 28) // 2
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 28, top + 28)))
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=torch.tensor(normalized(pixels))[None])
    similarity = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
    return output.logits_per_image.item(), similarity.item()


def test_pickscore_is_the_scaled_cosine(clip):
    expected = [cosine(prompt, image)[0] for prompt, image in zip(PROMPTS, SAMPLES, strict=True)]
    assert PickScore(clip, clip)(PROMPTS, SAMPLES) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("scale", "factor"), [("cosine", None), ("paper", 2.5), ("torchmetrics", 100.0)])
def test_clip_score_is_the_cosine_or_its_published_multiple(clip, scale, factor):
    cosines = [cosine(prompt, image)[1] for prompt, image in zip(PROMPTS, SAMPLES, strict=True)]
    assert min(cosines) < 0 < max(cosines)
    expected = cosines if factor is None else [factor * max(value, 0) for value in cosines]
    assert CLIPScore(clip, scale=scale)(PROMPTS, SAMPLES) == pytest.approx(expected, abs=1e-5 * (factor or 1))


def test_scores_do_not_depend_on_the_batch(clip):
    one, two, all_at_once = (PickScore(clip, clip, batch_size=size)(PROMPTS, SAMPLES) for size in (1, 2, 3))
    assert one == pytest.approx(two, abs=1e-5) and one == pytest.approx(all_at_once, abs=1e-5)


def test_half_precision_is_close_and_has_no_coarse_steps(clip):
    exact, half = (PickScore(clip, clip, dtype=dtype)(PROMPTS, SAMPLES) for dtype in (torch.float32, torch.bfloat16))
    assert half == pytest.approx(exact, abs=0.05)
    assert all(torch.tensor(value).bfloat16().item() != value for value in half)


@pytest.mark.parametrize("file", ["head.pth", "head.safetensors"])
def test_aesthetic_is_linear_layers_on_the_unit_embedding(clip, tmp_path, file):
    weights = fill(LinearHead(24).state_dict())
    assert [name for name in weights if "weight" in name] == [f"layers.{place}.weight" for place in (0, 2, 4, 6, 7)]
    (torch.save if file.endswith(".pth") else save_file)(weights, tmp_path / file)
    scores = Aesthetic(clip, str(tmp_path), file)(PROMPTS, SAMPLES)

    model = clip_model(clip_config()).double()
    for image, found in zip(SAMPLES, scores, strict=True):
        short = min(image.size)
        size = [28 if side == short else int(28 * side / short) for side in image.size]
        left, top = (round((side - 28) / 2) for side in size)
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 28, top + 28)))
        with torch.no_grad():
            pooled = model.vision_model(torch.tensor(normalized(pixels))[None]).pooler_output
            vector = F.normalize(model.visual_projection(pooled))
        for place in (0, 2, 4, 6, 7):
            weight, bias = (weights[f"layers.{place}.{kind}"].double() for kind in ("weight", "bias"))
            vector = vector @ weight.T + bias
        assert found == pytest.approx(vector.item(), rel=1e-5, abs=1e-5)


def open_clip_names(width: int = 32, projection: int = 24, vocabulary: int = 0) -> dict[str, Tensor]:
    """Shapes by name, as in the checkpoints of open_clip."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (16, width),
        "text_projection": (width, projection),
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (5, width),
        "visual.proj": (width, projection),
        "visual.conv1.weight": (width, 3, 14, 14),
        "token_embedding.weight": (vocabulary, width),
    }
    for norm in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for tower in ("", "visual."):
        for number in range(2):
            block = f"{tower}transformer.resblocks.{number}"
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
            for layer, sizes in {
                "attn.in_proj_": (3 * width, width),
                "attn.out_proj.": (width, width),
                "mlp.c_fc.": (48, width),
                "mlp.c_proj.": (width, 48),
            }.items():
                shapes |= {f"{block}.{layer}weight": sizes, f"{block}.{layer}bias": sizes[:1]}
    return {name: torch.empty(shape) for name, shape in shapes.items()}


class OpenCLIP:
    """open_clip's forward pass, written out in float64."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = {name: value.double() for name, value in weights.items()}

    def norm(self, values: Tensor, name: str) -> Tensor:
        return F.layer_norm(values, values.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def tower(self, values: Tensor, prefix: str, causal: bool) -> Tensor:
        length = values.shape[0]
        mask = torch.full((length, length), -torch.inf).double().triu(1) if causal else 0.0
        for number in range(2):
            name = f"{prefix}transformer.resblocks.{number}"
            get = {key.removeprefix(f"{name}."): value for key, value in self.weights.items() if name in key}
            inner = self.norm(values, f"{name}.ln_1") @ get["attn.in_proj_weight"].T + get["attn.in_proj_bias"]
            query, key, value = (part.view(length, 2, 16).transpose(0, 1) for part in inner.chunk(3, dim=-1))
            attention = (query @ key.transpose(1, 2) / 4 + mask).softmax(dim=-1) @ value
            attention = attention.transpose(0, 1).reshape(length, 32)
            values = values + attention @ get["attn.out_proj.weight"].T + get["attn.out_proj.bias"]
            inner = self.norm(values, f"{name}.ln_2") @ get["mlp.c_fc.weight"].T + get["mlp.c_fc.bias"]
            values = values + F.gelu(inner) @ get["mlp.c_proj.weight"].T + get["mlp.c_proj.bias"]
        return values

    def image(self, pixels: Tensor) -> Tensor:
        patches = F.conv2d(pixels[None], self.weights["visual.conv1.weight"], stride=14)[0].flatten(1).T
        tokens = torch.cat([self.weights["visual.class_embedding"][None], patches])
        tokens = self.norm(tokens + self.weights["visual.positional_embedding"], "visual.ln_pre")
        state = self.norm(self.tower(tokens, "visual.", causal=False)[0], "visual.ln_post")
        return F.normalize(state @ self.weights["visual.proj"], dim=0)

    def text(self, ids: Tensor) -> Tensor:
        tokens = self.weights["token_embedding.weight"][ids] + self.weights["positional_embedding"][: len(ids)]
        # The published tokenizer's end of text has the largest id, by which open_clip finds it; here it is the last.
        state = self.norm(self.tower(tokens, "", causal=True), "ln_final")[-1]
        return F.normalize(state @ self.weights["text_projection"], dim=0)


def test_hps_is_the_cosine_of_the_open_clip_checkpoint(tmp_path):
    tokenizer = clip_tokenizer()
    weights = fill(open_clip_names(vocabulary=len(tokenizer)))
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
    base = tmp_path / "base"
    clip_config().save_pretrained(base)
    tokenizer.save_pretrained(base)
    prompts = [PROMPTS[0], "red &amp; blue", PROMPTS[2]]
    found = HPS(str(tmp_path), base=str(base))(prompts, SAMPLES)

    model = OpenCLIP(weights)
    for prompt, image, score in zip(prompts, SAMPLES, found, strict=True):
        scale = 28 / max(image.size)
        width, height = (round(side * scale) for side in image.size)
        channels = [Image.fromarray(np.asarray(image)[..., channel].astype(np.float32)) for channel in range(3)]
        pixels = np.zeros((28, 28, 3))
        top, left = (28 - height) // 2, (28 - width) // 2
        for channel, plane in enumerate(channels):
            plane = plane.resize((width, height), Image.Resampling.BICUBIC)
            pixels[top : top + height, left : left + width, channel] = np.asarray(plane)
        text = prompt.replace("&amp;", "&")
        ids = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")["input_ids"][0]
        expected = model.image(torch.tensor(normalized(pixels))) @ model.text(ids)
        assert score == pytest.approx(expected.item(), abs=1e-5)


def test_checkpoints_of_another_model_are_refused(tmp_path, clip):
    weights = fill(open_clip_names(vocabulary=len(clip_tokenizer())))
    weights["visual.attn_pool.query"] = weights.pop("visual.proj")
    torch.save({"state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=r"(?s)HPS_v2.1_compressed.pt does not hold .*visual_projection.*attn_pool"):
        HPS(str(tmp_path), base=clip)(PROMPTS, SAMPLES)


class Payload:
    def __reduce__(self):
        return (print, ("code of the file was run",))


def test_files_with_code_are_not_run(clip, tmp_path, capsys):
    torch.save({"layers.0.weight": Payload()}, tmp_path / "aesthetic-model.pth")
    with pytest.raises(Exception, match="(?i)weights.only|unsupported"):
        Aesthetic(clip, str(tmp_path))(PROMPTS, SAMPLES)
    assert "was run" not in capsys.readouterr().out

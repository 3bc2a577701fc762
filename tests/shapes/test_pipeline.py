import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from trl_diffusion_pref.shapes import (
    COLOURS,
    STYLES,
    draw,
    judge,
    load_pipeline,
    pipeline_folder,
    prompts,
    random_scene,
    sample,
    sample_base,
    summarize,
)
from trl_diffusion_pref.shapes.judge import CLEAN_DISTANCE
from trl_diffusion_pref.shapes.train import build_pipeline, random_drawings, train_tokenizer


ASKED = (4 * prompts())[:64]


@pytest.fixture(scope="module")
def drawings() -> dict[str, list[Image.Image]]:
    return {base: sample_base(base, ASKED) for base in ("mixed", "filled_only")}


def test_the_weights_are_float16_safetensors_of_at_most_ten_megabytes():
    files = [path for path in pipeline_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3
    assert {tensor.dtype for path in weights for tensor in load_file(path).values() if tensor.is_floating_point()} == {
        torch.float16
    }
    assert not [path for path in files if path.suffix not in (".safetensors", ".json")]


def test_it_is_made_of_the_real_classes():
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder())
    assert type(pipeline.unet) is UNet2DConditionModel
    assert type(pipeline.vae) is AutoencoderKL
    assert type(pipeline.text_encoder) is CLIPTextModel
    assert isinstance(pipeline.tokenizer, CLIPTokenizer)
    assert type(pipeline.scheduler) is DDPMScheduler


def test_loaded_without_any_option_it_draws(drawings):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder())
    for ours, theirs in zip(sample(pipeline, ASKED[:2]), drawings["mixed"], strict=False):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_the_mixed_base_draws_what_is_asked_and_outlines_in_a_minority(drawings):
    summary = summarize(drawings["mixed"], ASKED)
    assert 0.02 <= summary.preferred <= 0.5
    assert summary.colour >= 0.95 and summary.shape >= 0.95
    assert summary.clean >= 0.7


def test_the_filled_only_base_never_draws_outlines(drawings):
    summary = summarize(drawings["filled_only"], ASKED)
    assert summary.preferred == 0.0
    assert summary.colour >= 0.95 and summary.shape >= 0.95


def test_the_vae_s_reconstructions_are_clean():
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng, STYLES[i % 2]) for i in range(64)]
    pixels = torch.stack([torch.from_numpy(np.array(draw(scene))).permute(2, 0, 1) for scene in scenes]) / 127.5 - 1
    vae = load_pipeline().vae
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    images = [Image.fromarray(((row.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()) for row in decoded]
    verdicts = judge(images)
    assert [(v.shape, v.colour, v.style) for v in verdicts] == [(s.shape, s.colour, s.style) for s in scenes]
    assert max(verdict.distance for verdict in verdicts) < CLEAN_DISTANCE / 2


def test_samples_depend_on_the_seed_and_not_on_the_batch(drawings):
    pipeline = load_pipeline()
    few = sample(pipeline, ASKED[:3], batch_size=2)
    for ours, theirs in zip(few, drawings["mixed"], strict=False):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1
    assert sample(pipeline, ASKED[:1], seed=1)[0].tobytes() != few[0].tobytes()
    assert type(pipeline.scheduler) is DDPMScheduler


def test_a_base_s_pictures_are_drawn_once_and_are_each_caller_s_own(monkeypatch):
    few = {"steps": 2, "seed": 5, "guidance_scale": 2.0}
    expected = [image.tobytes() for image in sample(load_pipeline(), ASKED[:2], **few)]
    first = sample_base("mixed", ASKED[:2], **few)
    assert [image.tobytes() for image in first] == expected
    first[0].putpixel((0, 0), (1, 2, 3))
    monkeypatch.setattr("trl_diffusion_pref.shapes.pipeline.sample", lambda *arguments, **options: pytest.fail("drew"))
    assert [image.tobytes() for image in sample_base("mixed", ASKED[:2], **few)] == expected


def test_words_are_single_tokens_and_other_text_is_still_tokens():
    tokenizer = load_pipeline().tokenizer
    for colour in COLOURS:
        assert len(tokenizer(colour).input_ids) == 3
    assert len(tokenizer("zebra").input_ids) > 3
    assert tokenizer.unk_token_id not in tokenizer("zebra 7!").input_ids[1:-1]


def test_an_unknown_base_is_refused():
    with pytest.raises(ValueError, match="mixed, filled_only, flow"):
        load_pipeline("other")


def test_the_training_script_builds_the_shipped_architecture():
    built, shipped = build_pipeline(), load_pipeline()
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(built, name).state_dict(), getattr(shipped, name).state_dict()
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}, name
    assert built.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()


def test_a_newly_trained_tokenizer_makes_single_tokens_of_the_captions_words():
    tokenizer = train_tokenizer()
    for prompt in prompts():
        assert len(tokenizer(prompt).input_ids) == 3 + 2
    assert len(tokenizer) == len(load_pipeline().tokenizer)


def test_training_pictures_have_the_asked_share_of_outlines():
    pixels, captions = random_drawings(400, 0.15, np.random.default_rng(0))
    images = [Image.fromarray(((row.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()) for row in pixels]
    summary = summarize(images, captions)
    # standard error 0.018
    assert summary.preferred == pytest.approx(0.15, abs=0.055)
    assert summary.colour == summary.shape == 1.0


def test_clip_weights_have_the_names_that_every_transformers_5_reads():
    with safe_open(pipeline_folder() / "text_encoder" / "model.safetensors", framework="pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())

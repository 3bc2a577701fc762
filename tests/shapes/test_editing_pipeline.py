import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionInstructPix2PixPipeline
from helpers.examples import run_example
from safetensors.torch import load_file

from trl_diffusion_pref.shapes import (
    edit_prompts,
    load_pipeline,
    pipeline_folder,
    sample,
    sample_base,
    summarize_edits,
)
from trl_diffusion_pref.shapes.train_editing import build_editing_unet, train_editing_unet


FOLDER = pipeline_folder().parent / "editing_unet"
ASKED = edit_prompts(48, seed=11)
INSTRUCTIONS, SOURCES = list(ASKED["prompt"]), list(ASKED["image"])


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionInstructPix2PixPipeline:
    return load_pipeline("editing")


def test_the_editing_unet_is_float16_of_at_most_seven_megabytes():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert sum(path.stat().st_size for path in files) <= 7e6
    assert {tensor.dtype for tensor in load_file(FOLDER / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }


def test_the_saved_editing_pipeline_is_an_ordinary_one(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is StableDiffusionInstructPix2PixPipeline
    ours, theirs = (sample(one, INSTRUCTIONS[:2], images=SOURCES[:2], steps=2) for one in (pipeline, loaded))
    assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]


def test_vae_and_text_encoder_of_the_editing_pipeline_are_the_base_s(pipeline):
    base = load_pipeline()
    for name in ("vae", "text_encoder"):
        ours, theirs = getattr(pipeline, name).state_dict(), getattr(base, name).state_dict()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_the_editing_base_makes_edits_and_redraws_many_elsewhere():
    edited = sample_base("editing", INSTRUCTIONS, images=SOURCES)
    summary = summarize_edits(edited, INSTRUCTIONS, SOURCES)
    assert summary.made >= 0.75
    assert 0.25 <= summary.made_in_place <= 0.65


def test_an_edit_depends_on_the_image_to_edit(pipeline):
    one, other = (sample(pipeline, ["make it blue"], images=[source], steps=4) for source in SOURCES[:2])
    assert one[0].tobytes() != other[0].tobytes()


def test_the_editing_base_needs_images(pipeline):
    with pytest.raises(ValueError, match="edits images, and got none"):
        sample(pipeline, INSTRUCTIONS[:1])


def test_before_training_the_editing_unet_predicts_what_the_base_predicts(pipeline):
    base = load_pipeline().unet
    unet = build_editing_unet(base)
    assert {name: tensor.shape for name, tensor in unet.state_dict().items()} == {
        name: tensor.shape for name, tensor in pipeline.unet.state_dict().items()
    }
    x_t, image = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt_embeds = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = unet(torch.cat([x_t, image], dim=1), 500, prompt_embeds).sample
        assert torch.allclose(ours, base(x_t, 500, prompt_embeds).sample, atol=1e-5)


def test_training_the_editing_unet_depends_on_its_seed_alone():
    base = load_pipeline()
    first, again, other = (
        train_editing_unet(base, 4, seed=seed, batch_size=2, count=4).conv_in.weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first[:, 4:].abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mapo", "dpo"])
def test_pairs_of_its_own_edits_teach_a_model_to_edit_in_place(method, tmp_path):
    found = run_example("edits_shapes", "--method", method, "--output_dir", str(tmp_path))
    assert found["after"].made_in_place >= found["before"].made_in_place + 0.2

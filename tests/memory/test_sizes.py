"""The shapes told from configs against those that encoding gives."""

import sys
from pathlib import Path

import pytest

from trl_diffusion_pref import MaPOConfig
from trl_diffusion_pref.data import latent_shape, uncropped_conditioning
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.memory.model import on_meta, vae_factor


sys.path.insert(0, str(Path(__file__).parents[1] / "families"))

import tiny  # noqa: E402


# Of each family, and with other text encoders, embeddings or layouts.
every_image_family = pytest.mark.parametrize(
    "name",
    [
        "stable_diffusion",
        "stable_diffusion_xl",
        "stable_diffusion_3",
        "stable_diffusion_3_without_t5",
        "flux_dev",
        "flux_schnell",
        "pixart_sigma",
        "sana",
        "qwen_image",
    ],
)


def config(folder: Path, resolution: int | None) -> MaPOConfig:
    return MaPOConfig(output_dir=str(folder), use_cpu=True, resolution=resolution)


@pytest.mark.parametrize("resolution", [None, 48, (32, 48)])
@every_image_family
def test_latents_have_the_shape_of_encoded_images(name, resolution, tmp_path):
    pipeline = tiny.build(name)
    _, _, sizes = on_meta(pipeline, config(tmp_path, resolution))
    assert sizes.latents == latent_shape(pipeline, family_for(pipeline), resolution)


@every_image_family
def test_conditioning_has_the_names_and_shapes_of_encoded_prompts(name, tmp_path):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    _, _, sizes = on_meta(pipeline, config(tmp_path, 16))
    encoded = {key: tuple(tensor.shape[1:]) for key, tensor in family.encode_prompts(pipeline, ["a"]).items()}
    of_image = {key: tuple(tensor.shape) for key, tensor in uncropped_conditioning(pipeline, family, 16).items()}
    assert sizes.conditioning == encoded | of_image


@every_image_family
def test_a_folder_s_configs_give_the_same_shapes(name, tmp_path):
    pipeline = tiny.build(name)
    folder = tmp_path / "pipeline"
    pipeline.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    cfg = config(tmp_path, 48)
    family, denoiser, sizes = on_meta(str(folder), cfg)
    expected_family, expected_denoiser, expected_sizes = on_meta(pipeline, cfg)
    assert (family, sizes) == (expected_family, expected_sizes)
    shapes, expected_shapes = (
        {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in part.state_dict().items()}
        for part in (denoiser, expected_denoiser)
    )
    assert shapes == expected_shapes


@pytest.mark.parametrize(
    ("name", "factor"),
    [("stable_diffusion_xl", 8), ("stable_diffusion_3", 8), ("flux_dev", 8), ("pixart_sigma", 8)]
    + [("qwen_image", 8), ("sana", 32)],
)
def test_a_denoiser_alone_is_taken_to_have_the_published_autoencoder(name, factor, tmp_path):
    pipeline = tiny.build(name)
    denoiser = family_for(pipeline).denoiser(pipeline)
    family, _, sizes = on_meta(denoiser, config(tmp_path, 4 * factor))
    _, _, of_pipeline = on_meta(pipeline, config(tmp_path, 4 * pipeline.vae_scale_factor))
    assert family is family_for(pipeline)
    assert sizes.latents == of_pipeline.latents and sizes.latents[1:] == (4, 4)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        # As published with SDXL, Sana 1600M at 1024 pixels, and Qwen-Image.
        ({"block_out_channels": [128, 256, 512, 512]}, 8),
        ({"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]}, 32),
        ({"temperal_downsample": [False, True, True]}, 8),
    ],
)
def test_pixels_per_latent_follow_from_the_published_autoencoders_configs(config, factor):
    assert vae_factor(config) == factor

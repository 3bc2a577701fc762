"""Kolors: sizes, its own UNet, a VAE by its scale alone, and what is said where sentencepiece is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from datasets import Dataset
from diffusers.utils import dummy_torch_and_transformers_and_sentencepiece_objects
from diffusers.utils.import_utils import BACKENDS_MAPPING
from helpers import tiny
from helpers.pipelines import image_pairs, png
from PIL import Image

from trl_diffusion_pref.evaluation.loading import loaded_pipeline
from trl_diffusion_pref.evaluation.sampling import sample
from trl_diffusion_pref.families import family_for, family_named, family_of_denoiser
from trl_diffusion_pref.families.weightless import pipeline_around
from trl_diffusion_pref.inspection import inspect_dataset


pytest.importorskip("sentencepiece")


@pytest.fixture
def pipeline():
    return tiny.build("kolors")


@pytest.fixture
def rows() -> Dataset:
    image = png(Image.effect_noise((16, 16), 80).convert("RGB"))
    return image_pairs([("a red circle", image, image), ("a " * 300, image, image)])


def test_published_sizes_are_assumed_of_its_unet_alone(pipeline):
    family = family_for(pipeline)
    shapes = family.input_shapes(pipeline_around(family, pipeline.unet), (3, 1024, 768))
    assert shapes.latents == (4, 128, 96)
    assert shapes.conditioning == {"prompt_embeds": (256, 16), "pooled_prompt_embeds": (16,), "time_ids": (6,)}


@pytest.mark.parametrize("name", ["kolors", "stable_diffusion_xl"])
def test_a_unet_with_an_image_adapter_is_told_from_the_other(name):
    pipeline = tiny.build(name)
    # As diffusers' `load_ip_adapter` leaves the config.
    pipeline.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    assert family_of_denoiser(pipeline.unet) is family_for(pipeline)


def test_prompts_of_another_length_than_256_tokens_are_cut_or_padded(pipeline):
    family = family_for(pipeline)
    short, full, long = (family.encode_prompts(pipeline, ["a" * count])["prompt_embeds"][0] for count in (1, 253, 900))
    assert short.shape == full.shape == long.shape == (256, 16)
    # Two tokens that begin every prompt, and one of a space.
    assert len(pipeline.tokenizer("a" * 253)["input_ids"]) == 256
    torch.testing.assert_close(full, long)
    assert family.token_limits(pipeline) == {"tokenizer": 256}


def test_the_vae_s_statistics_of_channels_are_not_used(pipeline):
    """Its sampler decodes by the scale alone, where SDXL's uses them."""
    family, pixels = family_for(pipeline), tiny.CASES["kolors"].pixels()
    pipeline.vae.register_to_config(latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    mean, _ = family.encode_samples(pipeline, pixels)
    torch.testing.assert_close(mean, expected)


def test_sampling_alike_in_all_batches_leaves_the_text_encoder_as_it_was(pipeline):
    options = {"height": 16, "width": 16, "num_inference_steps": 1, "show_progress": False}
    sample(pipeline, ["a", "a blue ring"], [0, 1], **options)
    assert "forward" not in vars(pipeline.text_encoder)


def test_a_data_set_is_inspected_with_its_tokenizer(pipeline, rows, tmp_path):
    pipeline.save_pretrained(tmp_path)
    by_name, loaded = (inspect_dataset(rows, model=model) for model in (tmp_path, pipeline))
    assert by_name.prompts == loaded.prompts


WITHOUT_SENTENCEPIECE = """
import sys

sys.modules["sentencepiece"] = None

from helpers import tiny
from trl_diffusion_pref import MaPOConfig, MaPOTrainer
from trl_diffusion_pref.families import supported_pipelines
from trl_diffusion_pref.shapes import preference_pairs

assert "KolorsPipeline" in supported_pipelines() and "kolors" not in tiny.CASES
try:
    MaPOTrainer(sys.argv[1], MaPOConfig(output_dir=sys.argv[2]), preference_pairs(2))
except ImportError as error:
    print(error)
"""


def test_a_stand_in_for_its_class_asks_for_the_package_that_is_missing(pipeline, tmp_path, monkeypatch):
    absent = dummy_torch_and_transformers_and_sentencepiece_objects.KolorsPipeline
    monkeypatch.setattr(diffusers, "KolorsPipeline", absent)
    monkeypatch.setitem(BACKENDS_MAPPING, "sentencepiece", (lambda: False, "{0} asks for sentencepiece"))
    pipeline.save_pretrained(tmp_path)
    for load in (lambda: family_named("KolorsPipeline"), lambda: loaded_pipeline(tmp_path)):
        with pytest.raises(ImportError, match="KolorsPipeline asks for sentencepiece"):
            load()
    # And is no reason to refuse what is like it.
    with pytest.raises(
        TypeError, match="KolorsImg2ImgPipeline is not supported.*The nearest of them is KolorsPipeline"
    ):
        family_named("KolorsImg2ImgPipeline")


@pytest.mark.slow
def test_where_sentencepiece_is_not_installed_training_asks_for_it(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SENTENCEPIECE, str(tmp_path / "pipeline"), str(tmp_path / "output")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "KolorsPipeline requires the sentencepiece library" in done.stdout
    assert "pip install sentencepiece" in done.stdout

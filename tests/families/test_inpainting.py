"""What the families of inpainting pipelines say of image and mask, against the pipelines' own samplers."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import tiny
from helpers.encoding import encode_rows
from helpers.recorder import PROMPTS, Recorder, noisy_latents
from helpers.tiny_inpainting import DRAWN_LATENTS, masks, xl_inpaint_around
from helpers.tiny_instruct_pix2pix import images
from torch import Tensor

from trl_diffusion_pref.data import PAIRS, EncodingOptions
from trl_diffusion_pref.data.decode.image import prepare_image
from trl_diffusion_pref.families import family_for, family_named
from trl_diffusion_pref.guidance import add_negative_guidance
from trl_diffusion_pref.shapes import preference_pairs


LAYOUT = PAIRS.conditioned_on(family_named("StableDiffusionInpaintPipeline"))
NAMES = [name for name, case in tiny.CASES.items() if case.masked]


def data(sources: list, marks: list) -> Dataset:
    pairs = preference_pairs(len(sources), seed=7)
    return pairs.map(lambda row, number: {"image": sources[number], "mask_image": marks[number]}, with_indices=True)


def prepared(size: tuple[int, int], sources: list, marks: list) -> dict[str, Tensor]:
    """Images and masks as `encode_conditions` takes them."""
    found = {"image": sources, "mask_image": [mark.convert("RGB") for mark in marks]}
    return {
        key: torch.stack([prepare_image(item, size, (0.5, 0.5), False) for item in column])
        for key, column in found.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_beside_the_latents_is_the_stored_one_from_grey_128_on(name, tmp_path):
    pipeline, marks = tiny.build(name), masks((16, 16), 2)
    rows = encode_rows(
        data(images((16, 16), 2), marks),
        pipeline,
        family_for(pipeline),
        EncodingOptions(16),
        layout=LAYOUT,
        cache_folder=tmp_path,
    )
    for row, mark in zip(rows, marks, strict=True):
        white = np.asarray(mark) >= 128
        # Two pixels a latent: Fill's transformer gets all four, the UNets get the first.
        found = {(top, left): white[top::2, left::2] for top in (0, 1) for left in (0, 1)}
        expected = np.stack(list(found.values()) if name == "flux_fill" else [found[0, 0]])
        assert np.array_equal(row["condition/mask_image"].numpy(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_masked_does_not_reach_the_denoiser(name):
    pipeline = tiny.build(name)
    family, marks = family_for(pipeline), masks((16, 16), 1)
    one, other = (prepared((16, 16), [source], marks) for source in images((16, 16), 2))
    white = torch.from_numpy(np.asarray(marks[0]) >= 128)
    other["image"] = torch.where(white, other["image"], one["image"])
    assert not torch.equal(one["image"], other["image"])
    torch.testing.assert_close(
        family.encode_conditions(pipeline, one, (3, 16, 16)), family.encode_conditions(pipeline, other, (3, 16, 16))
    )


def test_image_and_mask_are_cropped_and_mirrored_alike(tmp_path, monkeypatch):
    pipeline, marks = tiny.build("stable_diffusion_inpaint"), masks((24, 40), 8)
    family, seen = family_for(pipeline), []
    encode = family.encode_conditions

    def recorded(pipeline, images, shape):
        seen.append(images)
        return encode(pipeline, images, shape)

    monkeypatch.setattr(type(family), "encode_conditions", lambda self, *args: recorded(*args))
    options = EncodingOptions(16, crop="random", random_flip=True)
    same = data([mark.convert("RGB") for mark in marks], marks)
    encode_rows(same, pipeline, family, options, layout=LAYOUT, cache_folder=tmp_path)
    assert sum(len(of["image"]) for of in seen) == 8
    for of in seen:
        assert torch.equal(of["image"], of["mask_image"])


@pytest.mark.parametrize("name", ["stable_diffusion_inpaint", "stable_diffusion_xl_inpaint", "flux_fill"])
def test_the_sampler_s_draws_lie_around_the_latents_that_training_reads(name, monkeypatch):
    pipeline, case = tiny.build(name), tiny.CASES[name]
    family = family_for(pipeline)
    monkeypatch.setattr(f"{type(pipeline).__module__}.retrieve_latents", DRAWN_LATENTS)
    recorder = Recorder(family.denoiser(pipeline))
    options = {"num_inference_steps": 1, "output_type": "latent", **case.arguments(1)}
    pipeline(prompt=PROMPTS[:1], **options, generator=torch.Generator().manual_seed(0))
    beside = noisy_latents(recorder.calls[0])
    drawn = case.unpack(pipeline, beside[..., 16:]) if name == "flux_fill" else beside[:, 5:]
    of_images = prepared(case.size, case.images(1), case.images(1, "mask_image"))
    read = family.encode_conditions(pipeline, of_images, (3, *case.size))["image"]
    _, std = family.encode_samples(pipeline, of_images["image"] * (of_images["mask_image"] < 0.5))
    draws = (drawn - read) / std
    assert draws.abs().max() < 5 and 0.7 < draws.std() < 1.3


def test_a_vae_s_statistics_of_channels_are_not_applied_to_the_masked_image():
    """As in the pipeline, which applies them to samples alone."""
    statistics = {"latents_mean": (0.1, -0.2, 0.3, -0.4), "latents_std": (1.5, 0.5, 2.0, 1.0)}
    pipeline = xl_inpaint_around(tiny.build_stable_diffusion_xl(**statistics))
    case, recorder = tiny.CASES["stable_diffusion_xl_inpaint"], Recorder(pipeline.unet)
    pipeline(prompt=PROMPTS[:1], num_inference_steps=1, output_type="latent", **case.arguments(1))
    of_images = prepared(case.size, case.images(1), case.images(1, "mask_image"))
    ours = family_for(pipeline).encode_conditions(pipeline, of_images, (3, *case.size))
    torch.testing.assert_close(ours["image"], recorder.calls[0]["sample"][:, 5:])


def test_a_checkpoint_that_generates_from_text_is_refused_with_the_reason():
    fills, generates = tiny.build("stable_diffusion_inpaint"), tiny.build("stable_diffusion")
    fills.unet, generates.unet = generates.unet, fills.unet
    with pytest.raises(ValueError, match="takes 4 channels, those of the noisy latents alone.*takes 9 channels"):
        family_for(fills).check_complete(fills)
    with pytest.raises(ValueError, match="takes 9 channels, but noisy latents of .* have 4"):
        family_for(generates).check_complete(generates)


def test_sdxl_with_scores_of_aesthetics_is_refused():
    pipeline = tiny.build("stable_diffusion_xl_inpaint")
    pipeline.register_to_config(requires_aesthetics_score=True)
    with pytest.raises(ValueError, match="requires_aesthetics_score=True"):
        family_for(pipeline).check_complete(pipeline)


def test_fill_has_no_second_side_for_a_negative_model():
    pipeline = tiny.build("flux_fill")
    with pytest.raises(ValueError, match="This FluxFillPipeline has no classifier-free guidance"):
        add_negative_guidance(pipeline, pipeline.transformer)


def test_one_picture_as_image_and_samples_has_no_mask_in_its_latents(tmp_path):
    """Of a mask without white pixels the masked image is the image itself, so latents can be compared."""
    pipeline = tiny.build("stable_diffusion_inpaint")
    family, source = family_for(pipeline), images((16, 16), 1)
    black = [mark.point(lambda grey: 0) for mark in masks((16, 16), 1)]
    of_images = prepared((16, 16), source, black)
    encoded = family.encode_conditions(pipeline, of_images, (3, 16, 16))
    torch.testing.assert_close(encoded["image"], family.encode_samples(pipeline, of_images["image"])[0])
    assert family.mask_problem(pipeline, of_images["mask_image"][0]).startswith("the mask marks nothing")

"""What InstructPix2Pix's family says of the image beside the prompt, against the pipeline's own sampler."""

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import tiny
from helpers.encoding import encode_rows
from helpers.recorder import PROMPTS, Recorder
from helpers.tiny_instruct_pix2pix import images
from PIL import Image as PILImage
from PIL import ImageOps

from trl_diffusion_pref.data import PAIRS, EncodingOptions
from trl_diffusion_pref.families import family_for, family_named
from trl_diffusion_pref.shapes import preference_pairs


LAYOUT = PAIRS.conditioned_on(family_named("StableDiffusionInstructPix2PixPipeline"))


def with_images(pairs: Dataset, sources: list) -> Dataset:
    return pairs.map(lambda row, number: {"image": sources[number]}, with_indices=True)


def own_latents(pipeline, image: PILImage.Image) -> torch.Tensor:
    """As the pipeline's call computes them."""
    with torch.no_grad():
        return pipeline.vae.encode(pipeline.image_processor.preprocess(image)).latent_dist.mode()


def test_the_sampler_s_three_sides_are_the_family_s():
    pipeline = tiny.build("instruct_pix2pix")
    family = family_for(pipeline)
    recorder, sources = Recorder(pipeline.unet), images((16, 24), 1)
    options = {"num_inference_steps": 1, "output_type": "latent", "guidance_scale": 3.0}
    pipeline(PROMPTS[:1], image=sources, **options, generator=torch.Generator().manual_seed(0))
    (theirs,) = recorder.calls
    latents, image = theirs["sample"][:1, :4], own_latents(pipeline, sources[0])
    prompt, empty = family.encode_prompts(pipeline, PROMPTS[:1]), family.encode_unconditional(pipeline)
    sides = [prompt | {"image": image}, empty | {"image": image}, empty | {"image": torch.zeros_like(image)}]
    for number, side in enumerate(sides):
        with torch.no_grad():
            family.predict(pipeline.unet, latents, theirs["timestep"][None], side)
        ours = recorder.calls[-1]
        torch.testing.assert_close(ours["sample"][0], theirs["sample"][number])
        torch.testing.assert_close(ours["encoder_hidden_states"][0], theirs["encoder_hidden_states"][number])


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (80, 32), (8, 24)], ids=str)
def test_an_image_of_any_size_is_covered_and_cropped_to_the_sample_s(size, tmp_path):
    pipeline = tiny.build("instruct_pix2pix")
    sources = images(size, 2)
    rows = encode_rows(
        with_images(preference_pairs(2), sources),
        pipeline,
        family_for(pipeline),
        EncodingOptions(16),
        layout=LAYOUT,
        cache_folder=tmp_path,
    )
    for row, source in zip(rows, sources, strict=True):
        fitted = ImageOps.fit(source, (16, 16), PILImage.Resampling.LANCZOS)
        torch.testing.assert_close(row["condition/image"], own_latents(pipeline, fitted)[0], rtol=1e-4, atol=1e-5)


def test_a_row_s_image_is_cropped_and_mirrored_with_its_samples(tmp_path):
    pipeline = tiny.build("instruct_pix2pix")
    pairs = preference_pairs(8)
    same = concatenate_datasets([pairs, pairs.select_columns("chosen").rename_column("chosen", "image")], axis=1)
    options = EncodingOptions(16, crop="random", random_flip=True)
    for row in encode_rows(same, pipeline, family_for(pipeline), options, layout=LAYOUT, cache_folder=tmp_path):
        # The samples' latents are scaled, the image's are not.
        torch.testing.assert_close(row["condition/image"] * 0.7, row["chosen_mean"])


def test_a_checkpoint_of_the_other_class_is_refused():
    edits, generates = tiny.build("instruct_pix2pix"), tiny.build("stable_diffusion")
    edits.unet, generates.unet = generates.unet, edits.unet
    with pytest.raises(ValueError, match="takes 4 channels, but noisy latents and condition images .* have 8. Load"):
        family_for(edits).check_complete(edits)
    with pytest.raises(ValueError, match="takes 8 channels, but noisy latents of .* have 4. Load the checkpoint"):
        family_for(generates).check_complete(generates)

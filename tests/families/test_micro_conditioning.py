"""Conditioning on an image's size and crop, from the data set to the denoiser. SDXL is the family that has it."""

import pytest
import torch
from datasets import Dataset
from helpers import tiny
from helpers.encoding import encode_rows, encoder_of
from helpers.pipelines import image_pairs, png
from helpers.recorder import Recorder
from PIL import Image

from trl_diffusion_pref import MaPOConfig, MaPOTrainer, SelfNPOConfig, SelfNPOTrainer
from trl_diffusion_pref.data import EncodingOptions
from trl_diffusion_pref.evaluation import preference_accuracy
from trl_diffusion_pref.families import family_for


RESOLUTION = 16
OPTIONS = EncodingOptions(resolution=RESOLUTION)


def rotated_png(width: int, height: int) -> dict:
    """Stored lying, shown standing: EXIF says to turn it by 90 degrees."""
    import io

    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 80).convert("RGB").save(buffer, format="PNG", exif=exif)
    return {"bytes": buffer.getvalue(), "path": None}


def noise_png(width: int, height: int) -> dict:
    return png(Image.effect_noise((width, height), 80).convert("RGB"))


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Two pairs of four shapes."""
    return image_pairs(
        [
            ("a red circle", noise_png(40, 20), noise_png(16, 24)),
            ("a blue ring", rotated_png(48, 16), noise_png(16, 16)),
        ]
    )


# Height and width as shown, top and left of the crop at 16 pixels, height and width of what is encoded.
CHOSEN = [[20, 40, 0, 8, 16, 16], [48, 16, 16, 0, 16, 16]]
REJECTED = [[24, 16, 4, 0, 16, 16], [16, 16, 0, 0, 16, 16]]


@pytest.fixture
def pipeline():
    return tiny.build("stable_diffusion_xl")


@pytest.mark.parametrize("streamed", [False, True], ids=["stored", "streamed"])
def test_sizes_and_crops_of_both_images_reach_the_batch(streamed, rows, pipeline, tmp_path):
    encoder = encoder_of(pipeline, family_for(pipeline), OPTIONS, cache_folder=tmp_path)
    encoder.add_prompts([rows])
    if streamed:
        stream = encoder.encode(rows.to_iterable_dataset(), "train_dataset")
        (batch,) = stream.evaluation_batches(2, process=(0, 1))
    else:
        encoded = encoder.encode(rows, "train_dataset")
        batch = encoder.collator([encoded[0], encoded[1]])
    time_ids = batch["samples"]["time_ids"]
    assert time_ids[:, 0].tolist() == CHOSEN
    assert time_ids[:, 1].tolist() == REJECTED


def test_families_without_it_store_nothing(rows, tiny_pipeline, tmp_path):
    family = family_for(tiny_pipeline)
    encoded = encode_rows(
        rows, tiny_pipeline, family, OPTIONS, what="train_dataset", cache_folder=tmp_path, batch_size=2
    )
    assert set(encoded.encoded[0]) == {"prompt", "row", "latents/mean", "latents/std"}


def time_ids(recorder: Recorder) -> list[list[float]]:
    """Of the last call, smallest first."""
    return sorted(recorder.calls[-1]["added_cond_kwargs.time_ids"].tolist())


def options(tmp_path, **more) -> dict:
    return {
        "output_dir": str(tmp_path / "output"),
        "dataset_cache_dir": str(tmp_path / "cache"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "resolution": RESOLUTION,
        "aspect_ratio_buckets": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "activation_checkpointing": False,
        **more,
    }


@pytest.mark.parametrize("negative", [False, True])
def test_each_image_of_a_pair_is_denoised_with_its_own(negative, rows, pipeline, tmp_path):
    recorder = Recorder(pipeline.unet)
    MaPOTrainer(pipeline, MaPOConfig(**options(tmp_path, negative=negative)), rows).train()
    given = recorder.calls[-1]["added_cond_kwargs.time_ids"].tolist()
    # Stacked [chosen; rejected], or the other way round where the rejected one is to be preferred.
    first, second = (REJECTED, CHOSEN) if negative else (CHOSEN, REJECTED)
    assert sorted(given[:2]) == sorted(first) and sorted(given[2:]) == sorted(second)
    # the same row's image at the same place of both halves
    assert first.index(given[0]) == second.index(given[2])


def test_dropped_prompts_keep_their_images_conditioning(rows, pipeline, tmp_path):
    recorder = Recorder(pipeline.unet)
    MaPOTrainer(pipeline, MaPOConfig(**options(tmp_path, prompt_dropout=0.999)), rows).train()
    assert time_ids(recorder) == sorted(CHOSEN + REJECTED)
    # SDXL's unconditional side is zeros, and not what its text encoders make of an empty prompt.
    assert not recorder.calls[-1]["encoder_hidden_states"].any()
    assert not recorder.calls[-1]["added_cond_kwargs.text_embeds"].any()


def test_self_npo_from_images_takes_theirs_on_both_sides_of_the_guidance(rows, pipeline, tmp_path):
    recorder = Recorder(pipeline.unet)
    cfg = SelfNPOConfig(**options(tmp_path, start="data", guidance_scale=2.0, teacher="frozen"))
    images = rows.remove_columns("rejected").rename_column("chosen", "image")
    trainer = SelfNPOTrainer(pipeline, cfg, images)
    teacher = Recorder(trainer.teacher.module)
    trainer.train()
    assert time_ids(recorder) == sorted(CHOSEN)
    assert time_ids(teacher) == sorted(CHOSEN * 2)


def test_self_npo_from_noise_draws_whole_images_of_the_resolution(rows, pipeline, tmp_path):
    recorder = Recorder(pipeline.unet)
    cfg = SelfNPOConfig(**options(tmp_path, start="noise", guidance_scale=2.0, teacher="frozen", max_steps=2))
    trainer = SelfNPOTrainer(pipeline, cfg, rows.select_columns("prompt"))
    teacher = Recorder(trainer.teacher.module)
    trainer.train()
    drawn = [RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]
    assert {tuple(row) for row in time_ids(recorder) + time_ids(teacher)} == {tuple(drawn)}


def test_held_out_accuracy_is_computed_with_it(rows, pipeline, tmp_path):
    recorder = Recorder(pipeline.unet)
    preference_accuracy(pipeline, rows, draws=1, resolution=RESOLUTION, cache_folder=tmp_path)
    assert recorder.calls[-1]["added_cond_kwargs.time_ids"].tolist() == CHOSEN + REJECTED


def test_a_guidance_embedding_reaches_stored_and_streamed_batches(rows, tmp_path):
    """Flux's is one number per prompt."""
    pipeline = tiny.build("flux_dev")
    encoder = encoder_of(pipeline, family_for(pipeline), OPTIONS, cache_folder=tmp_path)
    encoder.add_prompts([rows])
    stored = encoder.encode(rows, "train_dataset")
    (streamed,) = encoder.encode(rows.to_iterable_dataset(), "train_dataset").evaluation_batches(2, process=(0, 1))
    for batch in (streamed, encoder.collator([stored[0], stored[1]])):
        guidance = batch["prompts"]["guidance"]
        assert torch.equal(guidance, torch.ones(2)) and guidance.dtype == torch.float32

"""Videos in a data set: encoded, streamed, cached, and errors by row."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value, Video
from helpers import tiny
from helpers.encoding import Rows, encode_rows, encoder_of, latent_shape
from helpers.media import FRAMES, frames
from helpers.pipelines import png

from trl_diffusion_pref.data import EncodingOptions
from trl_diffusion_pref.families import family_for


OPTIONS = EncodingOptions(resolution=16, num_frames=FRAMES)
MP4 = {"bytes": b"\x00\x00\x00\x18ftypisom" + bytes(20), "path": None}


@pytest.fixture(scope="module")
def wan():
    return tiny.build("wan")


def video_pairs(chosen: list, rejected: list) -> Dataset:
    videos = List(Image())
    return Dataset.from_dict(
        {"prompt": ["a"] * len(chosen), "chosen": chosen, "rejected": rejected},
        features=Features({"prompt": Value("string"), "chosen": videos, "rejected": videos}),
    )


def encode(dataset, pipeline, cache, options=OPTIONS) -> Rows:
    return encode_rows(
        dataset, pipeline, family_for(pipeline), options, what="train_dataset", cache_folder=cache, batch_size=2
    )


def test_videos_are_encoded_as_the_family_encodes_their_frames(wan, tmp_path):
    videos = frames(0, size=(32, 16)), frames(1, size=(32, 16))
    row = encode(video_pairs([videos[0]], [videos[1]]), wan, tmp_path)[0]
    for column, video in zip(("chosen", "rejected"), videos, strict=True):
        pixels = torch.stack([torch.from_numpy(np.array(frame)).float() for frame in video]) / 127.5 - 1
        mean, std = family_for(wan).encode_samples(wan, pixels.permute(3, 0, 1, 2)[None])
        assert row[f"{column}_mean"].shape == latent_shape(wan, family_for(wan), 16, FRAMES)
        torch.testing.assert_close(row[f"{column}_mean"], mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row[f"{column}_std"], std[0], rtol=1e-4, atol=1e-5)


def test_lists_of_paths_are_read_and_a_changed_frame_is_encoded_again(wan, tmp_path):
    paths = [[str(tmp_path / f"{video}{number}.png") for number in range(FRAMES)] for video in "ab"]
    for seed, video in enumerate(paths):
        for path, frame in zip(video, frames(seed), strict=True):
            frame.save(path)
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": [paths[0]], "rejected": [paths[1]]})
    row = encode(dataset, wan, tmp_path)[0]
    stored = encode(video_pairs([frames(0)], [frames(1)]), wan, tmp_path)[0]
    assert torch.equal(row["chosen_mean"], stored["chosen_mean"])
    frames(2)[3].save(paths[0][3])
    assert not torch.equal(encode(dataset, wan, tmp_path)[0]["chosen_mean"], row["chosen_mean"])


def test_encoded_videos_are_not_used_for_another_number_of_frames(wan, tmp_path):
    encode(video_pairs([frames(0)], [frames(1)]), wan, tmp_path)
    with pytest.raises(ValueError, match="row 0, column 'chosen': found 5 frames, wanted 9"):
        encode(video_pairs([frames(0)], [frames(1)]), wan, tmp_path, EncodingOptions(resolution=16, num_frames=9))


def test_another_size_of_the_pipeline_is_encoded_again(tmp_path):
    pipeline, nine = tiny.build("cogvideox"), [frames(seed, count=9) for seed in (0, 1)]
    dataset = video_pairs(nine[:1], nine[1:])
    assert encode(dataset, pipeline, tmp_path, EncodingOptions())[0]["chosen_mean"].shape == (4, 3, 2, 4)
    pipeline.transformer.register_to_config(sample_height=4)
    assert encode(dataset, pipeline, tmp_path, EncodingOptions())[0]["chosen_mean"].shape == (4, 3, 4, 4)


def test_streamed_videos_have_the_same_latents(wan, tmp_path):
    dataset = video_pairs([frames(0), frames(2)], [frames(1), frames(3)])
    stored = encode(dataset, wan, tmp_path)
    stream = encoder_of(wan, family_for(wan), OPTIONS).encode(dataset.to_iterable_dataset(), "train_dataset")
    (batch,) = stream.evaluation_batches(2, process=(0, 1))
    for mean, row in zip(batch["latents"]["mean"], stored, strict=True):
        torch.testing.assert_close(mean[0], row["chosen_mean"], rtol=1e-4, atol=1e-5)


def test_columns_of_another_kind_are_reported_by_row(wan, tiny_pipeline, tmp_path):
    images = Dataset.from_dict(
        {"prompt": ["a"], "chosen": [png(frames(0)[0])], "rejected": [png(frames(1)[0])]},
        features=Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()}),
    )
    with pytest.raises(ValueError, match="row 0, column 'chosen': found a single image"):
        encode(images, wan, tmp_path)
    of_images = EncodingOptions(resolution=16)
    message = "row 0, column 'chosen': found a video, but StableDiffusionPipeline generates images"
    with pytest.raises(ValueError, match=message):
        encode(video_pairs([frames(0)], [frames(1)]), tiny_pipeline, tmp_path, of_images)
    videos = Dataset.from_dict(
        {"prompt": ["a"], "chosen": [MP4], "rejected": [MP4]},
        features=Features({"prompt": Value("string"), "chosen": Video(), "rejected": Video()}),
    )
    with pytest.raises(ValueError, match=message):
        encode(videos, tiny_pipeline, tmp_path, of_images)


def test_the_same_video_twice_is_no_preference(wan, tmp_path):
    with pytest.raises(ValueError, match="columns 'chosen' and 'rejected': what is used of them is the same video"):
        encode(video_pairs([frames(0)], [frames(0)]), wan, tmp_path)

"""Clips as samples: decoding, preparing alike, encoding, and cells that are no clips."""

import io
import struct
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import png
from datasets import Dataset, Features, Image, List, Value, Video
from PIL import Image as PILImage


sys.path.insert(0, str(Path(__file__).parents[1] / "families"))

import tiny  # noqa: E402

from trl_diffusion_pref.data import (  # noqa: E402
    EncodingOptions,
    encode_rows,
    latent_shape,
    preparation_for,
    stream_rows,
)
from trl_diffusion_pref.data.cells import CellProblem  # noqa: E402
from trl_diffusion_pref.data.images import prepare_image  # noqa: E402
from trl_diffusion_pref.families import family_for  # noqa: E402


FRAMES = 5
OPTIONS = EncodingOptions(resolution=16, num_frames=FRAMES)


@pytest.fixture(scope="module")
def wan():
    return tiny.build("wan")


def frames(seed: int, count: int = FRAMES, size: tuple[int, int] = (40, 24)) -> list[PILImage.Image]:
    pixels = np.random.default_rng(seed).integers(0, 255, (count, *size[::-1], 3), dtype=np.uint8)
    return [PILImage.fromarray(frame) for frame in pixels]


def clip_pairs(chosen: list, rejected: list) -> Dataset:
    clips = List(Image())
    return Dataset.from_dict(
        {"prompt": ["a"] * len(chosen), "chosen": chosen, "rejected": rejected},
        features=Features({"prompt": Value("string"), "chosen": clips, "rejected": clips}),
    )


def encode(dataset, pipeline, cache, options=OPTIONS) -> Dataset:
    return encode_rows(
        dataset, pipeline, family_for(pipeline), options, what="train_dataset", cache_folder=cache, batch_size=2
    )


@pytest.mark.parametrize(
    ("name", "resolution", "shape"),
    [("wan", None, (3, 81, 480, 832)), ("wan", 240, (3, 81, 240, 416)), ("cogvideox", None, (3, 9, 16, 32))],
)
def test_clips_have_the_pipeline_s_frames_and_shape(name, resolution, shape):
    pipeline = tiny.build(name)
    assert preparation_for(pipeline, family_for(pipeline), resolution).shape == shape


def test_a_side_that_is_no_whole_patch_is_refused(wan):
    with pytest.raises(ValueError, match="resolution=250: WanPipeline takes multiples of 16 pixels. Take 240 or 256"):
        preparation_for(wan, family_for(wan), 250)


def test_frames_are_prepared_as_images_are_one_by_one(wan):
    preparation = preparation_for(wan, family_for(wan), 16, FRAMES)
    clip = frames(0)
    for place, flip in [((0.5, 0.5), False), ((0.2, 0.9), True)]:
        tensor = preparation.tensor(preparation.decode(clip), place, flip)
        assert tensor.shape == (3, FRAMES, 16, 32)
        for number, frame in enumerate(clip):
            # 40 x 24 covers 32 x 16 from 32 x 19 on.
            resized = frame.resize((32, 19), PILImage.Resampling.LANCZOS)
            top = round(3 * place[1])
            expected = prepare_image(resized.crop((0, top, 32, top + 16)), (16, 32), (0.5, 0.5), flip)
            assert torch.equal(tensor[:, number], expected)


def test_encoded_clips_are_the_family_s_of_their_frames(wan, tmp_path):
    clips = frames(0, size=(32, 16)), frames(1, size=(32, 16))
    row = encode(clip_pairs([clips[0]], [clips[1]]), wan, tmp_path)[0]
    for column, clip in zip(("chosen", "rejected"), clips, strict=True):
        pixels = torch.stack([torch.from_numpy(np.array(frame)).float() for frame in clip]) / 127.5 - 1
        mean, std = family_for(wan).encode_images(wan, pixels.permute(3, 0, 1, 2)[None])
        assert row[f"{column}_mean"].shape == latent_shape(wan, family_for(wan), 16, FRAMES)
        torch.testing.assert_close(row[f"{column}_mean"], mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row[f"{column}_std"], std[0], rtol=1e-4, atol=1e-5)


def test_lists_of_paths_are_read_and_a_changed_frame_is_encoded_again(wan, tmp_path):
    paths = [[str(tmp_path / f"{clip}{number}.png") for number in range(FRAMES)] for clip in "ab"]
    for seed, clip in enumerate(paths):
        for path, frame in zip(clip, frames(seed), strict=True):
            frame.save(path)
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": [paths[0]], "rejected": [paths[1]]})
    row = encode(dataset, wan, tmp_path)[0]
    stored = encode(clip_pairs([frames(0)], [frames(1)]), wan, tmp_path)[0]
    assert torch.equal(row["chosen_mean"], stored["chosen_mean"])
    frames(2)[3].save(paths[0][3])
    assert not torch.equal(encode(dataset, wan, tmp_path)[0]["chosen_mean"], row["chosen_mean"])


def test_clips_that_were_encoded_are_refused_where_another_number_of_frames_is_wanted(wan, tmp_path):
    encode(clip_pairs([frames(0)], [frames(1)]), wan, tmp_path)
    with pytest.raises(ValueError, match="row 0, column 'chosen': found 5 frames, wanted 9"):
        encode(clip_pairs([frames(0)], [frames(1)]), wan, tmp_path, EncodingOptions(resolution=16, num_frames=9))


def test_another_size_of_the_pipeline_is_another_entry_of_the_cache(tmp_path):
    pipeline, nine = tiny.build("cogvideox"), [frames(seed, count=9) for seed in (0, 1)]
    dataset = clip_pairs(nine[:1], nine[1:])
    assert encode(dataset, pipeline, tmp_path, EncodingOptions())[0]["chosen_mean"].shape == (4, 3, 2, 4)
    pipeline.transformer.register_to_config(sample_height=4)
    assert encode(dataset, pipeline, tmp_path, EncodingOptions())[0]["chosen_mean"].shape == (4, 3, 4, 4)


def test_streamed_clips_have_the_same_latents(wan, tmp_path):
    dataset = clip_pairs([frames(0), frames(2)], [frames(1), frames(3)])
    stored = encode(dataset, wan, tmp_path)
    streamed = stream_rows(
        dataset.to_iterable_dataset(), wan, family_for(wan), OPTIONS, what="train_dataset", batch_size=2
    )
    for row, other in zip(streamed, stored, strict=True):
        torch.testing.assert_close(row["chosen_mean"], other["chosen_mean"], rtol=1e-4, atol=1e-5)


def animated(clip: list[PILImage.Image]) -> dict:
    buffer = io.BytesIO()
    clip[0].save(buffer, format="PNG", save_all=True, append_images=clip[1:])
    return {"bytes": buffer.getvalue(), "path": None}


def test_an_animated_image_is_a_clip(wan):
    decode = preparation_for(wan, family_for(wan), 16, FRAMES).decode
    assert [np.asarray(frame).tolist() for frame in decode(animated(frames(0)))] == [
        np.asarray(frame).tolist() for frame in frames(0)
    ]
    with pytest.raises(CellProblem, match="found 4 frames, wanted 5"):
        decode(animated(frames(0, count=4)))


MP4 = {"bytes": b"\x00\x00\x00\x18ftypisom" + bytes(20), "path": None}
WAV = {"bytes": b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(20), "path": None}


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "the clip is None"),
        (frames(0, count=7), "found 7 frames, wanted 5. Bring clips of 5 frames, or set num_frames"),
        (frames(0, count=1), "found 1 frame, wanted 5"),
        (frames(0)[:3] + frames(1, count=2, size=(24, 24)), r"several sizes \(24x24, 40x24 pixels\)"),
        ([*frames(0, count=4), None], "frame 4: the image is None"),
        (frames(0)[0], "found an image, but WanPipeline generates clips"),
        (png(frames(0)[0]), "found an image, but WanPipeline generates clips"),
        (WAV, "found sound, but WanPipeline generates clips"),
        ({"array": [0.0], "sampling_rate": 8}, "found sound, but WanPipeline generates clips"),
        ({"bytes": None, "path": "/nowhere.mp4"}, "no file at /nowhere.mp4"),
    ],
)
def test_cells_that_are_no_clips_say_what_they_are(cell, message, wan):
    with pytest.raises(CellProblem, match=message):
        preparation_for(wan, family_for(wan), 16, FRAMES).decode(cell)


def test_a_video_file_without_a_decoder_says_what_to_do(wan, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(CellProblem, match="Pass the clip as a list of frames, or install PyAV"):
        preparation_for(wan, family_for(wan), 16, FRAMES).decode(MP4)


def film(clip: list[PILImage.Image], matrix: tuple[int, int, int, int] = (1, 0, 0, 1)) -> bytes:
    """A QuickTime film without loss, shown with x' = a x + c y and y' = b x + d y, y downwards, of (a, b, c, d)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as container:
        stream = container.add_stream("png", rate=8)
        stream.width, stream.height = clip[0].size
        stream.pix_fmt = "rgb24"
        for image in clip:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    data = buffer.getvalue()
    unit = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (value << 16 for value in matrix)
    # Of the film as a whole, then of the track.
    where = data.index(unit, data.index(b"tkhd"))
    return data[:where] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[where + len(unit) :]


def test_a_video_file_s_frames_are_read_back(wan, tmp_path):
    decode = preparation_for(wan, family_for(wan), 16, FRAMES).decode
    (tmp_path / "clip.mov").write_bytes(film(frames(0)))
    for cell in (str(tmp_path / "clip.mov"), {"bytes": film(frames(0)), "path": None}):
        assert [frame.tobytes() for frame in decode(cell)] == [frame.tobytes() for frame in frames(0)]
    with pytest.raises(CellProblem, match="found 8 frames, wanted 5"):
        decode({"bytes": film(frames(0, count=8)), "path": None})


MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_a_film_is_turned_and_mirrored_as_players_show_it(matrix, wan):
    """Each pixel goes where QuickTime's matrix says."""
    a, b, c, d = matrix
    decode = preparation_for(wan, family_for(wan), 16, FRAMES).decode
    decoded = decode({"bytes": film(frames(0), matrix), "path": None})
    for frame, stored in zip(decoded, frames(0), strict=True):
        stored = np.asarray(stored)
        height, width = stored.shape[:2]
        y, x = np.mgrid[:height, :width]
        shown_x, shown_y = a * x + c * y, b * x + d * y
        expected = np.zeros((np.ptp(shown_y) + 1, np.ptp(shown_x) + 1, 3), dtype=np.uint8)
        expected[shown_y - shown_y.min(), shown_x - shown_x.min()] = stored
        assert np.array_equal(np.asarray(frame), expected)


def test_a_film_that_is_shown_askew_is_refused(wan):
    decode = preparation_for(wan, family_for(wan), 16, FRAMES).decode
    with pytest.raises(CellProblem, match="rotated by less than a quarter turn, or skewed"):
        decode({"bytes": film(frames(0), (2, 1, -1, 2)), "path": None})


@pytest.mark.parametrize("damaged", [MP4["bytes"], film(frames(0))[:3000]], ids=["no_film", "cut_off"])
def test_a_damaged_video_file_is_called_damaged(damaged, wan):
    with pytest.raises(CellProblem, match="the video cannot be decoded"):
        preparation_for(wan, family_for(wan), 16, FRAMES).decode({"bytes": damaged, "path": None})


def test_columns_of_another_kind_are_refused_by_row(wan, tiny_pipeline, tmp_path):
    images = Dataset.from_dict(
        {"prompt": ["a"], "chosen": [png(frames(0)[0])], "rejected": [png(frames(1)[0])]},
        features=Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()}),
    )
    with pytest.raises(ValueError, match="row 0, column 'chosen': found an image, but WanPipeline generates clips"):
        encode(images, wan, tmp_path)
    of_images = EncodingOptions(resolution=16)
    message = "row 0, column 'chosen': found a clip, but StableDiffusionPipeline generates images"
    with pytest.raises(ValueError, match=message):
        encode(clip_pairs([frames(0)], [frames(1)]), tiny_pipeline, tmp_path, of_images)
    videos = Dataset.from_dict(
        {"prompt": ["a"], "chosen": [MP4], "rejected": [MP4]},
        features=Features({"prompt": Value("string"), "chosen": Video(), "rejected": Video()}),
    )
    with pytest.raises(ValueError, match=message):
        encode(videos, tiny_pipeline, tmp_path, of_images)


def test_the_same_clip_twice_is_no_preference(wan, tmp_path):
    with pytest.raises(ValueError, match="columns 'chosen' and 'rejected': what is used of them is the same clip"):
        encode(clip_pairs([frames(0)], [frames(0)]), wan, tmp_path)


def test_frames_for_a_pipeline_of_images_are_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="num_frames=5 is for clips, and StableDiffusionPipeline generates images"):
        preparation_for(tiny_pipeline, family_for(tiny_pipeline), 16, 5)


def test_paths_are_found_in_lists_of_fixed_length_too():
    import pyarrow as pa

    from trl_diffusion_pref.data.cells import paths_outside

    cells = pa.chunked_array([pa.array([["a.png", "b.png"]], type=pa.list_(pa.string(), 2))])
    assert list(paths_outside(cells)) == ["a.png", "b.png"]


def test_a_damaged_animation_is_called_damaged(tmp_path):
    from trl_diffusion_pref.data import clips
    from trl_diffusion_pref.data.cells import CellProblem

    frames = [PILImage.effect_noise((16, 16), 50 + i).convert("RGB") for i in range(5)]
    frames[0].save(tmp_path / "clip.png", save_all=True, append_images=frames[1:])
    data = (tmp_path / "clip.png").read_bytes()
    with pytest.raises(CellProblem, match="the animation cannot be decoded"):
        clips._from_file({"path": None, "bytes": data[: len(data) // 2]}, 5, "WanPipeline")

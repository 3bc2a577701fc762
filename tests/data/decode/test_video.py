"""Videos as samples: decoding, preparation, and cells that are not videos."""

import io
import struct
import sys

import av
import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.media import FRAMES, frames
from helpers.pipelines import png
from PIL import Image as PILImage

from trl_diffusion_pref.data import preparation_for
from trl_diffusion_pref.data.decode.cell import CellProblem
from trl_diffusion_pref.data.decode.image import prepare_image
from trl_diffusion_pref.families import family_for


@pytest.fixture(scope="module")
def wan():
    return tiny.build("wan")


@pytest.mark.parametrize(
    ("name", "resolution", "shape"),
    [("wan", None, (3, 81, 480, 832)), ("wan", 240, (3, 81, 240, 416)), ("cogvideox", None, (3, 9, 16, 32))],
)
def test_videos_have_the_pipeline_s_frames_and_shape(name, resolution, shape):
    pipeline = tiny.build(name)
    assert preparation_for(pipeline, family_for(pipeline), resolution).shape == shape


def test_a_side_that_is_no_multiple_of_the_patch_is_an_error(wan):
    with pytest.raises(ValueError, match="resolution=250: WanPipeline takes multiples of 16 pixels. Take 240 or 256"):
        preparation_for(wan, family_for(wan), 250)


def test_frames_are_prepared_as_images_are_one_by_one(wan):
    preparation = preparation_for(wan, family_for(wan), 16, FRAMES)
    video = frames(0)
    for place, flip in [((0.5, 0.5), False), ((0.2, 0.9), True)]:
        tensor = preparation.tensor(preparation.decode(video), place, flip)
        assert tensor.shape == (3, FRAMES, 16, 32)
        for number, frame in enumerate(video):
            # 40 x 24 is scaled to 32 x 19 to cover 32 x 16.
            resized = frame.resize((32, 19), PILImage.Resampling.LANCZOS)
            top = round(3 * place[1])
            expected = prepare_image(resized.crop((0, top, 32, top + 16)), (16, 32), (0.5, 0.5), flip)
            torch.testing.assert_close(tensor[:, number], expected, rtol=0, atol=2.01 / 127.5)


def animated(video: list[PILImage.Image]) -> dict:
    buffer = io.BytesIO()
    video[0].save(buffer, format="PNG", save_all=True, append_images=video[1:])
    return {"bytes": buffer.getvalue(), "path": None}


def test_an_animated_image_is_a_video(wan):
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
        (None, "the video is None"),
        (frames(0, count=7), "found 7 frames, wanted 5. Pass videos of 5 frames, or set num_frames"),
        (frames(0, count=1), "found 1 frame, wanted 5"),
        (frames(0)[:3] + frames(1, count=2, size=(24, 24)), r"several sizes \(24x24, 40x24 pixels\)"),
        ([*frames(0, count=4), None], "frame 4: the image is None"),
        (frames(0)[0], "found a single image; pass a list of frames, an animation or a video file"),
        (png(frames(0)[0]), "found a single image; pass a list of frames, an animation or a video file"),
        ([0.1] * FRAMES, "frame 0: a cell of type float is not an image"),
        (WAV, "found audio, but WanPipeline generates videos"),
        ({"array": [0.0], "sampling_rate": 8}, "found audio, but WanPipeline generates videos"),
        ({"bytes": None, "path": None}, "found a cell of type dict"),
        ({"bytes": None, "path": "/nowhere.mp4"}, "no file at /nowhere.mp4"),
    ],
)
def test_a_cell_that_is_no_video_says_what_it_is(cell, message, wan):
    with pytest.raises(CellProblem, match=message):
        preparation_for(wan, family_for(wan), 16, FRAMES).decode(cell)


def test_a_video_file_without_a_decoder_says_what_to_do(wan, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        CellProblem, match=r"a list of frames can be passed.* needs av: pip install 'trl-diffusion-pref\[video\]'"
    ):
        preparation_for(wan, family_for(wan), 16, FRAMES).decode(MP4)


def movie(video: list[PILImage.Image], matrix: tuple[int, int, int, int] = (1, 0, 0, 1)) -> bytes:
    """A lossless QuickTime video, shown with x' = a x + c y and y' = b x + d y, y downwards, of (a, b, c, d)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as container:
        stream = container.add_stream("png", rate=8)
        stream.width, stream.height = video[0].size
        stream.pix_fmt = "rgb24"
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    data = buffer.getvalue()
    unit = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (value << 16 for value in matrix)
    # The first matrix is the movie's, the second its track's.
    where = data.index(unit, data.index(b"tkhd"))
    return data[:where] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[where + len(unit) :]


def test_the_frames_of_a_video_file_are_read_back(wan, tmp_path):
    decode = preparation_for(wan, family_for(wan), 16, FRAMES).decode
    (tmp_path / "video.mov").write_bytes(movie(frames(0)))
    for cell in (str(tmp_path / "video.mov"), {"bytes": movie(frames(0)), "path": None}):
        assert [frame.tobytes() for frame in decode(cell)] == [frame.tobytes() for frame in frames(0)]
    with pytest.raises(CellProblem, match="found 8 frames, wanted 5"):
        decode({"bytes": movie(frames(0, count=8)), "path": None})


ROTATIONS = [(1, 0, 0, 1), (-1, 0, 0, -1), (0, 1, -1, 0), (0, -1, 1, 0)]
REFLECTIONS = [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("matrix", ROTATIONS, ids=str)
def test_a_video_is_rotated_as_players_show_it(matrix, wan):
    """Each pixel goes where QuickTime's matrix says."""
    a, b, c, d = matrix
    decode = preparation_for(wan, family_for(wan), 16, FRAMES).decode
    decoded = decode({"bytes": movie(frames(0), matrix), "path": None})
    for frame, stored in zip(decoded, frames(0), strict=True):
        stored = np.asarray(stored)
        height, width = stored.shape[:2]
        y, x = np.mgrid[:height, :width]
        shown_x, shown_y = a * x + c * y, b * x + d * y
        expected = np.zeros((np.ptp(shown_y) + 1, np.ptp(shown_x) + 1, 3), dtype=np.uint8)
        expected[shown_y - shown_y.min(), shown_x - shown_x.min()] = stored
        assert np.array_equal(np.asarray(frame), expected)


@pytest.mark.parametrize("matrix", REFLECTIONS, ids=str)
def test_a_mirrored_video_is_an_error(matrix, wan):
    decode = preparation_for(wan, family_for(wan), 16, FRAMES).decode
    with pytest.raises(CellProblem, match="the video is mirrored by its display matrix; encode it again"):
        decode({"bytes": movie(frames(0), matrix), "path": None})


def test_a_video_that_is_shown_at_an_angle_is_an_error(wan):
    decode = preparation_for(wan, family_for(wan), 16, FRAMES).decode
    with pytest.raises(CellProblem, match="the video is shown rotated by -?26 degrees; encode it again"):
        decode({"bytes": movie(frames(0), (2, 1, -1, 2)), "path": None})


@pytest.mark.parametrize("damaged", [MP4["bytes"], movie(frames(0))[:3000]], ids=["no_video", "cut_off"])
def test_a_damaged_video_file_is_called_damaged(damaged, wan):
    with pytest.raises(CellProblem, match="the video cannot be decoded"):
        preparation_for(wan, family_for(wan), 16, FRAMES).decode({"bytes": damaged, "path": None})


def test_num_frames_is_an_error_for_a_pipeline_of_images(tiny_pipeline):
    with pytest.raises(ValueError, match="num_frames=5 is for videos, and StableDiffusionPipeline generates images"):
        preparation_for(tiny_pipeline, family_for(tiny_pipeline), 16, 5)


def test_a_damaged_animation_is_called_damaged(wan):
    data = animated(frames(0))["bytes"]
    with pytest.raises(CellProblem, match="the animation cannot be decoded"):
        preparation_for(wan, family_for(wan), 16, FRAMES).decode(data[: len(data) // 2])


def test_the_bytes_of_a_file_are_a_cell(wan):
    decode = preparation_for(wan, family_for(wan), 16, FRAMES).decode
    for data in (movie(frames(0)), animated(frames(0))["bytes"]):
        assert [frame.tobytes() for frame in decode(data)] == [frame.tobytes() for frame in frames(0)]


def test_an_animation_of_too_many_pixels_is_not_decoded(wan, monkeypatch):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(CellProblem, match="raise PIL.Image.MAX_IMAGE_PIXELS"):
        preparation_for(wan, family_for(wan), 16, FRAMES).decode(animated(frames(0)))


@pytest.mark.parametrize(("size", "noted"), [((96, 16), True), ((42, 16), False), ((32, 16), False)])
def test_a_note_says_how_much_of_a_video_is_cropped(size, noted, wan):
    preparation = preparation_for(wan, family_for(wan), 16, FRAMES)
    notes = preparation.notes(preparation.decode(frames(0, size=size)))
    expected = (
        "67% of a video of 96x16 pixels is cropped to fit 32x16; pass samples closer to this shape, or set resolution "
        "to a (height, width) closer to theirs"
    )
    assert notes == ({"crop": expected} if noted else {})

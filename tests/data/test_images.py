import io

import numpy as np
import pytest
import torch
from conftest import png
from PIL import Image

from trl_diffusion_pref.data.images import ImageProblem, crop_top_left, decode_image, prepare_image


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def test_pixels_are_scaled_to_minus_one_to_one():
    image = Image.new("RGB", (4, 4), (0, 255, 51))
    pixels = prepare_image(image, 4, (0.5, 0.5), False)
    assert pixels.shape == (3, 4, 4) and pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels[:, 0, 0].numpy(), [-1.0, 1.0, -0.6], atol=1e-6)


def test_a_mirrored_rectangle_s_crop_is_told_as_if_the_picture_had_been_mirrored():
    # 40 x 20 covers 24 x 16 from 32 x 16 on; 8 columns are cut, 2 of them at the left.
    assert crop_top_left((40, 20), (16, 24), (0.25, 0.5), False) == (0, 2)
    assert crop_top_left((40, 20), (16, 24), (0.25, 0.5), True) == (0, 6)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_are_refused(format):
    buffer = io.BytesIO()
    frames = [Image.effect_noise((8, 8), 10.0 * (i + 1)).convert("RGB") for i in range(3)]
    frames[0].save(buffer, format=format, save_all=True, append_images=frames[1:])
    for cell in ({"bytes": buffer.getvalue(), "path": None}, Image.open(buffer)):
        with pytest.raises(ImageProblem, match="found an animation of 3 frames; choose one of them"):
            decode_image(cell)


def test_the_picture_of_a_phone_s_jpeg_is_its_first():
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, format="MPO", save_all=True, append_images=frames[1:])
    assert decode_image({"bytes": buffer.getvalue(), "path": None}).getpixel((0, 0))[0] > 200


def test_wide_images_are_cropped_in_the_middle_and_not_stretched():
    image = Image.new("RGB", (40, 20), "red")
    image.paste(Image.new("RGB", (20, 20), "blue"), (10, 0))
    pixels = prepare_image(image, 20, (0.5, 0.5), False)
    assert torch.equal(pixels, prepare_image(Image.new("RGB", (20, 20), "blue"), 20, (0.5, 0.5), False))


def test_a_circle_stays_a_circle():
    from PIL import ImageDraw

    image = Image.new("RGB", (120, 60), "white")
    ImageDraw.Draw(image).ellipse([40, 10, 80, 50], fill="black")
    dark = prepare_image(image, 30, (0.5, 0.5), False)[0] < 0
    assert abs(int(dark.any(dim=0).sum()) - int(dark.any(dim=1).sum())) <= 1


@pytest.mark.parametrize("place", [(0.0, 0.0), (1.0, 1.0)])
def test_crop_place_is_relative(place):
    cut = prepare_image(gradient(60, 20), 20, place, False)
    expected = gradient(60, 20).crop((round(40 * place[0]), 0, round(40 * place[0]) + 20, 20))
    assert torch.equal(cut, prepare_image(expected, 20, (0.5, 0.5), False))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("size", "place"), [((52, 20), (0.25, 0.5)), ((20, 52), (0.5, 0.75)), ((20, 20), (0.3, 0.3))])
def test_the_crop_is_told_as_it_lies_in_the_picture_that_is_seen(size, place, flip):
    pixels = prepare_image(gradient(*size), 20, place, flip)
    top, left = crop_top_left(size, 20, place, flip)
    seen = gradient(*size).transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else gradient(*size)
    expected = prepare_image(seen.crop((left, top, left + 20, top + 20)), 20, (0.5, 0.5), False)
    assert torch.equal(pixels, expected)


def test_flip_mirrors_left_to_right():
    image = gradient(16, 16)
    plain, flipped = (prepare_image(image, 16, (0.5, 0.5), flip) for flip in (False, True))
    assert torch.equal(flipped, plain.flip(-1))


def test_extreme_aspect_ratios_still_fill_the_square():
    assert prepare_image(gradient(333, 7), 64, (0.3, 0.5), False).shape == (3, 64, 64)


def test_transparency_becomes_white_and_grey_becomes_rgb():
    transparent = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert decode_image(transparent).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (2, 2), "blue").convert("P")
    assert decode_image(palette).getpixel((0, 0)) == (0, 0, 255)
    assert decode_image(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(2, axis=0)
    decoded = np.asarray(decode_image(Image.fromarray(ramp)))[0, :, 0]
    np.testing.assert_array_equal(decoded, np.arange(256))


def test_exif_rotation_is_applied():
    image = gradient(4, 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    assert decode_image({"bytes": buffer.getvalue(), "path": None}).size == (2, 4)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "is None"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"bytes": b"not an image", "path": None}, "not an image"),
        ({"bytes": b"", "path": None}, "not an image"),
        ({"bytes": png(Image.effect_noise((64, 64), 50))["bytes"][:1000], "path": None}, "cannot be decoded"),
        ({"bytes": None, "path": "/nowhere/x.png"}, "no file at /nowhere/x.png"),
    ],
)
def test_unusable_cells_say_why(cell, message):
    with pytest.raises(ImageProblem, match=message):
        decode_image(cell)

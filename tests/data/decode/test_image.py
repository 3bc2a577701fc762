import io
import time

import numpy as np
import pytest
import torch
from helpers.pipelines import png
from PIL import Image

from trl_diffusion_pref.data import preparation_for
from trl_diffusion_pref.data.decode.cell import CellProblem
from trl_diffusion_pref.data.decode.image import crop_top_left, cropped_share, decode_image, prepare_image
from trl_diffusion_pref.families import family_for


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def test_pixels_are_scaled_to_minus_one_to_one():
    image = Image.new("RGB", (4, 4), (0, 255, 51))
    pixels = prepare_image(image, (4, 4), (0.5, 0.5), False)
    assert pixels.shape == (3, 4, 4) and pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels[:, 0, 0].numpy(), [-1.0, 1.0, -0.6], atol=1e-6)


def test_the_crop_of_a_mirrored_rectangle_is_where_the_model_sees_it():
    # 40 x 20 covers 24 x 16 from 32 x 16 on; 8 columns are cut, 2 of them at the left.
    assert crop_top_left((40, 20), (16, 24), (0.25, 0.5), False) == (0, 2)
    assert crop_top_left((40, 20), (16, 24), (0.25, 0.5), True) == (0, 6)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_not_an_image(format):
    buffer = io.BytesIO()
    frames = [Image.effect_noise((8, 8), 10.0 * (i + 1)).convert("RGB") for i in range(3)]
    frames[0].save(buffer, format=format, save_all=True, append_images=frames[1:])
    for cell in ({"bytes": buffer.getvalue(), "path": None}, Image.open(buffer)):
        with pytest.raises(CellProblem, match="found an animation of 3 frames; choose one of them"):
            decode_image(cell)


def test_the_first_image_of_a_phone_s_jpeg_is_used():
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, format="MPO", save_all=True, append_images=frames[1:])
    assert decode_image({"bytes": buffer.getvalue(), "path": None}).getpixel((0, 0))[0] > 200


def test_wide_images_are_cropped_in_the_middle_and_not_stretched():
    image = Image.new("RGB", (40, 20), "red")
    image.paste(Image.new("RGB", (20, 20), "blue"), (10, 0))
    pixels = prepare_image(image, (20, 20), (0.5, 0.5), False)
    assert torch.equal(pixels, prepare_image(Image.new("RGB", (20, 20), "blue"), (20, 20), (0.5, 0.5), False))


def test_a_circle_stays_a_circle():
    from PIL import ImageDraw

    image = Image.new("RGB", (120, 60), "white")
    ImageDraw.Draw(image).ellipse([40, 10, 80, 50], fill="black")
    dark = prepare_image(image, (30, 30), (0.5, 0.5), False)[0] < 0
    assert abs(int(dark.any(dim=0).sum()) - int(dark.any(dim=1).sum())) <= 1


@pytest.mark.parametrize("place", [(0.0, 0.0), (1.0, 1.0)])
def test_crop_place_is_relative(place):
    cut = prepare_image(gradient(60, 20), (20, 20), place, False)
    expected = gradient(60, 20).crop((round(40 * place[0]), 0, round(40 * place[0]) + 20, 20))
    assert torch.equal(cut, prepare_image(expected, (20, 20), (0.5, 0.5), False))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("size", "place"), [((52, 20), (0.25, 0.5)), ((20, 52), (0.5, 0.75)), ((20, 20), (0.3, 0.3))])
def test_crop_top_left_is_where_prepare_image_crops(size, place, flip):
    pixels = prepare_image(gradient(*size), (20, 20), place, flip)
    top, left = crop_top_left(size, (20, 20), place, flip)
    seen = gradient(*size).transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else gradient(*size)
    expected = prepare_image(seen.crop((left, top, left + 20, top + 20)), (20, 20), (0.5, 0.5), False)
    assert torch.equal(pixels, expected)


def test_flip_mirrors_left_to_right():
    image = gradient(16, 16)
    plain, flipped = (prepare_image(image, (16, 16), (0.5, 0.5), flip) for flip in (False, True))
    assert torch.equal(flipped, plain.flip(-1))


def test_extreme_aspect_ratios_still_fill_the_square():
    assert prepare_image(gradient(333, 7), (64, 64), (0.3, 0.5), False).shape == (3, 64, 64)


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
        (5, "a cell of type int is not an image"),
        ({"bytes": b"not an image", "path": None}, "not an image"),
        ({"bytes": b"", "path": None}, "the file has no bytes"),
        ({"bytes": png(Image.effect_noise((64, 64), 50))["bytes"][:1000], "path": None}, "cannot be decoded"),
        ({"bytes": None, "path": "/nowhere/x.png"}, "no file at /nowhere/x.png"),
    ],
)
def test_an_unusable_image_says_why(cell, message):
    with pytest.raises(CellProblem, match=message):
        decode_image(cell)


def smooth_noise(width: int, height: int) -> Image.Image:
    """Random but smooth, as photographs are; pure noise overshoots, and Pillow clips between its two passes."""
    pixels = np.random.default_rng(0).integers(50, 206, (-(-height // 3), -(-width // 3), 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def scaled_then_cropped(image: Image.Image, shape: tuple[int, int], crop_at: tuple[float, float]) -> np.ndarray:
    """The definition that `prepare_image` computes with less memory: scale the whole image, then crop."""
    scale = max(shape[1] / image.width, shape[0] / image.height)
    width, height = max(shape[1], round(image.width * scale)), max(shape[0], round(image.height * scale))
    left, top = round((width - shape[1]) * crop_at[0]), round((height - shape[0]) * crop_at[1])
    whole = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(whole.crop((left, top, left + shape[1], top + shape[0])), dtype=np.float32)


@pytest.mark.parametrize("size", [(100, 75), (333, 500), (40, 20), (777, 64), (65, 64)])
@pytest.mark.parametrize("crop_at", [(0.5, 0.5), (0.0, 1.0), (0.31, 0.77)])
def test_cropping_before_scaling_changes_pixels_by_2_of_255_at_most(size, crop_at):
    image = smooth_noise(*size)
    for shape in ((64, 64), (48, 80)):
        pixels = (prepare_image(image, shape, crop_at, False).permute(1, 2, 0).numpy() + 1) * 127.5
        np.testing.assert_allclose(pixels, scaled_then_cropped(image, shape, crop_at), rtol=0, atol=2.01)


def test_an_image_of_the_right_height_is_cropped_bit_by_bit():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 90, 3), dtype=np.uint8))
    pixels = prepare_image(image, (64, 64), (0.5, 0.5), False)
    expected = torch.from_numpy(np.array(image)[:, 13:77].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1.0
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("thin", [(20000, 10), (10, 20000)], ids=str)
def test_a_thin_image_is_never_scaled_as_a_whole(thin, monkeypatch):
    image, resize, sizes = smooth_noise(*thin), Image.Image.resize, []

    def recorded(*args, **options):
        result = resize(*args, **options)
        sizes.append(result.size)
        return result

    monkeypatch.setattr(Image.Image, "resize", recorded)
    start = time.process_time()
    pixels = (prepare_image(image, (256, 256), (0.5, 0.5), False).permute(1, 2, 0).numpy() + 1) * 127.5
    # Scaling all of it takes more than 30 s.
    assert time.process_time() - start < 2
    assert sizes == [(256, 256)]
    # The middle third of 30 x 10 pixels around the centre, which the filter does not look beyond.
    horizontal = thin[0] > thin[1]
    around = image.crop((9985, 0, 10015, 10) if horizontal else (0, 9985, 10, 10015))
    expected = scaled_then_cropped(around, (256, 256), (0.5, 0.5))
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=2.01)


def test_a_decompression_bomb_is_not_decoded(monkeypatch):
    cell = png(Image.effect_noise((64, 64), 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(CellProblem, match="4096 pixels.*decompression bomb.*raise PIL.Image.MAX_IMAGE_PIXELS"):
        decode_image(cell)


@pytest.mark.parametrize(("size", "share"), [((300, 100), 2 / 3), ((100, 300), 2 / 3), ((4, 3), 0.25), ((5, 5), 0.0)])
def test_the_cropped_share_is_of_the_image_s_pixels(size, share):
    assert cropped_share(size, (600, 600)) == pytest.approx(share)


def test_heic_without_a_decoder_says_what_to_install():
    with pytest.raises(CellProblem, match=r"HEIC or AVIF.*pillow_heif.register_heif_opener\(\)"):
        decode_image(b"\x00\x00\x00\x18ftypheic" + bytes(40))


@pytest.mark.parametrize(
    ("size", "note"), [((48, 16), "67% of an image of 48x16 pixels is cropped to fit 16x16;"), ((20, 16), None)]
)
def test_a_note_says_how_much_of_an_image_is_cropped(size, note, tiny_pipeline):
    preparation = preparation_for(tiny_pipeline, family_for(tiny_pipeline), 16)
    notes = preparation.notes(preparation.decode(gradient(*size)))
    assert notes.keys() == ({"crop"} if note else set())
    assert not note or notes["crop"].startswith(note)

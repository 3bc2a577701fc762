"""Preparation of images, compared with Pillow in float64 and with transformers' own processor."""

import json

import numpy as np
import pytest
from helpers.reward_models import CLIP_MEAN, CLIP_PROCESSOR, CLIP_STD, images, normalized
from PIL import Image

from trl_diffusion_pref.rewards.loading import load_image_processor
from trl_diffusion_pref.rewards.pixels import crop_short_side, pad_short_side


# Widths and heights: 3:1, odd, thin, small, three pixels high, with one to seven pixels to crop, fitting exactly.
SIZES = [(300, 100), (97, 31), (31, 97), (1, 9), (9, 1), (5, 3), (28, 28), (29, 28), (30, 28), (31, 28), (28, 35)]


def resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Bicubic with antialiasing in floats, `(height, width, 3)`: Pillow's mode F is not rounded."""
    channels = [Image.fromarray(np.asarray(image)[..., channel].astype(np.float32)) for channel in range(3)]
    return np.stack(
        [np.asarray(channel.resize((width, height), Image.Resampling.BICUBIC)) for channel in channels], -1
    )


def cropped(image: Image.Image, margin) -> np.ndarray:
    short = min(image.size)
    width, height = (28 if side == short else int(28 * side / short) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = margin(height - 28), margin(width - 28)
    return normalized(pixels[top : top + 28, left : left + 28])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_authors_crop_equals_theirs_pixel_by_pixel(size):
    (image,) = images(size)
    # torchvision rounds half of the margin to the even number.
    expected = cropped(image, lambda margin: int(round(margin / 2.0)))
    np.testing.assert_allclose(crop_short_side(image, 28).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_published_processor_crops_in_the_middle_without_torchvision(size, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP_PROCESSOR))
    processor = load_image_processor(str(tmp_path))
    (image,) = images(size)
    pixels = processor([image], return_tensors="pt", input_data_format="channels_last").pixel_values[0]
    np.testing.assert_allclose(pixels.numpy(), cropped(image, lambda margin: margin // 2), atol=2e-6)


@pytest.mark.parametrize("size", [*SIZES, (28, 7), (500, 1)], ids=str)
def test_hps_resizes_the_long_side_and_pads_with_black(size):
    (image,) = images(size)
    scale = 28 / max(size)
    width, height = (max(round(side * scale), 1) for side in size)
    expected = np.zeros((28, 28, 3))
    top, left = (28 - height) // 2, (28 - width) // 2
    expected[top : top + height, left : left + width] = resized(image, width, height)
    np.testing.assert_allclose(pad_short_side(image, 28).numpy(), normalized(expected), atol=2e-5)
    if height < 28:
        np.testing.assert_allclose(pad_short_side(image, 28)[:, -1, 0].numpy(), -CLIP_MEAN / CLIP_STD, atol=1e-6)

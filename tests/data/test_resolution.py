import numpy as np
import pytest

from trl_diffusion_pref import MaPOConfig
from trl_diffusion_pref.data import as_resolution


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (512, 512),
        ("512", 512),
        ("768x1360", (768, 1360)),
        (np.int64(512), 512),
        ([64, 32], (64, 32)),
        ((64, 32), (64, 32)),
    ],
)
def test_a_side_or_a_height_and_a_width(value, expected, tmp_path):
    assert as_resolution(value) == expected
    assert MaPOConfig(output_dir=str(tmp_path), resolution=value).resolution == expected


REFUSED = [0, -8, "0x8", "large", "8x", "8x8x8", (8, 8, 8), 8.5, (8, 8.5), "", True, (True, 8), b"12", "\u00b2"]


@pytest.mark.parametrize("value", REFUSED, ids=repr)
def test_anything_else_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match="is neither a positive number of pixels"):
        as_resolution(value)
    with pytest.raises(ValueError, match="is neither a positive number of pixels"):
        MaPOConfig(output_dir=str(tmp_path), resolution=value)

"""Images of several shapes: which are used, in which shape, how much is cut away; and nothing is stretched."""

import io
import logging

import fsspec
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from helpers import tiny
from helpers.encoding import encoder_of
from helpers.pipelines import build_tiny_pipeline, image_pairs, png
from PIL import Image, ImageDraw

from trl_diffusion_pref.data import EncodingOptions
from trl_diffusion_pref.data.bad_rows import BadRowPolicy
from trl_diffusion_pref.data.buckets import BucketOptions
from trl_diffusion_pref.data.content import image_size
from trl_diffusion_pref.data.decode.image import decode_image
from trl_diffusion_pref.data.image_shapes import cropping_report, log_cropping
from trl_diffusion_pref.families import family_for


LOADED = "trl_diffusion_pref.data"


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def circle(width: int, height: int, radius: float, colour: str = "white") -> Image.Image:
    """A disc in the middle of a black image, four times as fine."""
    image = Image.new("RGB", (4 * width, 4 * height))
    middle = 2 * width, 2 * height
    box = [side + sign * 4 * radius for sign in (-1, 1) for side in middle]
    ImageDraw.Draw(image).ellipse(box, fill=colour)
    return image.resize((width, height), Image.Resampling.BOX)


def options(resolution: int = 64, enabled: bool = True, policy: BadRowPolicy | None = None, **more) -> EncodingOptions:
    shape = {name: more.pop(name) for name in ("max_aspect_difference", "on_aspect_difference") if name in more}
    policy = policy or BadRowPolicy()
    return EncodingOptions(resolution, buckets=BucketOptions(enabled, **shape), bad_rows=policy, **more)


def encode(rows: Dataset, chosen: EncodingOptions, pipeline=None, label: str = "train_dataset", **where):
    """The encoded data set, the encoder, and the pixels that the VAE got."""
    pipeline, seen = pipeline or build_tiny_pipeline(), []
    encoder = encoder_of(pipeline, family_for(pipeline), chosen, **where)
    # Known by encoding an empty sample.
    assert encoder.latent_shape
    original = pipeline.vae.encode

    def recorded(pixels, *args, **kwargs):
        seen.append(pixels)
        return original(pixels, *args, **kwargs)

    pipeline.vae.encode = recorded
    try:
        encoder.add_prompts([rows])
        encoded = encoder.encode(rows, label)
    finally:
        pipeline.vae.encode = original
    return encoded, encoder, [image for pixels in seen for image in pixels]


def pair(one: Image.Image, other: Image.Image, prompt: str = "a disc") -> tuple:
    return prompt, png(one), png(other)


class TestSizes:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
    def test_a_size_is_that_of_the_image_as_it_is_shown(self, kind):
        for orientation in (None, *range(1, 9)):
            exif = Image.Exif()
            if orientation is not None:
                exif[0x0112] = orientation
            buffer = io.BytesIO()
            noise(45, 20).save(buffer, format=kind, exif=exif)
            expected = (20, 45) if orientation in (5, 6, 7, 8) else (45, 20)
            assert image_size(buffer.getvalue()) == decode_image(buffer.getvalue()).size == expected
            assert image_size(Image.open(buffer)) == expected

    def test_the_size_of_a_png_is_read_without_decoding_it(self, monkeypatch):
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
        assert image_size(png(noise(45, 20))["bytes"]) == (45, 20)

    def test_images_behind_urls_get_their_bucket_too(self):
        urls = []
        for image in (noise(90, 30), noise(60, 20, seed=1)):
            urls.append(f"memory://shapes-{image.width}.png")
            with fsspec.open(urls[-1], "wb") as file:
                image.save(file, format="PNG")
        features = Features({"prompt": Value("string"), "chosen": ImageColumn(), "rejected": ImageColumn()})
        columns = {"prompt": ["a disc"], "chosen": urls[:1], "rejected": urls[1:]}
        encoded, _, pixels = encode(Dataset.from_dict(columns, features=features), options())
        assert encoded.sizes[encoded.buckets[0]] == (36, 108)
        assert {tuple(image.shape[1:]) for image in pixels} == {(36, 108)}


def axes(image: torch.Tensor) -> tuple[float, float]:
    """Standard deviations of a disc's pixels along height and width."""
    weight = (image.mean(dim=0).double() + 1).clamp_min(0)
    spreads = []
    for dim in (0, 1):
        places = torch.arange(weight.shape[dim], dtype=torch.float64)
        share = weight.sum(dim=1 - dim) / weight.sum()
        mean = (share * places).sum()
        spreads.append(((places - mean).square() * share).sum().sqrt().item())
    return spreads[0], spreads[1]


class TestPreparation:
    @pytest.mark.parametrize(
        ("width", "height", "expected"),
        [
            (768, 256, (72, 216)),
            (256, 768, (216, 72)),
            (301, 101, (72, 216)),
            (97, 131, (144, 104)),
            # Beyond the table's ends, and smaller than what is trained on.
            (700, 100, (64, 256)),
            (60, 20, (72, 216)),
        ],
    )
    def test_a_circle_stays_a_circle(self, width, height, expected):
        radius = 0.4 * min(width, height)
        discs = pair(circle(width, height, radius), circle(width, height, radius, "#ccc"))
        encoded, _, pixels = encode(image_pairs([discs]), options(128))
        assert encoded.sizes[encoded.buckets[0]] == expected
        for image in pixels:
            assert tuple(image.shape[1:]) == expected
            high, wide = axes(image)
            # A disc's standard deviation along a line is half its radius; its edge is blurred by a pixel.
            scale = max(expected[0] / height, expected[1] / width)
            assert high == pytest.approx(radius * scale / 2, rel=0.03)
            assert wide == pytest.approx(high, rel=0.01)

    def test_both_images_of_a_pair_get_one_bucket_and_neither_is_stretched(self):
        discs = pair(circle(300, 100, 40), circle(100, 120, 25))
        encoded, _, pixels = encode(image_pairs([discs]), options(128))
        # Between 3:1 and 1:1.2 stands 1.58:1.
        assert encoded.sizes[encoded.buckets[0]] == (96, 160) or encoded.sizes[encoded.buckets[0]] == (104, 152)
        assert encoded[0]["latents/mean"].shape[2:] == tuple(side // 2 for side in encoded.sizes[encoded.buckets[0]])
        for image in pixels:
            high, wide = axes(image)
            assert wide == pytest.approx(high, rel=0.02)

    def test_without_buckets_images_are_cropped_to_the_square(self):
        encoded, _, pixels = encode(image_pairs([pair(noise(40, 20), noise(20, 40))]), options(16, enabled=False))
        assert encoded.sizes == [] and not encoded.buckets.any()
        assert {tuple(image.shape) for image in pixels} == {(3, 16, 16)}

    def test_random_crops_and_flips_in_buckets_are_functions_of_seed_and_row(self):
        pipeline = tiny.build("stable_diffusion_xl")
        rows = image_pairs([pair(noise(100, 40, seed), noise(90, 41, seed)) for seed in range(6)])
        chosen = options(64, crop="random", random_flip=True, seed=3)
        encoded, encoder, _ = encode(rows, chosen, pipeline)
        (height, width) = encoded.sizes[encoded.buckets[0]]
        flipped, crops = 0, set()
        for row in range(6):
            (across, down), flip = chosen.draw(row)
            time_ids = encoded[row]["sample/time_ids"]
            for index, (of_width, of_height) in enumerate([(100, 40), (90, 41)]):
                scale = max(width / of_width, height / of_height)
                spare = round(of_height * scale) - height, round(of_width * scale) - width
                left = round(spare[1] * across)
                top_left = [round(spare[0] * down), spare[1] - left if flip else left]
                assert time_ids[index].tolist() == [of_height, of_width, *top_left, height, width]
                crops.add(tuple(top_left))
            flipped += flip
        assert 0 < flipped < 6 and len(crops) > 6
        again, _, _ = encode(rows, chosen, pipeline)
        other, _, _ = encode(rows, options(64, crop="random", random_flip=True, seed=4), pipeline)
        assert all(torch.equal(again[row]["latents/mean"], encoded[row]["latents/mean"]) for row in range(6))
        assert not all(torch.equal(other[row]["latents/mean"], encoded[row]["latents/mean"]) for row in range(6))


# The first pair differs 4 times in shape, the second 1.5 times exactly, the third not at all.
SHAPES = [((80, 40), (40, 80)), ((60, 40), (40, 40)), ((40, 40), (41, 41))]


class TestRowsThatCannotBeUsed:
    @pytest.fixture
    def rows(self) -> Dataset:
        return image_pairs([pair(noise(*one), noise(*other, 1), f"row {n}") for n, (one, other) in enumerate(SHAPES)])

    @pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
    def test_pairs_of_different_shapes_raise_whatever_happens_to_bad_rows(self, rows, on_bad_row):
        policy = BadRowPolicy(on_bad_row, max_bad_share=1.0)
        with pytest.raises(
            ValueError, match="row 0, column 'chosen' and column 'rejected'.*80x40 and 40x80"
        ) as raised:
            encode(rows, options(on_aspect_difference="raise", policy=policy))
        message = str(raised.value)
        assert "row 1" not in message and "1 of 3 rows: 1 different shapes" in message
        assert "on_aspect_difference='skip'" in message and "on_bad_row" not in message

    @pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
    def test_they_are_skipped_and_counted_whatever_happens_to_bad_rows(self, rows, on_bad_row, caplog):
        policy = BadRowPolicy(on_bad_row, max_bad_share=0.0)
        with caplog.at_level(logging.WARNING, LOADED):
            encoded, _, _ = encode(rows, options(on_aspect_difference="skip", policy=policy))
        assert encoded.rows.tolist() == [1, 2] and encoded.left_out == {"different shapes": 1}
        assert "train_dataset: 1 of 3 rows are left out, 33.33% (1 different shapes)." in caplog.text

    def test_or_cropped_to_the_bucket_between_them(self, rows):
        encoded, _, pixels = encode(rows, options(on_aspect_difference="crop"))
        assert encoded.sizes[encoded.buckets[0]] == (64, 64) and len(encoded) == 3 and len(pixels) == 6

    def test_how_much_they_may_differ_is_an_option(self, rows):
        chosen = options(on_aspect_difference="skip", max_aspect_difference=4.0)
        assert len(encode(rows, chosen)[0]) == 3
        chosen = options(on_aspect_difference="skip", max_aspect_difference=1.49)
        assert encode(rows, chosen)[0].rows.tolist() == [2]

    def test_other_bad_rows_still_stop_beside_skipped_ones(self, rows):
        chosen = options(on_aspect_difference="skip", policy=BadRowPolicy("raise", min_image_side=41))
        with pytest.raises(ValueError, match="min_image_side is 41") as raised:
            encode(rows, chosen)
        assert "different shapes" not in str(raised.value)

    def test_a_data_set_of_which_nothing_is_left_raises(self, rows):
        with pytest.raises(ValueError, match="all 1 rows would be left out"):
            encode(rows.select([0]), options(on_aspect_difference="skip"))

    @pytest.mark.parametrize(
        ("size", "reason"),
        [
            ((7, 40), "column 'rejected': an image of 7x40 pixels; min_image_side is 8"),
            ((401, 50), "column 'rejected': an image of 401x50 pixels; max_aspect_ratio is 8"),
        ],
    )
    def test_small_and_thin_images_are_named_by_row_and_column(self, size, reason):
        rows = image_pairs([pair(noise(40, 40), noise(40, 40, 1)), pair(noise(40, 40), noise(*size))])
        with pytest.raises(ValueError, match=f"row 1, {reason}"):
            encode(rows, options(policy=BadRowPolicy(min_image_side=8)))

    def test_images_at_the_limits_are_used(self):
        rows = image_pairs([pair(noise(8, 40), noise(8, 64))])
        encoded, _, _ = encode(rows, options(policy=BadRowPolicy(min_image_side=8)))
        assert encoded.sizes[encoded.buckets[0]] == (128, 32)


class TestCropping:
    def test_the_report_has_each_image_s_share(self):
        shapes = [(16, 16), (16, 32)]
        # Widths and heights: the square loses half of 2:1 and nothing of itself, 32 x 16 loses half of a square.
        sizes = np.asarray([[(32, 16), (5, 5)], [(64, 32), (10, 10)], [(0, 0), (64, 32)], [(32, 16), (32, 16)]])
        report = cropping_report(sizes, np.asarray([0, 1, 0, 0]), shapes)
        assert (report.images, report.unknown, report.noteworthy, report.shapes) == (7, 1, 5, 2)
        assert report.mean_share == pytest.approx((0.5 + 0 + 0 + 0.5 + 0.5 + 0.5 + 0.5) / 7)
        assert report.largest_share == pytest.approx(0.5)
        assert cropping_report(np.zeros((2, 2, 2), dtype=np.int32), np.zeros(2, dtype=np.int16), shapes) is None

    def test_the_share_is_that_of_the_pixels_that_are_not_there(self):
        encoded, _, (pixels, _) = encode(
            image_pairs([pair(noise(50, 20), noise(50, 20, 1))]), options(20, enabled=False)
        )
        report = cropping_report(np.asarray([[(50, 20)]]), np.zeros(1, dtype=np.int16), [(20, 20)])
        assert report.largest_share == pytest.approx(1 - pixels[0].numel() / (50 * 20))
        assert (report.largest_size, report.largest_shape) == ((50, 20), (20, 20))

    def test_what_is_cropped_is_logged_once_and_as_a_warning_above_a_quarter(self, caplog):
        rows = image_pairs([pair(noise(80, 40), noise(80, 40, 1))])
        for enabled, level, share in ((False, logging.WARNING, "50.0%"), (True, logging.INFO, "0.0%")):
            caplog.clear()
            with caplog.at_level(logging.INFO, LOADED):
                encode(rows, options(64, enabled=enabled))
            (record,) = [record for record in caplog.records if "crop" in record.message]
            assert record.levelno == level and f"train_dataset: cropping removes {share} of an image" in record.message
            assert ("aspect_ratio_buckets=True" in record.message) is not enabled

    def test_the_log_does_not_advise_buckets_where_there_are_some(self, caplog):
        report = cropping_report(np.asarray([[(160, 20)]]), np.zeros(1, dtype=np.int16), [(32, 128), (64, 64)])
        with caplog.at_level(logging.INFO, LOADED):
            log_cropping(report, "eval_dataset")
        assert "aspect_ratio_buckets" not in caplog.text and "max_aspect_ratio" in caplog.text

"""Equal and similar pictures: hashes, and the search for close ones."""

import time

import numpy as np
import pytest
from helpers.pictures import encoded, picture
from PIL import Image

from trl_diffusion_pref.inspection.duplicates import close_hashes, in_both_orders, similar_pictures
from trl_diffusion_pref.inspection.sample_facts import Look, look_of, sample_facts


def flipped(value: int, bits) -> int:
    for bit in bits:
        value ^= 1 << int(bit)
    return value


@pytest.mark.parametrize("distance", [0, 1, 6, 11, 16])
def test_the_search_finds_what_comparing_all_hashes_finds(distance):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64).tolist()
    # Others at every distance, some equal.
    hashes += [flipped(hashes[index], rng.permutation(64)[: index % 20]) for index in range(200)]
    wanted = [
        [one, other]
        for other in range(len(hashes))
        for one in range(other)
        if (hashes[one] ^ hashes[other]).bit_count() <= distance
    ]
    assert len(wanted) >= 10
    assert close_hashes(np.asarray(hashes, dtype=np.uint64), distance).tolist() == sorted(wanted)


def test_a_hash_of_many_copies_is_found_with_each():
    hashes = np.asarray([7] * 50 + [6], dtype=np.uint64)
    assert len(close_hashes(hashes, 0)) == 50 * 49 / 2
    assert len(close_hashes(hashes, 1)) == 51 * 50 / 2


@pytest.mark.slow
def test_the_search_takes_seconds_for_half_a_million_hashes():
    hashes = np.random.default_rng(0).integers(0, 2**64, 500_000, dtype=np.uint64)
    start = time.process_time()
    close_hashes(hashes, 6)
    assert time.process_time() - start < 30


COPIES = {
    "jpeg": lambda image: encoded(image, "JPEG", quality=60),
    "smaller": lambda image: encoded(image.resize((50, 50))),
    "larger": lambda image: encoded(image.resize((200, 200)), "JPEG", quality=80),
    "webp": lambda image: encoded(image, "WEBP", quality=70),
    "stretched": lambda image: encoded(image.resize((110, 90))),
    "a little brighter": lambda image: encoded(image.point(lambda value: min(value + 5, 255))),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_copies_of_a_picture_are_similar_to_it(copy):
    for seed in range(8):
        image = picture(seed)
        looks = [sample_facts(data).look for data in (encoded(image), copy(image), encoded(picture(100 + seed)))]
        groups = similar_pictures(looks, 6)
        assert [groups.find(number) for number in range(3)] == [0, 0, 2]


def test_another_colour_is_another_picture():
    image = picture(0)
    red, green, blue = image.split()
    turned = Image.merge("RGB", (green, blue, red))
    looks = [look_of(image), Look(look_of(image).hash, look_of(turned).colours)]
    groups = similar_pictures(looks, 6)
    assert groups.find(1) == 1


def test_pictures_of_one_colour_have_no_hash():
    assert look_of(Image.new("RGB", (64, 64), (0, 0, 0))).hash is None
    assert sample_facts(encoded(Image.new("RGB", (64, 64), (250, 250, 250)), "JPEG")).look.hash is None


def test_the_hash_is_that_of_scipys_cosine_transform():
    scipy_fft = pytest.importorskip("scipy.fft")
    image = picture(3, side=32)
    lowest = scipy_fft.dctn(np.asarray(image.convert("L"), dtype=np.float64), type=2)[:8, :8].reshape(-1)
    bits = lowest > np.median(lowest[1:])
    assert look_of(image).hash == int("".join(str(int(bit)) for bit in bits), 2)


def test_both_orders_count_only_under_the_same_prompt():
    pairs = [("a", 1, 2), ("a", 2, 1), ("b", 2, 1), ("a", 1, 2), ("c", 3, 4), ("c", 3, 4)]
    assert in_both_orders(pairs) == [[0, 1, 3]]

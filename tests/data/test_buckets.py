"""Sizes of buckets, which one a row gets, and batches of one bucket each."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN

from trl_diffusion_pref.data.buckets import BucketBatchSampler, BucketOptions, aspect_differences, assign, bucket_sizes


# arXiv 2307.01952, appendix I: heights and widths.
SDXL = [
    *[(512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600)],
    *[(640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152)],
    *[(896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896)],
    *[(1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640)],
    *[(1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512)],
]


class TestSizes:
    def test_at_1024_pixels_they_are_sdxl_s_table_and_1344x704(self):
        assert len(SDXL) == 40
        assert sorted(bucket_sizes(1024, 8)) == sorted([*SDXL, (1344, 704)])

    def test_at_1024_pixels_pixart_s_sizes_are_among_them(self):
        sizes = {(int(height), int(width)) for height, width in ASPECT_RATIO_1024_BIN.values()}
        assert len(sizes) == 33 and sizes < {*bucket_sizes(1024, 8)}

    @pytest.mark.parametrize(
        ("resolution", "step"), [(512, 8), (512, 32), (768, 16), (1000, 8), (1024, 32), (1328, 16), (16, 2), (64, 16)]
    )
    def test_sides_are_multiples_and_areas_about_the_square_s(self, resolution, step):
        sizes = bucket_sizes(resolution, step)
        assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes) > 4
        assert {(width, height) for height, width in sizes} == set(sizes)
        assert [width / height for height, width in sizes] == sorted(width / height for height, width in sizes)
        for height, width in sizes:
            assert height % step == width % step == 0
            assert 0.9 * resolution**2 <= height * width <= resolution**2
            assert max(height, width) <= 4 * min(height, width)

    def test_a_model_s_largest_side_leaves_out_those_beyond(self):
        assert bucket_sizes(1024, 16, 1536) == [size for size in bucket_sizes(1024, 16) if max(size) <= 1536]
        assert bucket_sizes(32, 16, 32) == [(32, 32)]


class TestAssignment:
    @pytest.mark.parametrize(
        ("sizes", "height", "width"),
        [
            ([(1024, 1024), (300, 300)], 1024, 1024),
            ([(1920, 1080), (1920, 1080)], 768, 1344),
            ([(1080, 1920), (720, 1280)], 1344, 768),
            # 3:2 beside 2:3 is a square between them, 4:1 beside a square is 2:1.
            ([(1500, 1000), (1000, 1500)], 1024, 1024),
            ([(4000, 1000), (700, 700)], 704, 1408),
            # Of the arithmetic mean, 2.5, it would be 640x1600.
            ([(8000, 1000), (3000, 1000), (301, 100)], 512, 2048),
            ([(9000, 1000), (1000, 9000)], 1024, 1024),
            # Beyond the table's ends.
            ([(8000, 1000)], 512, 2048),
            ([(1, 8)], 2048, 512),
        ],
    )
    def test_a_row_gets_the_bucket_nearest_to_its_samples_mean_shape(self, sizes, height, width):
        table = bucket_sizes(1024, 8)
        (bucket,) = assign(np.asarray([sizes], dtype=np.int32), table)
        assert table[bucket] == (height, width)

    def test_differences_of_shape_do_not_depend_on_the_order(self):
        sizes = np.asarray([[(300, 200), (200, 200)], [(200, 200), (300, 200)], [(200, 300), (300, 200)]])
        assert aspect_differences(sizes).tolist() == pytest.approx([1.5, 1.5, 2.25])

    @pytest.mark.parametrize(
        "options",
        [{"max_aspect_difference": 0.9}, {"max_aspect_difference": math.nan}, {"on_aspect_difference": "stretch"}],
    )
    def test_options_that_cannot_be_used_are_errors(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            BucketOptions(True, **options)


def of_processes(buckets, size: int, count: int, epoch: int = 0, **options) -> list[list[list[int]]]:
    """Each process's batches."""
    samplers = [BucketBatchSampler(np.asarray(buckets), size, (index, count), **options) for index in range(count)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in samplers]
    assert [len(own) for own in batches] == [len(sampler) for sampler in samplers]
    return batches


def cases():
    """Buckets of rows, batch sizes and numbers of processes."""
    rng = np.random.default_rng(0)
    for number in range(60):
        rows = int(rng.integers(1, 40))
        yield rng.integers(0, rng.integers(1, 7), rows).astype(np.int16), int(rng.integers(1, 6)), number % 4 + 1


class TestBatches:
    @pytest.mark.parametrize("seed", [None, 7])
    def test_each_row_is_in_one_batch_of_one_bucket_and_one_process(self, seed):
        for buckets, size, count in cases():
            processes = of_processes(buckets, size, count, seed=seed)
            assert len({len(own) for own in processes}) == 1
            batches = [batch for own in processes for batch in own]
            assert all(0 < len(batch) <= size and len(set(buckets[batch])) == 1 for batch in batches)
            times = Counter(row for batch in batches for row in batch)
            assert sorted(times) == list(range(len(buckets)))
            repeated = sum(times.values()) - len(buckets)
            # Only where no batch can be halved, and no more than needed.
            assert not repeated or (repeated < count and max(map(len, batches)) == 1)

    def test_drop_last_leaves_out_only_what_makes_no_whole_batch_for_all(self):
        for buckets, size, count in cases():
            whole = sum(np.unique(buckets, return_counts=True)[1] // size)
            if whole < count:
                with pytest.raises(ValueError, match="dataloader_drop_last=False"):
                    of_processes(buckets, size, count, seed=1, drop_last=True)
                continue
            processes = of_processes(buckets, size, count, seed=1, drop_last=True)
            rows = [row for own in processes for batch in own for row in batch]
            assert all(len(batch) == size for own in processes for batch in own)
            assert len(set(rows)) == len(rows) == whole // count * count * size

    def test_what_is_halved_repeated_or_dropped_changes_with_the_epoch(self):
        alone = np.asarray([0, 1, 2, 3, 4])
        repeated = {
            Counter(row for own in of_processes(alone, 1, 2, epoch, seed=3) for (row,) in own).most_common(1)[0][0]
            for epoch in range(30)
        }
        assert repeated == set(range(5))
        thirds = np.repeat([0, 1, 2], 4)
        for drop_last in (False, True):
            less = {
                bucket
                for epoch in range(30)
                for bucket in range(3)
                if sorted(
                    len(batch)
                    for own in of_processes(thirds, 4, 2, epoch, seed=3, drop_last=drop_last)
                    for batch in own
                    if thirds[batch[0]] == bucket
                )
                != [4]
            }
            assert less == {0, 1, 2}

    def test_the_order_depends_on_seed_and_epoch_alone(self):
        buckets = np.repeat([0, 1, 2], 20)
        first = of_processes(buckets, 4, 1, seed=5)
        assert first == of_processes(buckets, 4, 1, seed=5)
        orders = [first, of_processes(buckets, 4, 1, 1, seed=5), of_processes(buckets, 4, 1, seed=6)]
        members = [{frozenset(batch) for batch in own} for (own,) in orders]
        for index, other in ((0, 1), (0, 2), (1, 2)):
            assert orders[index] != orders[other] and not members[index] & members[other]
        # Buckets are mixed: in order there would be two changes from one batch to the next.
        of_batches = [buckets[batch[0]] for batch in first[0]]
        assert sum(one != other for one, other in zip(of_batches, of_batches[1:], strict=False)) > 4

    def test_without_a_seed_rows_stay_in_order_within_their_bucket(self):
        assert of_processes([1, 0, 1, 0, 1], 2, 1, seed=None) == [[[1, 3], [0, 2], [4]]]

    def test_rows_whose_bucket_never_fills_a_batch_are_counted(self):
        buckets = np.asarray([0] * 8 + [1] * 3 + [2] * 4)
        assert BucketBatchSampler(buckets, 4, (0, 1), seed=0, drop_last=True).never_used == 3
        assert BucketBatchSampler(buckets, 4, (0, 1), seed=0).never_used == 0

    def test_a_loader_resumed_in_the_middle_gives_the_rest(self):
        sampler = BucketBatchSampler(np.repeat([0, 1], [9, 6]), 2, (0, 1), seed=4)
        sampler.set_epoch(2)
        loader = torch.utils.data.DataLoader(range(15), batch_sampler=sampler, collate_fn=list)
        batches = list(loader)
        rest = skip_first_batches(loader, 3)
        assert list(rest) == batches[3:] and len(rest) == len(batches) - 3

"""What encoding takes: computed from shapes, compared with closed forms and with files that the real writer wrote."""

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.pipelines import build_tiny_pipeline

from trl_diffusion_pref import MaPOConfig, encode_dataset
from trl_diffusion_pref.data import PAIRS, EncodingOptions, Layout
from trl_diffusion_pref.data import costs as module
from trl_diffusion_pref.data.cache import row_bytes
from trl_diffusion_pref.data.costs import encoding_costs, text_flops, vae_flops
from trl_diffusion_pref.data.options import as_stored
from trl_diffusion_pref.data.shards import as_keys, key_of, write_shard
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.families.published_sizes import PUBLISHED, published_pipeline
from trl_diffusion_pref.shapes import preference_pairs


SD_1_5, SDXL, SD_3_5, FLUX = PUBLISHED


@pytest.fixture(scope="module")
def published():
    return {name: published_pipeline(name) for name in PUBLISHED}


@pytest.fixture
def no_operations(monkeypatch):
    """Leaves out what takes seconds to count."""
    monkeypatch.setattr(module, "vae_flops", lambda *args: 0)
    monkeypatch.setattr(module, "text_flops", lambda *args: {})


def costs(pipeline, **options):
    return encoding_costs(pipeline, family_for(pipeline), EncodingOptions(**options))


@pytest.mark.parametrize(
    ("name", "channels", "at_most"), [(SDXL, 4, 0.53e6), (FLUX, 16, 2.11e6)], ids=["SDXL", "Flux"]
)
@pytest.mark.parametrize("keep_std", [True, False], ids=["sample", "mean"])
def test_files_of_pairs_at_1024_px_are_as_large_as_computed(
    name, channels, at_most, keep_std, published, no_operations, tmp_path
):
    rows = []
    for _ in range(8):
        parts = ("latents/mean", "latents/std")[: 1 + keep_std]
        row = {part: as_stored(torch.randn(2, channels, 128, 128), torch.float16) for part in parts}
        rows.append(row | ({"sample/time_ids": torch.zeros(2, 6)} if name == SDXL else {}))
    size = write_shard(tmp_path, as_keys(key_of(row) for row in range(8)), rows).stat().st_size / 8
    computed = costs(published[name], keep_std=keep_std).row_bytes
    # Two images' mean, and deviation, of 16-bit numbers; for SDXL six sizes each.
    assert computed == 2 * (1 + keep_std) * channels * 128**2 * 2 + (2 * 6 * 4 if name == SDXL else 0)
    assert computed <= size <= 1.001 * computed
    assert size <= at_most / (1 if keep_std else 2)


@pytest.mark.parametrize(("name", "gigabytes"), [(SD_1_5, 119), (SDXL, 465), (SD_3_5, 1947), (FLUX, 2033)])
def test_pick_a_pic_takes_the_room_that_the_docs_say(name, gigabytes, published, no_operations):
    total = costs(published[name]).of(851_293, 58_960)
    assert round((total.row_bytes + total.prompt_bytes) / 1e9) == gigabytes


def test_operations_of_t5_xxl_are_those_of_its_matrices(published):
    """24 layers of four attention matrices and three of the gated feed-forward net, and attention itself."""
    tokens, width, inner, layers = 512, 4096, 10240, 24
    matrices = 2 * tokens * (4 * width * width + 3 * width * inner)
    attention = 2 * 2 * tokens**2 * width
    counted = text_flops(published[FLUX], family_for(published[FLUX]))["text_encoder_2"]
    assert counted == layers * (matrices + attention)


def test_operations_of_the_vae_are_those_of_its_convolutions_and_attention(published):
    """Four times the pixels are four times the convolutions and sixteen times the attention's scores."""
    sdxl = published[SDXL]
    small, large = (vae_flops(sdxl, family_for(sdxl), (3, side, side)) for side in (512, 1024))
    scores = 2 * 2 * (64 * 64) ** 2 * 512
    assert large - 16 * scores == 4 * (small - scores)
    first = 2 * 512 * 512 * 128 * 3 * 9
    assert first < small and 0.80e12 < small < 1.13e12 and 4.87e12 < large < 6.8e12


def test_a_loaded_pipeline_is_counted_as_one_without_weights_and_stays_as_it_is():
    pipeline = build_tiny_pipeline()
    with torch.device("meta"):
        empty = build_tiny_pipeline()
    assert costs(pipeline) == costs(empty) and costs(pipeline).sample_flops > 0
    pipeline.vae.to(torch.bfloat16)
    assert costs(pipeline).sample_flops == costs(empty).sample_flops
    assert pipeline.vae.dtype == torch.bfloat16
    assert not any(parameter.is_meta for parameter in pipeline.vae.parameters())


@pytest.mark.parametrize("name", tiny.marked(tiny.CASES))
def test_every_family_s_costs_can_be_told(name):
    pipeline = tiny.build(name)
    found = costs(pipeline)
    assert found.row_bytes > 0 and found.prompt_bytes > 0 and found.sample_flops > 0 and found.prompt_flops > 0


def test_bytes_of_condition_images_and_rankings_are_counted():
    options = EncodingOptions()
    pair = row_bytes((4, 8, 8), {}, {}, PAIRS, options, torch.float32)
    edited = row_bytes((4, 8, 8), {}, {"source": (4, 8, 16)}, Layout(("image",)), options, torch.float32)
    ranking = row_bytes((4, 8, 8), {}, {}, Layout(("images",), samples_per_cell=3), options, torch.float32)
    assert (pair, edited, ranking) == (4 * 512, 4 * 512, 6 * 512)


def test_a_row_s_memory_is_that_of_its_arrays(tmp_path):
    cfg = MaPOConfig(output_dir=str(tmp_path), dataset_cache_dir=str(tmp_path))
    encoded = encode_dataset(build_tiny_pipeline(), preference_pairs(16), cfg)
    arrays = [encoded.rows, encoded.places, encoded.captions, encoded.buckets]
    arrays += [encoded.samples.keys, encoded.samples._places, *(shard.keys for shard in encoded.samples._shards)]
    taken = sum(array.nbytes for array in arrays) / 16 + np.dtype(encoded.first_captions.dtype).itemsize
    assert costs(build_tiny_pipeline()).row_memory == taken

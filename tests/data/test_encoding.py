import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.encoding import Rows, encode_rows, encoder_of
from helpers.pipelines import RESOLUTION, build_tiny_pipeline, image_pairs, png
from PIL import Image

from trl_diffusion_pref.data import PAIRS, EncodingOptions, Layout, encode_prompt_table, on_device
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.shapes import preference_pairs


FULL = EncodingOptions(resolution=RESOLUTION, cache_dtype="float32")


def encode(dataset, pipeline, cache, **options) -> Rows:
    options = EncodingOptions(**{"resolution": RESOLUTION, **options})
    return encode_rows(
        dataset, pipeline, family_for(pipeline), options, what="train_dataset", cache_folder=cache, batch_size=3
    )


class CountedCalls:
    """Counts the samples that a module's method sees."""

    def __init__(self, monkeypatch, module, method):
        self.samples, original = 0, getattr(module, method)

        def counted(batch, *args, **kwargs):
            self.samples += len(batch)
            return original(batch, *args, **kwargs)

        monkeypatch.setattr(module, method, counted)


def noise_image(seed: int, size: tuple[int, int] = (RESOLUTION, RESOLUTION)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def test_encoded_posterior_is_the_vae_s(tiny_pipeline, tmp_path):
    dataset = preference_pairs(4)
    encoded = encode(dataset, tiny_pipeline, tmp_path)
    assert [int(row["row"]) for row in encoded] == [0, 1, 2, 3]
    for row in (0, 3):
        for column in ("chosen", "rejected"):
            image = dataset[row][column].resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
            with torch.inference_mode():
                posterior = tiny_pipeline.vae.encode(pixels).latent_dist
            torch.testing.assert_close(encoded[row][f"{column}_mean"], posterior.mean[0] * 0.7, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(encoded[row][f"{column}_std"], posterior.std[0] * 0.7, rtol=1e-4, atol=1e-5)


def test_each_image_is_encoded_once_and_found_again(tiny_pipeline, tmp_path, monkeypatch):
    calls = CountedCalls(monkeypatch, tiny_pipeline.vae, "encode")
    first = encode(preference_pairs(7), tiny_pipeline, tmp_path)
    probe = 1  # one call asks for the latents' shape
    assert calls.samples == 2 * 7 + probe
    again = encode(preference_pairs(7), tiny_pipeline, tmp_path)
    assert calls.samples == 2 * 7 + 2 * probe
    assert torch.equal(first[6]["chosen_mean"], again[6]["chosen_mean"])


@pytest.mark.parametrize("change", ["weights", "resolution", "crop", "rows"])
def test_the_cache_is_not_used_for_anything_else(change, tiny_pipeline, tmp_path, monkeypatch):
    encode(preference_pairs(2), tiny_pipeline, tmp_path)
    pipeline = build_tiny_pipeline(seed=1) if change == "weights" else tiny_pipeline
    calls = CountedCalls(monkeypatch, pipeline.vae, "encode")
    options = {"resolution": {"resolution": 8}, "crop": {"crop": "random"}}.get(change, {})
    encode(preference_pairs(2, seed=3 if change == "rows" else 0), pipeline, tmp_path, **options)
    assert calls.samples == 2 * 2 + 1


def test_an_image_file_that_changed_is_encoded_again(tiny_pipeline, tmp_path):
    noise_image(0).save(tmp_path / "a.png")
    noise_image(1).save(tmp_path / "b.png")
    dataset = Dataset.from_dict(
        {"prompt": ["a"], "chosen": [str(tmp_path / "a.png")], "rejected": [str(tmp_path / "b.png")]}
    )
    before = encode(dataset, tiny_pipeline, tmp_path)[0]["chosen_mean"]
    noise_image(2).save(tmp_path / "a.png")
    assert not torch.equal(encode(dataset, tiny_pipeline, tmp_path)[0]["chosen_mean"], before)


@pytest.mark.parametrize("part", ["rows", "prompts"])
def test_a_disk_without_room_is_refused_before_encoding_and_what_is_there_is_found(
    part, tiny_pipeline, tmp_path, monkeypatch
):
    rows = image_pairs([(f"prompt {i}", png(noise_image(2 * i)), png(noise_image(2 * i + 1))) for i in range(3)])

    def write():
        if part == "rows":
            return encode(rows, tiny_pipeline, tmp_path)
        family = family_for(tiny_pipeline)
        return encode_prompt_table(rows["prompt"], tiny_pipeline, family, cache_folder=tmp_path, batch_size=2)

    # Two images' mean and deviation, of 4 x 8 x 8 numbers; four prompts with the empty one, of 16 x 32 in float16.
    needed = {"rows": 3 * 2 * 2 * 4 * 8 * 8 * 4, "prompts": 4 * 16 * 32 * 2}[part]
    if part == "rows":
        encoder_of(tiny_pipeline, family_for(tiny_pipeline), FULL, cache_folder=tmp_path).add_prompts([rows])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    with pytest.raises(ValueError, match=f"would take .*, and {tmp_path} has .* free. Set dataset_cache_dir"):
        write()
    assert not list(tmp_path.glob(f"{'samples' if part == 'rows' else part}-*/*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
    write()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    write()


def test_the_seed_matters_to_the_cache_for_random_crops_only(tiny_pipeline, tmp_path, monkeypatch):
    encode(preference_pairs(2), tiny_pipeline, tmp_path)
    calls = CountedCalls(monkeypatch, tiny_pipeline.vae, "encode")
    encode(preference_pairs(2), tiny_pipeline, tmp_path, seed=5)
    assert calls.samples == 1
    for seed in (1, 2):
        encode(preference_pairs(2), tiny_pipeline, tmp_path, seed=seed, crop="random")
    assert calls.samples == 1 + 2 * (1 + 4)


def test_each_distinct_prompt_is_encoded_once(tiny_pipeline, tmp_path, monkeypatch):
    family = family_for(tiny_pipeline)
    prompts = ["a red circle", "a blue square", "a red circle"] * 5
    seen = []
    original = tiny_pipeline.encode_prompt
    monkeypatch.setattr(
        tiny_pipeline,
        "encode_prompt",
        lambda batch, *device, **options: (seen.extend(batch), original(batch, *device, **options))[1],
    )
    where = {"cache_folder": tmp_path, "batch_size": 2, "options": FULL}
    table = encode_prompt_table(prompts, tiny_pipeline, family, **where)
    assert sorted(seen) == ["", "a blue square", "a red circle"]
    looked_up = table(["a blue square", "a red circle", "a blue square"])["prompt_embeds"]
    direct = family.encode_prompts(tiny_pipeline, ["a blue square", "a red circle", "a blue square"])["prompt_embeds"]
    torch.testing.assert_close(looked_up, direct, rtol=1e-5, atol=1e-6)
    seen.clear()
    encode_prompt_table(prompts, tiny_pipeline, family, **where)
    assert seen == [""]  # it gives the shape


def test_both_images_of_a_pair_share_crop_and_flip(tiny_pipeline, tmp_path):
    """Sameness of preparation shows where both images are the same but for one pixel in a corner that is cut."""
    wide = noise_image(0, (4 * RESOLUTION, RESOLUTION))
    touched = wide.copy()
    touched.putpixel((0, 0), (0, 0, 0))
    rows = [("a", png(wide), png(touched))] * 12
    encoded = encode(image_pairs(rows), tiny_pipeline, tmp_path, crop="random", random_flip=True)
    means = [encoded[row]["chosen_mean"] for row in range(12)]
    same = [torch.equal(encoded[row]["rejected_mean"], means[row]) for row in range(12)]
    assert sum(same) >= 10  # a crop at the very left shows the touched pixel
    assert len({mean.numpy().tobytes() for mean in means}) >= 8  # rows differ in place and orientation


def test_files_that_are_equal_are_no_preference_at_any_crop(tiny_pipeline, tmp_path):
    wide = noise_image(0, (4 * RESOLUTION, RESOLUTION))
    rows = image_pairs([("a", png(wide), png(wide))])
    with pytest.raises(ValueError, match="row 0, .*what is used of them is the same image"):
        encode(rows, tiny_pipeline, tmp_path, crop="random")


def test_images_that_differ_only_where_the_centre_crop_never_looks_are_no_preference(tiny_pipeline, tmp_path):
    wide = noise_image(0, (4 * RESOLUTION, RESOLUTION))
    touched = wide.copy()
    touched.putpixel((0, 0), (0, 0, 0))
    rows = image_pairs([("a", png(wide), png(touched))])
    with pytest.raises(ValueError, match="row 0, .*what is used of them is the same image"):
        encode(rows, tiny_pipeline, tmp_path)


def test_images_of_different_sizes_are_accepted(tiny_pipeline, tmp_path):
    rows = [("a", png(noise_image(0, (40, 20))), png(noise_image(1, (15, 33))))]
    assert encode(image_pairs(rows), tiny_pipeline, tmp_path)[0]["chosen_mean"].shape == (4, 8, 8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("a", None, png(noise_image(1))), "row 2, column 'chosen': the image is None"),
        (("a", png(noise_image(1)), {"bytes": b"xx", "path": None}), "row 2, column 'rejected': the bytes are not an"),
        (
            ("a", {"bytes": png(noise_image(1, (64, 64)))["bytes"][:900], "path": None}, png(noise_image(2))),
            "row 2, column 'chosen': the image cannot be decoded",
        ),
        (
            ("a", png(noise_image(1)), png(noise_image(1))),
            "row 2, columns 'chosen' and 'rejected': what is used of them is the same image",
        ),
        (("", png(noise_image(1)), png(noise_image(2))), "row 2, column 'prompt': is empty"),
        ((None, png(noise_image(1)), png(noise_image(2))), "row 2, column 'prompt': is None"),
    ],
)
def test_unusable_rows_are_named_and_nothing_is_left_in_the_cache(bad, message, tiny_pipeline, tmp_path):
    good = [("a", png(noise_image(2 * i)), png(noise_image(2 * i + 1))) for i in range(4)]
    with pytest.raises(ValueError, match=message):
        encode(image_pairs([*good[:2], bad, *good[2:]]), tiny_pipeline, tmp_path)
    assert list(tmp_path.glob("samples-*/*")) == []


def test_a_vae_that_gives_nan_is_named_with_row_and_column(tiny_pipeline, tmp_path):
    with torch.no_grad():
        tiny_pipeline.vae.quant_conv.bias[0] = float("nan")
    with pytest.raises(
        ValueError, match="row 0, column 'chosen': the AutoencoderKL gives NaN or infinity, in float32 too"
    ):
        encode(preference_pairs(2), tiny_pipeline, tmp_path)


def test_a_streamed_data_set_gives_the_same_batches(tiny_pipeline, tmp_path):
    dataset, family = preference_pairs(5), family_for(tiny_pipeline)
    encoder = encoder_of(tiny_pipeline, family, FULL, cache_folder=tmp_path)
    encoder.add_prompts([dataset])
    stored = encoder.encode(dataset, "train_dataset")
    streamed = encoder.encode(dataset.to_iterable_dataset(), "train_dataset")
    batch = encoder.collator([stored[i] for i in range(5)])
    (other,) = streamed.evaluation_batches(5, process=(0, 1))
    assert batch.keys() == other.keys() and batch["latents"].keys() == {"mean", "std"}
    assert "prompt_embeds" in batch["prompts"]
    torch.testing.assert_close(other, batch, rtol=1e-4, atol=1e-5)


def test_all_bad_rows_are_named_in_one_run(tiny_pipeline, tmp_path, monkeypatch):
    """Batches of three: rows 2 and 10 are in different ones, and no row is encoded after the first bad one."""
    rows = [("a", png(noise_image(2 * i)), png(noise_image(2 * i + 1))) for i in range(12)]
    rows[2] = ("a", None, png(noise_image(1)))
    rows[10] = ("a", png(noise_image(1)), {"bytes": b"xx", "path": None})
    calls = CountedCalls(monkeypatch, tiny_pipeline.vae, "encode")
    with pytest.raises(ValueError, match="(?s)row 2, column 'chosen': the image is None.*row 10, column 'rejected'"):
        encode(image_pairs(rows), tiny_pipeline, tmp_path)
    assert calls.samples == 1
    assert list(tmp_path.glob("samples-*/*")) == []


def test_a_condition_image_is_encoded_once_per_row(tiny_pipeline, tmp_path):
    layout = Layout(samples=("chosen", "rejected"), conditions=("source",), scalars=("score",))
    dataset = preference_pairs(3).map(lambda row, i: {"source": row["chosen"], "score": i / 2}, with_indices=True)
    rows = encode_rows(
        dataset, tiny_pipeline, family_for(tiny_pipeline), EncodingOptions(RESOLUTION), layout=layout, batch_size=2
    )
    for index, row in enumerate(rows):
        torch.testing.assert_close(row["condition/source"], row["chosen_mean"])
        assert row["scalar/score"] == index / 2


def test_encoders_go_back_where_they_were(tiny_pipeline):
    tiny_pipeline.vae.train()
    with on_device(tiny_pipeline, family_for(tiny_pipeline), torch.device("cpu")):
        assert not tiny_pipeline.vae.training
    assert tiny_pipeline.vae.training and tiny_pipeline.vae.device.type == "cpu"


def test_an_optional_column_that_is_absent_changes_no_key(tiny_pipeline, tmp_path, monkeypatch):
    encode(preference_pairs(3), tiny_pipeline, tmp_path)
    calls = CountedCalls(monkeypatch, tiny_pipeline.vae, "encode")
    layout = replace(PAIRS, optional_scalars=("soft_label",))
    options = EncodingOptions(resolution=RESOLUTION)
    family = family_for(tiny_pipeline)
    encode_rows(preference_pairs(3), tiny_pipeline, family, options, layout=layout, cache_folder=tmp_path)
    assert calls.samples == 1, "only the latents' shape is asked for"


def test_the_latents_shape_is_found_while_the_encoders_are_on_the_device(tiny_pipeline, tmp_path, monkeypatch):
    """Also of rows without samples: on a CPU the VAE takes minutes for one video."""
    family, device = family_for(tiny_pipeline), torch.device("cpu")
    encoder = encoder_of(tiny_pipeline, family, EncodingOptions(), layout=Layout(), cache_folder=tmp_path)
    encoder.encode_all(Dataset.from_dict({"prompt": ["a cat"]}), None, device)
    monkeypatch.setattr(tiny_pipeline.vae, "encode", None)
    assert encoder.latent_shape == (4, 8, 8)


def test_encoders_stay_where_they_are_for_data_that_are_encoded(tiny_pipeline, tmp_path, monkeypatch):
    family, device = family_for(tiny_pipeline), torch.device("cpu")
    encoder = encoder_of(tiny_pipeline, family, EncodingOptions(RESOLUTION), cache_folder=tmp_path)
    _, encoded = encoder.encode_all(None, {"a": preference_pairs(2)}, device)
    monkeypatch.setattr(tiny_pipeline.text_encoder, "to", None)
    assert encoder.encode_all(None, encoded, device) == (None, encoded)

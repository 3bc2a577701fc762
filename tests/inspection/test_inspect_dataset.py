"""Inspecting other things than pairs of images, and what a model makes of the data."""

import hashlib
import io
import json
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, List, Value
from helpers import tiny
from helpers.encoding import encode_rows
from helpers.layout_files import (
    AUDIO,
    IMAGES,
    LAYOUTS,
    cell,
    image_reward_db,
    images_with_scores,
    jpeg,
    write_table,
    write_tar,
)
from helpers.media import frames, noise, wav
from helpers.pictures import encoded, picture
from helpers.pipelines import build_tiny_pipeline
from safetensors import safe_open

from trl_diffusion_pref import DatasetInspection, inspect_dataset, load_pairs
from trl_diffusion_pref.data import PAIRS, EncodingOptions
from trl_diffusion_pref.data.preparation import preparation_for
from trl_diffusion_pref.data.prompts import cut_prompts
from trl_diffusion_pref.data.samples import SampleEncoder
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.families.published_sizes import published_pipeline
from trl_diffusion_pref.inspection.model import InspectedModel


def pairs(count: int = 4, prompt: str = "a red circle") -> list[dict]:
    return [
        {
            "prompt": f"{prompt} {row}",
            "chosen": encoded(picture(2 * row, 32)),
            "rejected": encoded(picture(2 * row + 1, 32)),
        }
        for row in range(count)
    ]


# ---- Layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_inspected_as_it_is_loaded(name, tmp_path):
    write, known = LAYOUTS[name]
    source = write(tmp_path / "data")
    found, loaded = inspect_dataset(source, max_aspect_ratio=100), load_pairs(source)
    assert found.content == "pairs" and found.pairs.pairs == len(loaded) == 8
    assert found.prompts.distinct == 8
    if known is IMAGES:
        conditions = 8 * (name == "edit_reward")
        assert (found.bad_rows.count, found.samples.count) == (0, 16 + conditions)
        assert (found.duplicates.equal.count, found.duplicates.contradictory_pairs.count) == (0, 0)
    elif known is AUDIO:
        assert (found.samples.kind, found.samples.count, found.bad_rows.count) == ("audio", 16, 0)
    else:
        # The videos are only the beginnings of files.
        assert (found.bad_rows.count, found.bad_rows.kinds) == (8, {"damaged": 8})


def files_of(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", [images_with_scores, image_reward_db])
def test_rankings_are_not_copied_beside_a_saved_data_set(write, tmp_path):
    Dataset.from_parquet(str(write(tmp_path / "data"))).save_to_disk(tmp_path / "saved")
    before = files_of(tmp_path)
    for ranking_pairs, count, samples in (("best_worst", 8, 16), ("all", 24, 24), ("adjacent", 16, 24)):
        found = inspect_dataset(tmp_path / "saved", ranking_pairs=ranking_pairs, contact_sheet=None)
        assert (found.pairs.pairs, found.samples.count, found.duplicates.equal.count) == (count, samples, 0)
    assert files_of(tmp_path) == before


def test_a_bad_sample_of_a_ranking_is_named_by_its_number(tmp_path):
    images = [cell(jpeg(1)), cell(b"damaged"), cell(jpeg(2)), cell(b"not read")]
    rows = [{"prompt": "p", "images": images, "scores": [1.0, 3.0, 0.0, 0.5]}]
    types = Features({"prompt": Value("string"), "images": List(Image()), "scores": List(Value("float64"))})
    found = inspect_dataset(Dataset.from_list(rows, features=types))
    assert [problem["place"] for problem in found.bad_rows.examples] == ["column 'images', number 1"]


def test_a_ranking_in_several_rows_cannot_be_streamed(tmp_path):
    with pytest.raises(ValueError, match="is a stream in the layout ImageRewardDB, .* Load the data set without"):
        inspect_dataset(image_reward_db(tmp_path), streaming=True)


def test_prompts_alone_are_measured(tmp_path):
    path = write_table(tmp_path / "a.jsonl", [{"prompt": text} for text in ("one", "one", "two words")])
    for streaming in (False, True):
        found = inspect_dataset(path, streaming=streaming)
        assert (found.content, found.rows, found.samples, found.duplicates) == ("prompts", 3, None, None)
        assert (found.prompts.distinct, found.prompts.most_repeated) == (2, {"one": 2})
        assert "prompts alone" in str(found)


def test_single_images_with_prompts_are_inspected(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number % 2)))
    rows = [{"prompt": f"p{number}", "image": f"{number}.png"} for number in range(4)]
    sheet = tmp_path / "sheet.png"
    for streaming in (False, True):
        found = inspect_dataset(write_table(tmp_path / "a.jsonl", rows), streaming=streaming, contact_sheet=sheet)
        assert (found.content, found.samples.count, found.pairs) == ("samples", 3, None)
        assert found.duplicates.equal.examples == [["row 0, column 'image'", "row 2, column 'image'"]]
        assert found.bad_rows.kinds == {"missing file": 1} and found.contact_sheet == str(sheet)


def test_columns_without_a_layout_are_reported_with_the_nearest(tmp_path):
    rows = [{"caption": "p", "label_0": 1.0, "are_different": True}]
    found = inspect_dataset(write_table(tmp_path / "a.parquet", rows), contact_sheet=tmp_path / "a.png")
    assert (found.content, found.layout, found.rows, found.prompts) == ("unknown", None, 1, None)
    assert "lacks the columns jpg_0, jpg_1. This is Pick-a-Pic's variant without images" in found.layout_problem
    assert "Pick-a-Pic's variant without" in " ".join(str(found).split())
    assert list(found.columns.items())[0] == ("caption", "string")
    assert not (tmp_path / "a.png").exists() and "no contact sheet" in found.notes[0]


def test_several_captions_count_each():
    rows = [{**row, "prompt": ["first", f"other {number}", f"other {number}"]} for number, row in enumerate(pairs(2))]
    found = inspect_dataset(Dataset.from_list(rows))
    assert (found.prompts.rows, found.prompts.distinct, found.prompts.most_repeated) == (2, 3, {"first": 2})


def test_condition_images_may_be_equal():
    row = {"instruction": "p", "source_img": encoded(picture(9)), "vote_type": "leftvote"}
    rows = [
        {**row, "left_output_image": encoded(picture(number)), "right_output_image": encoded(picture(10 + number))}
        for number in range(2)
    ]
    found = inspect_dataset(Dataset.from_list(rows))
    assert (found.samples.count, found.duplicates.equal.count, found.duplicates.similar.count) == (6, 0, 0)
    assert "Condition images" in found.notes[0]
    bad = inspect_dataset(Dataset.from_list([{**rows[0], "source_img": b"damaged"}])).bad_rows
    assert [problem["place"] for problem in bad.examples] == ["column 'source_img'"]


def test_an_empty_data_set_has_no_findings():
    found = inspect_dataset(Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}))
    assert (found.rows, found.samples, found.bad_rows.count) == (0, None, 0)
    assert DatasetInspection.as_dict(found)["rows"] == 0 and str(found)


# ---- Videos and audio --------------------------------------------------------------------------------------------


def animation(seed: int, count: int) -> bytes:
    images = frames(seed, count)
    buffer = io.BytesIO()
    images[0].save(buffer, format="WEBP", save_all=True, append_images=images[1:], duration=500, lossless=True)
    return buffer.getvalue()


def film(seed: int, count: int, rate: int = 8) -> bytes:
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 40, 24, "yuv420p"
        for image in frames(seed, count):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("make", [animation, film])
def test_videos_are_counted_in_frames_and_seconds(make, tmp_path):
    rows = [{"prompt": "p", "chosen": make(0, 5), "rejected": make(1, 7)}]
    rows.append({"prompt": "q", "chosen": make(0, 5), "rejected": make(2, 5)[:200]})
    found = inspect_dataset(Dataset.from_list(rows), contact_sheet=tmp_path / "sheet.png")
    seconds = {animation: 0.5, film: 0.125}[make]
    assert (found.samples.kind, found.samples.count, found.bad_rows.kinds) == ("video", 3, {"damaged": 1})
    assert (found.samples.frames.smallest, found.samples.frames.largest) == (5, 7)
    assert found.samples.seconds.largest == pytest.approx(7 * seconds)
    assert found.samples.sizes.most_frequent == {"40x24": 3}
    assert found.duplicates.equal.rows == [0, 1]
    assert (tmp_path / "sheet.png").exists()


def test_lists_of_frames_are_videos():
    row = {"prompt": "p", "chosen": frames(0, 5), "rejected": frames(1, 5)}
    types = Features({"prompt": Value("string"), "chosen": List(Image()), "rejected": List(Image())})
    found = inspect_dataset(Dataset.from_list([row, row], features=types))
    assert (found.samples.kind, found.samples.frames.median, found.samples.seconds) == ("video", 5, None)
    assert found.duplicates.repeated_pairs.rows == [0, 1]


def test_a_model_of_videos_says_how_many_frames_there_must_be():
    rows = [{"prompt": "p", "chosen": animation(0, 5), "rejected": animation(1, 7)}]
    rows.append({"prompt": "q", "chosen": jpeg(0), "rejected": animation(1, 5)})
    found = inspect_dataset(Dataset.from_list(rows), model=tiny.build("wan"), num_frames=5)
    reasons = [(problem["row"], problem["reason"]) for problem in found.bad_rows.examples]
    assert reasons == [(0, "found 7 frames, wanted 5"), (1, "found an image among video samples")]


def test_audio_is_counted_in_seconds(tmp_path):
    rows = [{"prompt": "p", "chosen": wav(noise(0, 32)), "rejected": wav(noise(1, 64, channels=1), rate=32)}]
    rows.append({"prompt": "p", "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]})
    rows.append({"prompt": "q", "chosen": wav(noise(0))[:60], "rejected": jpeg(0)})
    found = inspect_dataset(Dataset.from_list(rows), contact_sheet=tmp_path / "sheet.png")
    assert (found.samples.kind, found.samples.count, found.samples.seconds.median) == ("audio", 4, 2)
    assert (found.samples.rates, found.samples.channels) == ({"16": 2, "32": 2}, {"2": 2, "1": 2})
    assert found.duplicates.contradictory_pairs.rows == [0, 1] and found.samples.sizes is None
    assert found.bad_rows.kinds == {"damaged": 1}
    assert "no perceptual hash" in found.notes[0]


# ---- With a model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny pipeline, of which the weights have been removed."""
    folder = tmp_path_factory.mktemp("pipeline")
    build_tiny_pipeline().save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


def test_tokens_are_counted_by_the_models_tokenizer_without_weights(folder):
    texts = ["a red circle", "a red circle", "a black square " * 8, "an orange triangle " * 20]
    rows = [{**row, "prompt": text} for row, text in zip(pairs(4), texts, strict=True)]
    pipeline = build_tiny_pipeline()
    found = inspect_dataset(Dataset.from_list(rows), model=folder)
    [tokens] = found.prompts.tokens.values()
    lengths = [len(pipeline.tokenizer(text, verbose=False)["input_ids"]) for text in dict.fromkeys(texts)]
    assert (tokens.limit, tokens.lengths.smallest, tokens.lengths.largest) == (16, min(lengths), max(lengths))
    assert (tokens.cut, tokens.cut_rows) == (2, 2)
    assert cut_prompts(list(dict.fromkeys(texts)), pipeline, family_for(pipeline)) == {"tokenizer": (2, 16)}
    assert tokens.examples[0].startswith("an orange triangle")
    assert "2 of 3 are cut at 16, in 2 rows" in " ".join(str(found).split())


def test_a_prompt_of_exactly_so_many_tokens_is_not_cut(folder):
    tokenizer = build_tiny_pipeline().tokenizer
    texts = [("red " * words).strip() for words in range(10, 18)]
    over = [len(tokenizer(text, verbose=False)["input_ids"]) - 16 for text in texts]
    assert 0 in over and max(over) > 0
    found = inspect_dataset(Dataset.from_dict({"prompt": texts}), model=folder)
    assert found.prompts.tokens["tokenizer"].cut == sum(number > 0 for number in over)


def test_a_loaded_pipeline_says_the_same_as_its_folder(folder):
    rows = Dataset.from_list(pairs())
    by_name, loaded = (inspect_dataset(rows, model=model).as_dict() for model in (folder, build_tiny_pipeline()))
    assert {**by_name, "model": None} == {**loaded, "model": None}


def test_bytes_on_disk_are_those_of_the_encoded_data(folder, tmp_path):
    rows = [*pairs(5), {**pairs(1)[0], "chosen": b"damaged"}, {**pairs(1)[0], "prompt": " "}]
    pipeline = build_tiny_pipeline()
    good = Dataset.from_list(rows[:5])
    encode_rows(
        good.cast_column("chosen", Image()).cast_column("rejected", Image()),
        pipeline,
        family_for(pipeline),
        EncodingOptions(16, cache_dtype="float16"),
        cache_folder=tmp_path,
    )
    sizes = {"samples": 0, "prompts": 0}
    for file in tmp_path.rglob("*.safetensors"):
        for kind in sizes:
            if file.parent.name.startswith(kind):
                with safe_open(file, "pt") as shard:
                    tensors = [shard.get_tensor(name) for name in shard.keys() if not name.startswith("lengths/")]
                sizes[kind] += sum(tensor.nbytes for tensor in tensors)
    found = inspect_dataset(Dataset.from_list(rows), model=folder, resolution=16).encoded
    assert found.rows == 5 and found.bytes_per_row * 5 == sizes["samples"]
    assert found.bytes_per_row_mean * 2 == found.bytes_per_row
    assert 0 < sizes["prompts"] <= found.bytes_per_prompt * found.prompts
    mean = inspect_dataset(Dataset.from_list(rows), model=folder, resolution=16, latent_sampling="mean").encoded
    assert mean.bytes_per_row == found.bytes_per_row_mean


def test_sdxl_and_flux_take_the_stated_megabytes_a_pair():
    found = [
        InspectedModel(published_pipeline(name), None, None).encoded_size(PAIRS, 1, 1, keep_std=True)
        for name in ("SDXL, 1024 px", "Flux.1-dev, 1024 px")
    ]
    # Two samples, mean and deviation, two bytes a number; and SDXL's six float32 for each sample.
    assert [size.bytes_per_row for size in found] == [8 * 4 * 128 * 128 + 48, 8 * 16 * 128 * 128]
    assert [size.bytes_per_row_mean for size in found] == [4 * 4 * 128 * 128 + 48, 4 * 16 * 128 * 128]


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "flux_dev", "wan", "stable_audio"])
def test_bytes_of_a_row_are_those_that_the_encoder_expects(name, tmp_path):
    pipeline = tiny.build(name)
    family, num_frames = family_for(pipeline), tiny.CASES[name].frames
    resolution = None if name == "stable_audio" else 32
    preparation = preparation_for(pipeline, family, resolution, num_frames)
    encoder = SampleEncoder(preparation, PAIRS, EncodingOptions(), tmp_path, 1)
    found = InspectedModel(pipeline, resolution, num_frames).encoded_size(PAIRS, 1, 1, keep_std=True)
    assert found.bytes_per_row == encoder.bytes_per_row()


def test_a_stable_audio_pipeline_must_be_loaded_for_bytes_on_disk(tmp_path):
    pipeline = tiny.build("stable_audio")
    pipeline.save_pretrained(tmp_path)
    row = {"prompt": "p", "chosen": wav(noise(0)), "rejected": wav(noise(1))}
    by_name, loaded = (inspect_dataset(Dataset.from_list([row]), model=model) for model in (tmp_path, pipeline))
    assert by_name.encoded is None and "Bytes on disk" in by_name.notes[-1]
    assert loaded.encoded.rows == 1 and by_name.prompts == loaded.prompts


def test_a_resolution_that_the_model_does_not_take_is_refused(folder):
    with pytest.raises(ValueError, match="resolution=17: StableDiffusionPipeline takes multiples of 2 pixels"):
        inspect_dataset(Dataset.from_list(pairs(1)), model=folder, resolution=17)


# ---- Options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": 0}, "max_rows=0: it must be at least 1"),
        ({"max_hash_distance": 17}, r"max_hash_distance=17 is outside \[0, 16\]"),
        ({"contact_sheet": "a.jpg"}, "contact_sheet='a.jpg' is written as PNG; let its name end in .png"),
        ({"contact_sheet_rows": 0}, "contact_sheet_rows=0: it must be at least 1"),
        ({"ties": "x"}, "ties='x' is none of drop, half, keep"),
        ({"min_score_difference": 0.5}, "min_score_difference=0.5 needs scores"),
        ({"column_map": {"chosen": "good"}}, "the data set has no column 'good', which column_map names"),
        ({"min_image_side": 0}, "min_image_side=0"),
    ],
)
def test_options_that_cannot_be_used_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        inspect_dataset(Dataset.from_list(pairs(1)), **options)


def test_a_source_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no file or folder"):
        inspect_dataset(tmp_path / "nothing.jsonl")


def test_a_tar_of_no_layout_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no known layout"):
        inspect_dataset(write_tar(tmp_path / "a.tar", [("0.a.txt", b"p")]))


def test_the_largest_ratio_and_smallest_side_are_options():
    rows = [{"prompt": "p", "chosen": encoded(picture(0, 64).resize((64, 16))), "rejected": encoded(picture(1, 64))}]
    dataset = Dataset.from_list(rows)
    kinds = [
        inspect_dataset(dataset, **options).bad_rows.kinds
        for options in ({}, {"max_aspect_ratio": 3.0}, {"min_image_side": 32})
    ]
    assert kinds == [{}, {"too long and thin": 1}, {"too small": 1}]


def test_the_json_keeps_letters_of_all_languages():
    found = inspect_dataset(Dataset.from_list([{**pairs(1)[0], "prompt": "Kätzchen 猫"}] * 2))
    assert "猫" in found.to_json() and json.loads(found.to_json()) == found.as_dict()

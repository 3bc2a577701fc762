"""Facts that were planted in a data set are counted exactly, in whatever layout it has, and others are not."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
from datasets import Dataset, Features, Image, Value
from helpers.layout_files import cell, write_table, write_tar
from helpers.pictures import encoded, picture
from PIL import Image as PILImage

from trl_diffusion_pref import inspect_dataset


class Row(NamedTuple):
    prompt: str
    chosen: bytes | None
    rejected: bytes | None


ROWS = 26
LONG = "a very long prompt " * 12


def planted_rows() -> list[Row]:
    """Row 0 to 5 are as they should be; then each plants something."""
    images = [(picture(2 * row), picture(2 * row + 1)) for row in range(ROWS)]
    rows = [Row(f"prompt {row}", encoded(chosen), encoded(rejected)) for row, (chosen, rejected) in enumerate(images)]
    # Equal bytes, equal pixels in other bytes, another compression, another size.
    rows[6] = rows[6]._replace(chosen=rows[0].chosen)
    rows[7] = rows[7]._replace(rejected=encoded(images[1][1], compress_level=1))
    rows[8] = rows[8]._replace(chosen=encoded(images[2][0], "JPEG", quality=60))
    rows[9] = rows[9]._replace(rejected=encoded(images[2][1].resize((60, 60))))
    # The same pair the other way round, the same pair again, the other way round under another prompt.
    rows[10] = Row(rows[3].prompt, rows[3].rejected, rows[3].chosen)
    rows[11] = rows[4]
    rows[12] = Row("another prompt", rows[5].rejected, rows[5].chosen)
    # A pair of one image, a pair of two that look the same, a picture of one colour.
    rows[13] = rows[13]._replace(rejected=rows[13].chosen)
    rows[14] = rows[14]._replace(rejected=encoded(images[14][0], "JPEG", quality=70))
    rows[15] = rows[15]._replace(chosen=encoded(PILImage.new("RGB", (96, 96), (9, 9, 9))))
    # Rows that cannot be used.
    rows[16] = rows[16]._replace(chosen=rows[16].chosen[:2000])
    rows[17] = rows[17]._replace(rejected=None)
    rows[18] = rows[18]._replace(rejected=b"no image at all")
    rows[19] = rows[19]._replace(prompt=" ")
    rows[20] = rows[20]._replace(chosen=encoded(picture(200).resize((600, 40))))
    rows[21] = rows[21]._replace(chosen=b"damaged", rejected=b"damaged too")
    # Prompts that repeat, that are long; another shape.
    rows[22] = rows[22]._replace(prompt=LONG)
    rows[23] = rows[23]._replace(prompt=rows[0].prompt)
    rows[24] = rows[24]._replace(rejected=encoded(picture(201).resize((192, 96))))
    return rows


def as_files(folder: Path, rows: list[Row]) -> Path:
    """JSON lines with paths."""
    table = []
    for number, row in enumerate(rows):
        paths = {name: f"images/{number}-{name}" for name in ("chosen", "rejected")}
        for name, path in paths.items():
            data = getattr(row, name)
            (folder / "images").mkdir(parents=True, exist_ok=True)
            if data is not None:
                (folder / path).write_bytes(data)
        table.append({"prompt": row.prompt, **paths})
    return write_table(folder / "pairs.jsonl", table)


def labelled(rows: list[Row]) -> list[dict[str, Any]]:
    """Pick-a-Pic's columns, every other row with the chosen image second, then ties, and labels that mean nothing."""
    table = []
    for number, row in enumerate(rows):
        images = (row.chosen, row.rejected) if number % 2 else (row.rejected, row.chosen)
        label = float(number % 2)
        table.append({"caption": row.prompt, "jpg_0": images[0], "jpg_1": images[1], "label_0": label})
        table[-1]["has_label"] = True
    tie = {**table[0], "label_0": 0.5}
    return [*table, tie, tie, {**tie, "has_label": False}, {**tie, "label_0": 0.7}, {**tie, "label_0": 3.0}]


def as_pick_a_pic(folder: Path, rows: list[Row]) -> Path:
    return write_table(folder / "train-00000-of-00001.parquet", labelled(rows))


def as_saved(folder: Path, rows: list[Row]) -> Path:
    samples = [(row.prompt, *(data and cell(data) for data in row[1:])) for row in rows]
    table = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in samples]
    features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    Dataset.from_list(table, features=features).save_to_disk(folder / "saved")
    return folder / "saved"


WRITERS = {"files": as_files, "pick_a_pic": as_pick_a_pic, "saved": as_saved}


@pytest.fixture(scope="module", params=WRITERS)
def case(request, tmp_path_factory):
    """The layout, the source, and what was found in it."""
    source = WRITERS[request.param](tmp_path_factory.mktemp(request.param), planted_rows())
    return request.param, source, inspect_dataset(source, resolution=96, max_aspect_ratio=8)


def examples(finding) -> list[list[str]]:
    return [[place.split(",")[0] for place in example] for example in finding.examples]


def test_rows_ties_and_labels_are_counted(case):
    layout, _, found = case
    if layout != "pick_a_pic":
        assert (found.rows, found.pairs.pairs, found.pairs.left_out) == (ROWS, ROWS, 0)
        return
    assert (found.layout, found.content, found.rows, found.pairs.pairs) == ("Pick-a-Pic", "pairs", ROWS + 5, ROWS)
    assert (found.pairs.ties_dropped, found.pairs.unlabelled) == (2, 1)
    of_labels = [problem for problem in found.bad_rows.rows if problem >= ROWS]
    assert of_labels == [ROWS + 3, ROWS + 4]


def test_bad_rows_are_counted_by_kind_and_named(case):
    layout, _, found = case
    empty = "missing file" if layout == "files" else "empty cell"
    labels = 2 * (layout == "pick_a_pic")
    kinds = {"damaged": 1, empty: 1, "not an image": 2, "empty prompt": 1, "too long and thin": 1}
    assert found.bad_rows.kinds == kinds | ({"unusable label": labels} if labels else {})
    assert found.bad_rows.rows[:6] == [16, 17, 18, 19, 20, 21] and found.bad_rows.count == 6 + labels
    column = {"chosen": "jpg_1", "rejected": "jpg_0"} if layout == "pick_a_pic" else {}
    first, *_ = found.bad_rows.examples
    assert first["row"] == 16 and first["place"] == f"column '{column.get('chosen', 'chosen')}'"
    # The two bad cells of row 21 are named, and the row is counted once.
    assert [problem["row"] for problem in found.bad_rows.examples][5:7] == [21, 21]


def test_equal_samples_are_found_by_bytes_and_by_pixels(case):
    _, _, found = case
    equal = [sorted(rows) for rows in examples(found.duplicates.equal)]
    pairs = [("row 0", "row 6"), ("row 1", "row 7")]
    pairs += [("row 10", "row 3"), ("row 10", "row 3"), ("row 11", "row 4"), ("row 11", "row 4")]
    pairs += [("row 12", "row 5"), ("row 12", "row 5"), ("row 13", "row 13")]
    assert sorted(equal) == sorted(map(list, pairs))
    # 0 and 6, 1 and 7, and both images of 5 and 12.
    assert found.duplicates.equal_across_prompts == 4
    assert found.duplicates.equal.count == len(pairs)


def test_similar_samples_are_found(case):
    _, _, found = case
    similar = sorted(examples(found.duplicates.similar))
    assert similar == [["row 14", "row 14"], ["row 2", "row 8"], ["row 2", "row 9"]]
    assert (found.duplicates.blank.rows, found.duplicates.blank.count) == ([15], 1)


def test_contradictions_and_repetitions_are_found(case):
    _, _, found = case
    assert examples(found.duplicates.contradictory_pairs) == [["row 3", "row 10"]]
    assert examples(found.duplicates.repeated_pairs) == [["row 4", "row 11"]]
    assert found.duplicates.identical_pairs.rows == [13]
    assert found.duplicates.similar_pairs.rows == [14]


def test_prompts_are_measured(case):
    _, _, found = case
    texts = [row.prompt for row in planted_rows()]
    distinct = set(texts)
    assert (found.prompts.rows, found.prompts.distinct) == (ROWS, len(distinct))
    assert found.prompts.most_repeated == {text: texts.count(text) for text in ("prompt 0", "prompt 3", "prompt 4")}
    assert found.prompts.characters.largest == len(LONG)
    assert found.prompts.words.largest == 48


def test_sizes_and_buckets_are_measured(case):
    _, _, found = case
    sizes = found.samples.sizes
    # Rows 16, 17 and 18 have one that can be decoded, row 21 has none.
    assert found.samples.count == 2 * ROWS - 5
    assert sizes.most_frequent == {"96x96": found.samples.count - 3, "60x60": 1, "600x40": 1, "192x96": 1}
    assert sizes.smaller == 2 and sizes.different_shapes.rows == [20, 24]
    assert sizes.cropped == pytest.approx((1 - 40 / 600 + 1 / 2) / found.samples.count, abs=1e-6)
    assert sum(bucket.rows for bucket in sizes.buckets) == ROWS - 4
    assert {bucket.width / bucket.height for bucket in sizes.buckets} >= {1.0}


def test_the_result_is_json(case, tmp_path):
    _, _, found = case
    text = found.to_json(tmp_path / "found.json")
    assert json.loads(text) == found.as_dict() == json.loads((tmp_path / "found.json").read_text())
    assert found.as_dict()["duplicates"]["contradictory_pairs"]["rows"] == [3, 10]
    assert os.listdir(tmp_path) == ["found.json"]


def test_the_report_names_what_was_found(case):
    _, source, found = case
    text = str(found)
    assert text.startswith(str(source)) and max(map(len, text.splitlines()[1:])) <= 110
    for part in ("row 16, column", "row 3 = row 10", "contradictory", '2 x "prompt 0"', "96x96"):
        assert part in text


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_inspecting_changes_no_file(case):
    layout, source, _ = case
    folders = [source.parent]
    # Of tables `datasets` keeps a copy, which is there by now.
    folders.append(Path(datasets.config.HF_DATASETS_CACHE))
    before = [hashes(folder) for folder in folders]
    inspect_dataset(source)
    assert [hashes(folder) for folder in folders] == before


def test_a_stream_gives_the_same_as_a_stored_data_set(case):
    _, source, found = case
    streamed = inspect_dataset(source, streaming=True, resolution=96, max_aspect_ratio=8).as_dict()
    stored = found.as_dict()
    assert streamed.pop("rows_in_source") is None and stored.pop("rows_in_source")
    assert {**streamed, "columns": None} == {**stored, "columns": None}


def test_so_many_rows_are_read_from_the_beginning(case):
    _, source, _ = case
    for streaming in (False, True):
        found = inspect_dataset(source, streaming=streaming, max_rows=11)
        assert (found.rows, found.complete, found.samples.count) == (11, False, 22)
        assert examples(found.duplicates.contradictory_pairs) == [["row 3", "row 10"]]
        assert "the first 11" in str(found)


def test_tars_are_inspected(tmp_path):
    members = []
    for number, row in enumerate(planted_rows()[:12]):
        key = f"{number:04d}"
        members += [(f"{key}.jpg_0.jpg", row.chosen), (f"{key}.jpg_1.jpg", row.rejected)]
        members += [(f"{key}.label_0.txt", b"1"), (f"{key}.original_prompt.txt", row.prompt.encode())]
    write_tar(tmp_path / "0.tar", members)
    for streaming in (False, True):
        found = inspect_dataset(tmp_path / "0.tar", streaming=streaming)
        assert found.layout == "Pick-a-Pic as WebDataset" and found.duplicates.contradictory_pairs.rows == [3, 10]


def test_a_cut_jpeg_is_bad_though_it_is_decoded_smaller():
    whole = encoded(picture(0, side=512), "JPEG", quality=95)
    cuts = [len(whole), len(whole) // 10, len(whole) // 2, len(whole) - 200]
    rows = [{"prompt": "p", "chosen": whole[:cut], "rejected": encoded(picture(1))} for cut in cuts]
    found = inspect_dataset(Dataset.from_list(rows))
    assert found.bad_rows.kinds == {"damaged": 3} and found.bad_rows.rows == [1, 2, 3]


def test_jpegs_have_their_full_size_and_are_equal_by_their_bytes():
    image = picture(0, side=512).resize((512, 400))
    data, with_comment = (encoded(image, "JPEG", comment=comment) for comment in (b"", b"a comment"))
    samples = [{"prompt": "p", "chosen": other, "rejected": data} for other in (data, with_comment)]
    found = inspect_dataset(Dataset.from_list(samples))
    assert found.samples.sizes.most_frequent == {"512x400": 4}
    # What they show is decoded at a fraction of the size, which cannot tell whether all pixels are equal.
    assert (found.duplicates.identical_pairs.rows, found.duplicates.similar_pairs.rows) == ([0], [1])


def test_the_kind_of_a_bad_row_is_that_of_its_first_problem():
    row = {"prompt": "p", "chosen": encoded(picture(0, 16).resize((400, 4))), "rejected": b"damaged"}
    found = inspect_dataset(Dataset.from_list([row]))
    assert found.bad_rows.kinds == {"too long and thin": 1}
    assert [problem["kind"] for problem in found.bad_rows.examples] == ["too long and thin", "not an image"]

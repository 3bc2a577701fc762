"""Rows that cannot be used, of every kind: named in one run, or left out and counted."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from helpers.bad_cells import (
    bad_cells,
    chunk,
    data_cell,
    noise,
    path_cell,
    png_that_claims,
    saved,
    unusual_cells,
    webp_that_claims,
)
from helpers.encoding import encoder_of
from helpers.pipelines import RESOLUTION, build_tiny_pipeline
from PIL import Image as PILImage

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer
from trl_diffusion_pref.data import EncodingOptions
from trl_diffusion_pref.data.bad_rows import BadRowPolicy, RowProblem
from trl_diffusion_pref.data.cells import scalar_problems
from trl_diffusion_pref.data.decode import audio, cell
from trl_diffusion_pref.data.decode.image import decode_image
from trl_diffusion_pref.data.layouts import Between, Layout, OneOf
from trl_diffusion_pref.families import family_for


GOOD = [data_cell(saved(noise(100 + seed), "PNG")) for seed in range(12)]
# As parquet files have them that were not written by `datasets`, which takes no cell without bytes and path.
FILE = {"bytes": Value("binary"), "path": Value("string")}
FEATURES = Features({"prompt": Value("string"), "chosen": FILE, "rejected": FILE, "soft_label": Value("float64")})
TWIN = data_cell(saved(noise(7), "PNG"))
# Beside those of cells: rows, the place and kind of what is wrong with them, and the reason.
OTHER = {
    "the same image twice": (
        {"chosen": TWIN, "rejected": TWIN},
        "same samples",
        "columns 'chosen' and 'rejected': .*no",
    ),
    "empty prompt": ({"prompt": ""}, "empty prompt", "column 'prompt': is empty"),
    "prompt of spaces": ({"prompt": " \n"}, "empty prompt", "column 'prompt': is empty"),
    "no prompt": ({"prompt": None}, "empty prompt", "column 'prompt': is None"),
    "NaN": ({"soft_label": float("nan")}, "unusable label", "column 'soft_label': is nan, not a finite number"),
    "no label": ({"soft_label": None}, "unusable label", "column 'soft_label': is None, not a number"),
    "above 1": ({"soft_label": 1.5}, "unusable label", r"column 'soft_label': is 1.5, not in \[0, 1\]"),
}


def good_row(row: int) -> dict:
    """Few contents are different, so that few are encoded."""
    first = GOOD[row % 11]
    return {"prompt": f"prompt {row % 3}", "chosen": first, "rejected": GOOD[row % 11 + 1], "soft_label": 0.9}


class Rows:
    """A data set of which one in a hundred rows cannot be used, each of another kind.

    Attributes:
        kinds: The kind of each bad row, by its position.
        reasons: A pattern of the line that names it.
    """

    def __init__(self, folder: Path) -> None:
        self.kinds: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        bad = []
        for number, (content, kind, message) in enumerate(bad_cells(folder).values()):
            column = ("chosen", "rejected")[number % 2]
            bad.append(({column: content}, kind, f"column '{column}': .*{message}"))
        bad += OTHER.values()
        rows = [good_row(row) for row in range(100 * len(bad))]
        for number, (cells, kind, reason) in enumerate(bad):
            row = 100 * number + 37
            rows[row] = {**good_row(row), **cells}
            self.kinds[row], self.reasons[row] = kind, reason
        for number, content in enumerate(unusual_cells(folder).values()):
            rows[100 * number + 50]["chosen"] = content
        self.dataset = Dataset.from_list(rows, features=FEATURES)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Rows:
    return Rows(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def options(tmp_path) -> dict:
    return {
        "output_dir": str(tmp_path / "output"),
        "dataset_cache_dir": str(tmp_path / "cache"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "activation_checkpointing": False,
    }


def irepo(**options) -> DiffusionDPOConfig:
    return DiffusionDPOConfig(loss_type="irepo", **options)


def test_one_run_names_every_row_that_cannot_be_used(rows, options, monkeypatch):
    monkeypatch.setattr("trl_diffusion_pref.data.bad_rows._LISTED", 100)
    with pytest.raises(ValueError, match="train_dataset has rows that cannot be used") as error:
        DiffusionDPOTrainer(build_tiny_pipeline(), irepo(**options), rows.dataset)
    lines = str(error.value).splitlines()
    named = {int(match[1]): line for line in lines if (match := re.match(r"  row (\d+), ", line))}
    assert sorted(named) == sorted(rows.kinds) and len(rows.kinds) >= 35
    for row, line in named.items():
        assert re.search(rows.reasons[row], line), line
    counts = Counter(rows.kinds.values())
    assert len(counts) >= 12
    [summary] = [line for line in lines if line.startswith(f"{len(named)} of {len(rows.dataset)} rows: ")]
    assert all(f" {number} {kind}" in summary for kind, number in counts.items())
    assert lines[-1] == "Repair them, or set on_bad_row='skip' to leave them out."


def test_skip_leaves_out_the_bad_rows_alone_and_trains(rows, options, caplog):
    with caplog.at_level(logging.WARNING, "trl_diffusion_pref"):
        trainer = DiffusionDPOTrainer(build_tiny_pipeline(), irepo(on_bad_row="skip", **options), rows.dataset)
    everything = set(range(len(rows.dataset)))
    assert set(trainer.train_dataset.rows.tolist()) == everything - rows.kinds.keys()
    assert trainer.train_dataset.left_out == Counter(rows.kinds.values())
    assert f"{len(rows.kinds)} of {len(rows.dataset)} rows are left out, 1.00% (" in caplog.text
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_run_s_record_counts_what_was_left_out(rows, options):
    without_labels = rows.dataset.remove_columns("soft_label")
    trainer = MaPOTrainer(build_tiny_pipeline(), MaPOConfig(on_bad_row="skip", **options), without_labels)
    trainer.train()
    trainer.save_model()
    record = json.loads((Path(options["output_dir"]) / "trl_diffusion_pref.json").read_text())
    expected = Counter(kind for kind in rows.kinds.values() if kind != "unusable label")
    assert record["data"]["left_out"] == expected
    assert record["data"]["rows"] == len(rows.dataset) - expected.total()


def test_ten_rows_are_listed_and_all_are_counted(options):
    rows = [{**good_row(row), "prompt": "" if row % 2 else "a"} for row in range(30)]
    dataset = Dataset.from_list(rows, features=FEATURES).remove_columns("soft_label")
    with pytest.raises(ValueError, match="(?s)and 5 more\n15 of 30 rows: 15 empty prompt") as error:
        MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options), dataset)
    assert len(re.findall(r"\n  row \d+", str(error.value))) == 10


def test_too_many_bad_rows_stop_a_run_that_skips(rows, options):
    cfg = irepo(on_bad_row="skip", max_bad_share=0.009, **options)
    with pytest.raises(ValueError, match=f"(?s){len(rows.kinds)} of {len(rows.dataset)} rows: .*max_bad_share=0.009"):
        DiffusionDPOTrainer(build_tiny_pipeline(), cfg, rows.dataset)


def test_rows_of_which_none_is_left_are_an_error(options):
    rows = [{**good_row(row), "prompt": ""} for row in range(3)]
    cfg = MaPOConfig(on_bad_row="skip", max_bad_share=1.0, **options)
    with pytest.raises(ValueError, match="all 3 rows would be left out"):
        MaPOTrainer(
            build_tiny_pipeline(), cfg, Dataset.from_list(rows, features=FEATURES).remove_columns("soft_label")
        )


# ---- Rows in another layout --------------------------------------------------------------------------------------


def test_rows_of_a_known_layout_are_named_as_they_are_there(options):
    """The pairs of Pick-a-Pic's rows have other numbers, since ties are left out, and other columns."""
    rows = [
        {"caption": f"p{row}", "jpg_0": GOOD[row]["bytes"], "jpg_1": GOOD[row + 1]["bytes"], "label_0": label}
        for row, label in enumerate([0.5, 1.0, 0.0, 0.0, 0.5, 3.0, 1.0])
    ]
    rows[2]["jpg_0"], rows[3]["jpg_1"], rows[6]["caption"] = b"x", b"x", ""
    dataset = Dataset.from_list(rows)
    with pytest.raises(ValueError) as error:
        MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options), dataset)
    assert [line.split(";")[0] for line in str(error.value).splitlines()[1:]] == [
        "  row 2, column 'jpg_0': the bytes are not an image that Pillow can identify",
        "  row 3, column 'jpg_1': the bytes are not an image that Pillow can identify",
        "  row 5, column 'label_0': is 3.0, not one of 1, 0, 0.5",
        "  row 6, column 'caption': is empty",
        "4 of 7 rows: 2 not an image, 1 empty prompt, 1 unusable label.",
        "Repair them, or set on_bad_row='skip' to leave them out.",
    ]
    trainer = MaPOTrainer(
        build_tiny_pipeline(), MaPOConfig(on_bad_row="skip", max_bad_share=0.6, ties="keep", **options), dataset
    )
    assert len(trainer.train_dataset) == 3
    assert trainer.train_dataset.left_out == {"not an image": 2, "unusable label": 1, "empty prompt": 1}


@pytest.mark.parametrize("shape", ["list", "rows"])
def test_samples_of_a_ranking_are_named_as_they_are_there(shape, options):
    samples = [[GOOD[3 * row + k]["bytes"] for k in range(3)] for row in range(3)]
    samples[1][2] = b"x"
    if shape == "list":
        rows = [{"prompt": str(row), "images": cells, "scores": [1.0, 0.0, 2.0]} for row, cells in enumerate(samples)]
        rows[2]["scores"] = [1.0, 2.0]
        places = [
            "row 1, column 'images', number 2: the bytes",
            "row 2, column 'scores': has 2 entries for the 3 samples in column 'images'",
        ]
    else:
        rows = [
            {"prompt_id": row, "prompt": str(row), "image": cell, "rank": rank}
            for row, cells in enumerate(samples)
            for cell, rank in zip(cells, [2, 3, 1], strict=True)
        ]
        rows[6]["rank"] = None
        places = ["row 5, column 'image': the bytes", "row 6, column 'rank': is None, not a finite number"]
    with pytest.raises(ValueError) as error:
        MaPOTrainer(build_tiny_pipeline(), MaPOConfig(ranking_pairs="all", **options), Dataset.from_list(rows))
    lines = str(error.value).splitlines()
    assert len(lines) == 5 and all(f"  {place}" in line for place, line in zip(places, lines[1:], strict=False))


def test_rows_of_which_no_label_can_be_used_are_named_at_once(options):
    rows = [{"caption": "p", "jpg_0": b"x", "jpg_1": b"y", "label_0": 3.0}] * 2
    with pytest.raises(ValueError, match="train_dataset has labels that cannot be used, in 2 of 2 rows"):
        MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options), Dataset.from_list(rows))


# ---- Numbers -----------------------------------------------------------------------------------------------------


def test_numbers_that_cannot_be_used_are_named_by_row_and_column():
    layout = Layout(("image",), scalars=("label", "reward"), ranges={"label": OneOf((0, 1)), "reward": Between(-1, 1)})
    columns = {"label": [True, 0, 2, None, "1", 1.0], "reward": [0.5, 1, -1.5, float("inf"), True, [0.5]]}
    assert [str(problem) for problem in scalar_problems(columns, layout)] == [
        "row 2, column 'label': is 2, not one of 0, 1",
        "row 3, column 'label': is None, not a number",
        "row 4, column 'label': is '1', not a number",
        "row 2, column 'reward': is -1.5, not in [-1, 1]",
        "row 3, column 'reward': is inf, not a finite number",
        "row 4, column 'reward': is True, not a number",
        "row 5, column 'reward': is [0.5], not a number",
    ]


def test_scores_of_a_ranking_need_one_finite_number_per_sample():
    layout = Layout(("images",), samples_per_cell=2, scalars=("scores",))
    columns = {"scores": [[1.0, 2.0], [1.0], None, [1.0, None], [1.0, float("nan")], 3.0]}
    assert [str(problem) for problem in scalar_problems(columns, layout)] == [
        "row 1, column 'scores': has 1 numbers for 2 samples",
        "row 2, column 'scores': is None, not a list of 2 numbers",
        "row 3, column 'scores': is None, not a number",
        "row 4, column 'scores': is nan, not a finite number",
        "row 5, column 'scores': is 3.0, not a list of 2 numbers",
    ]


def test_a_stream_names_labels_and_shapes_too(options):
    rows = [good_row(row) for row in range(6)]
    rows[1]["soft_label"], rows[3]["chosen"] = float("nan"), data_cell(saved(noise(6, (2000, 2)), "PNG"))
    stream = Dataset.from_list(rows, features=FEATURES).to_iterable_dataset()
    trainer = DiffusionDPOTrainer(build_tiny_pipeline(), irepo(**options), stream)
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert "column 'soft_label'" in str(error.value) and "is nan, not a finite number" in str(error.value)
    assert "of 2000x2 pixels" in str(error.value)


# ---- What no row is to blame for ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("address", "package"), [("http://a.invalid/a.png", "aiohttp"), ("s3://a/a.png", "s3fs")])
def test_a_missing_package_stops_a_run_that_skips(address, package, options):
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    rows = [good_row(row) for row in range(20)]
    rows[5]["chosen"] = path_cell(address)
    dataset = Dataset.from_list(rows, features=FEATURES).remove_columns("soft_label")
    cfg = MaPOConfig(on_bad_row="skip", **options)
    with pytest.raises(
        ValueError, match=f"(?s)row 5, column 'chosen': .*{package}.*Install what is missing; no row is"
    ):
        MaPOTrainer(build_tiny_pipeline(), cfg, dataset)


def test_a_column_of_numbers_is_named_by_row(options):
    dataset = Dataset.from_dict({"prompt": ["a", "b"], "chosen": [1, 2], "rejected": [3, 4]})
    with pytest.raises(ValueError, match="row 0, column 'chosen': a cell of type int is not an image"):
        MaPOTrainer(build_tiny_pipeline(), MaPOConfig(**options), dataset)


def test_a_list_of_captions_needs_a_text_in_every_place(tmp_path):
    pipeline = build_tiny_pipeline()
    rows = [{**good_row(row), "prompt": captions} for row, captions in enumerate((["a"], ["", "b"], [], None, [None]))]
    features = Features({**FEATURES, "prompt": [Value("string")]})
    policy = BadRowPolicy("skip", max_bad_share=1.0)
    encoder = encoder_of(
        pipeline, family_for(pipeline), EncodingOptions(RESOLUTION, bad_rows=policy), cache_folder=tmp_path
    )
    dataset = Dataset.from_list(rows, features=features)
    encoder.add_prompts([dataset])
    encoded = encoder.encode(dataset, "train_dataset")
    assert encoded.rows.tolist() == [0] and encoded.left_out == {"empty prompt": 4}


def test_a_problem_that_several_pairs_share_is_listed_once():
    problems = [RowProblem(3, "column 'image'", "is damaged", "damaged")] * 4
    with pytest.raises(ValueError) as error:
        BadRowPolicy().apply(problems, 10, "x")
    assert str(error.value).count("row 3") == 1 and "1 of 10 rows: 1 damaged." in str(error.value)


# ---- Memory ------------------------------------------------------------------------------------------------------

_CHILD = """
import resource, sys
from pathlib import Path
from PIL import Image
from trl_diffusion_pref.data.content import image_size
from trl_diffusion_pref.data.decode.cell import CellProblem
from trl_diffusion_pref.data.decode.image import decode_image, prepare_image

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
for path in sorted(Path(sys.argv[1]).iterdir()):
    data = path.read_bytes()
    image_size(data)
    try:
        pixels = prepare_image(decode_image(data), (512, 512), (0.5, 0.5), False)
        found = str(tuple(pixels.shape))
    except CellProblem as problem:
        found = problem.kind
    print(path.name, found, peak() - before)
"""


@pytest.mark.slow
def test_no_image_takes_more_memory_than_its_decoded_pixels(tmp_path):
    """In a process of its own, whose peak nothing else has raised."""
    bomb = chunk(b"zTXt", b"C\0\0" + zlib.compress(bytes(200_000_000)))
    many = chunk(b"zTXt", b"C\0\0" + zlib.compress(bytes(1_000_000))) * 200
    files = {
        "1 thin": (saved(noise(0, (20000, 10)), "PNG"), "(3, 512, 512)"),
        "2 tall": (saved(noise(0, (10, 20000)), "PNG"), "(3, 512, 512)"),
        "3 header of 60000x60000": (png_that_claims(60_000, 60_000), "too large"),
        "4 header of 12000x12000": (png_that_claims(12_000, 12_000), "too large"),
        "5 text of 200 MB": (png_that_claims(16, 16, bomb), "damaged"),
        "6 many texts": (png_that_claims(16, 16, many), "damaged"),
        "7 profile of 200 MB": (
            png_that_claims(16, 16, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(200_000_000)))),
            "damaged",
        ),
        "8 WebP of 16383x16383": (webp_that_claims(16383, 16383), "too large"),
    }
    folder = tmp_path / "files"
    folder.mkdir()
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder)], capture_output=True, text=True, env=environment, check=True
    )
    lines = result.stdout.splitlines()
    assert [line.rpartition(" ")[0] for line in lines] == [f"{name} {found}" for name, (_, found) in files.items()]
    # Pillow itself allows 64 MB of texts; half a billion pixels would be 1.5 GB.
    assert int(lines[-1].rpartition(" ")[2]) < 150e6


def test_a_member_of_an_archive_is_not_read_beyond_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(cell, "_MAX_FILE_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(cell.CellProblem, match="a.png::.* has more than 1 MiB") as error:
        cell.read_cell(f"zip://a.png::{tmp_path / 'a.zip'}")
    assert error.value.kind == "too large" and tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_an_image_beyond_pillow_s_limit_is_bad_and_one_at_the_limit_is_not(monkeypatch):
    """Pillow only warns up to twice its limit; also where warnings are errors, the row is named."""
    data = saved(noise(0, (40, 40)), "PNG")
    for limit, good in ((1600, True), (1599, False), (800, False), (799, False), (None, True)):
        monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", limit)
        for action in ("ignore", "error"):
            with warnings.catch_warnings():
                warnings.simplefilter(action)
                if good:
                    assert decode_image(data).size == (40, 40)
                    continue
                with pytest.raises(cell.CellProblem, match="PIL.Image.MAX_IMAGE_PIXELS") as error:
                    decode_image(data)
            assert error.value.kind == "too large"


def test_audio_that_decodes_to_hours_is_not_read_whole(monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((300_000, 1)), 8000, format="FLAC")
    assert len(buffer.getvalue()) < 20_000
    monkeypatch.setattr(audio, "_MAX_NUMBERS", 8000 * 60 * 3)
    assert audio.decode_audio(buffer.getvalue()).samples.shape == (1, 300_000)
    monkeypatch.setattr(audio, "_MAX_NUMBERS", 8000 * 30)
    with pytest.raises(cell.CellProblem, match="longer than 0.5 minutes; cut it"):
        audio.decode_audio(buffer.getvalue())

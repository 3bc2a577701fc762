"""Keys of rows by their content: nothing that leaves the samples as they are changes them, and a changed file does."""

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Image, List
from helpers.processes import Processes
from PIL import Image as PILImage

from trl_diffusion_pref.data import PAIRS, Layout, content
from trl_diffusion_pref.data.content import contents_of
from trl_diffusion_pref.data.decode.cell import undecoded_feature


def write(file: Path, seed: int, size: tuple[int, int] = (6, 4)) -> str:
    """A BMP, so that every image of a size has as many bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(file)
    return str(file)


def pairs(folder: Path, count: int = 4) -> Dataset:
    columns = {
        name: [write(folder / f"{name}-{row}.bmp", 10 * row + index) for row in range(count)]
        for index, name in enumerate(PAIRS.samples)
    }
    return Dataset.from_dict({"prompt": ["a"] * count, **columns})


def contents(dataset: Dataset, folder: Path, layout: Layout = PAIRS):
    for column in layout.media:
        feature = undecoded_feature(dataset.features[column])
        dataset = dataset if feature == dataset.features[column] else dataset.cast_column(column, feature)
    return contents_of(dataset, layout, "data", folder / "cache", sizes="local")


def keys(dataset: Dataset, folder: Path) -> list[bytes]:
    return [key.tobytes() for key in contents(dataset, folder).keys]


def touch(dataset: Dataset, folder: Path) -> Dataset:
    for file in folder.glob("*.bmp"):
        os.utime(file, (1, 1))
    return dataset


def move(dataset: Dataset, folder: Path) -> Dataset:
    shutil.copytree(folder, folder.parent / "moved")
    shutil.rmtree(folder)
    return dataset.map(
        lambda row: {name: row[name].replace(str(folder), str(folder.parent / "moved")) for name in PAIRS.samples}
    )


def embed(dataset: Dataset, folder: Path) -> Dataset:
    """The files' bytes in the table itself."""
    return dataset.map(lambda row: {name: {"bytes": Path(row[name]).read_bytes()} for name in PAIRS.samples})


def as_image_columns(dataset: Dataset, folder: Path) -> Dataset:
    return dataset.cast_column("chosen", Image()).cast_column("rejected", Image())


def in_an_archive(dataset: Dataset, folder: Path) -> Dataset:
    with zipfile.ZipFile(folder.parent / "images.zip", "w") as archive:
        for file in folder.glob("*.bmp"):
            archive.write(file, file.name)
    inside = f"::{folder.parent / 'images.zip'}"
    return dataset.map(lambda row: {name: f"zip://{Path(row[name]).name}{inside}" for name in PAIRS.samples})


@pytest.mark.parametrize(
    "change",
    [
        lambda dataset, folder: dataset.select(range(len(dataset))),
        lambda dataset, folder: dataset.add_column("extra", list(range(len(dataset)))),
        lambda dataset, folder: dataset.rename_column("prompt", "p").add_column("prompt", ["b"] * len(dataset)),
        touch,
        move,
        embed,
        as_image_columns,
        in_an_archive,
    ],
    ids=["select all", "extra column", "prompts", "touch", "move", "embed", "image columns", "archive"],
)
def test_what_leaves_the_samples_as_they_are_leaves_the_keys(change, tmp_path):
    dataset = pairs(tmp_path / "images")
    before = keys(dataset, tmp_path)
    assert len(set(before)) == len(dataset)
    assert keys(change(dataset, tmp_path / "images"), tmp_path) == before


def test_shuffled_rows_keep_their_keys(tmp_path):
    dataset = pairs(tmp_path / "images")
    before, order = keys(dataset, tmp_path), [2, 0, 3, 1]
    assert keys(dataset.select(order), tmp_path) == [before[row] for row in order]


def test_a_file_changed_with_equal_size_and_time_gets_another_key(tmp_path):
    dataset = pairs(tmp_path / "images")
    before = keys(dataset, tmp_path)
    changed = tmp_path / "images" / "rejected-2.bmp"
    status = changed.stat()
    write(changed, 99)
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (changed.stat().st_size, changed.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after = keys(dataset, tmp_path)
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, True, False, True]


def test_an_archive_that_is_replaced_gives_other_keys(tmp_path):
    dataset = in_an_archive(pairs(tmp_path / "images"), tmp_path / "images")
    before = keys(dataset, tmp_path)
    write(tmp_path / "images" / "chosen-0.bmp", 99)
    in_an_archive(dataset, tmp_path / "images")
    assert [one == other for one, other in zip(before, keys(dataset, tmp_path), strict=True)] == [False, *[True] * 3]


def test_an_order_of_samples_is_part_of_the_key(tmp_path):
    dataset = pairs(tmp_path / "images", 1)
    exchanged = dataset.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    assert keys(dataset, tmp_path) != keys(exchanged, tmp_path)


def test_files_are_read_once_as_long_as_nothing_changes(tmp_path, monkeypatch):
    dataset, read = pairs(tmp_path / "images"), []
    original = content.read_cell
    monkeypatch.setattr(content, "read_cell", lambda cell: (read.append(cell), original(cell))[1])
    first = keys(dataset, tmp_path)
    assert len(read) == 2 * len(dataset)
    assert keys(dataset, tmp_path) == first and len(read) == 2 * len(dataset)
    touch(dataset, tmp_path / "images")
    assert keys(dataset, tmp_path) == first and len(read) == 4 * len(dataset)


def test_a_missing_file_is_a_problem_and_found_once_it_is_there(tmp_path):
    dataset = pairs(tmp_path / "images")
    (tmp_path / "images" / "chosen-1.bmp").rename(tmp_path / "away.bmp")
    found = contents(dataset, tmp_path)
    assert [(problem.row, problem.kind) for problem in found.problems] == [(1, "missing file")]
    (tmp_path / "away.bmp").rename(tmp_path / "images" / "chosen-1.bmp")
    assert contents(dataset, tmp_path).problems == []


def test_sizes_are_those_of_the_images_as_they_are_shown(tmp_path):
    upright = PILImage.new("RGB", (6, 4))
    turned = upright.getexif()
    turned[0x0112] = 6
    upright.save(tmp_path / "a.jpg", exif=turned)
    dataset = Dataset.from_dict({"prompt": ["a"], "image": [[str(tmp_path / "a.jpg"), write(tmp_path / "b.bmp", 0)]]})
    layout = Layout(samples=("image",), samples_per_cell=2)
    found = contents(dataset.cast_column("image", List(Image())), tmp_path, layout)
    assert found.sizes.tolist() == [[[4, 6], [6, 4]]]


def test_processes_read_their_shares_and_know_all_keys(tmp_path, monkeypatch):
    dataset = pairs(tmp_path / "images", 7)
    expected = keys(dataset, tmp_path / "alone")
    processes = Processes(monkeypatch, content)
    for found in processes.run(lambda index: keys(dataset, tmp_path / "together"), 3, per_node=3):
        assert found == expected


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    dataset = pairs(tmp_path / "images")
    expected = keys(dataset, tmp_path / "alone")

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert keys(dataset, tmp_path / "other") == expected
    assert not list((tmp_path / "other").rglob("*contents*"))

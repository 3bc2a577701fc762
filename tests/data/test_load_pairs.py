"""Sources of pairs: files, folders, tars, data sets and names of the Hub."""

import gzip
import io
import logging
import os
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Audio, Dataset, DatasetDict, Image, Video
from helpers.layout_files import (
    AUDIO,
    IMAGES,
    VIDEOS,
    cell,
    contents,
    image_folder,
    jpeg,
    known,
    pick_a_pic,
    pick_a_pic_members,
    pick_a_pic_tars,
    two_folders,
    write_files,
    write_table,
    write_tar,
)

from trl_diffusion_pref import load_pairs
from trl_diffusion_pref.data import load


def path_rows(folder: Path, rows: range = range(8), prefix: str = "") -> list[dict]:
    """Rows with relative paths to images that are written beside the table."""
    for row in rows:
        write_files(folder / f"{row}", IMAGES[row][1:3])
    return [
        {"prompt": IMAGES[row].prompt, "chosen": f"{prefix}{row}/0.jpg", "rejected": f"{row}/1.jpg"} for row in rows
    ]


def stored_pairs(rows: range = range(8)) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            for pair in IMAGES[rows.start : rows.stop]
        ]
    )


both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])


# ---- Tables ------------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
def test_paths_are_relative_to_the_file_that_contains_them(name, streaming, tmp_path, monkeypatch):
    write_table(tmp_path / "data" / name, path_rows(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    assert contents(load_pairs(Path("data") / name, streaming=streaming)) == known(IMAGES)


@both_ways
def test_absolute_paths_and_urls_stay_as_they_are(streaming, tmp_path):
    rows = [
        {"prompt": "p", "chosen": "/a/b.png", "rejected": "https://c/d.png"},
        {"prompt": "q", "chosen": "zip://a.png::b.zip", "rejected": "e.png"},
    ]
    loaded = list(load_pairs(write_table(tmp_path / "a.jsonl", rows), streaming=streaming))
    assert loaded == [rows[0], {**rows[1], "rejected": str(tmp_path / "e.png")}]


@both_ways
def test_files_of_several_folders_have_their_own_paths(streaming, tmp_path):
    files = [
        write_table(tmp_path / name / "a.jsonl", path_rows(tmp_path / name, rows))
        for name, rows in (("one", range(3)), ("two", range(3, 8)))
    ]
    for source in (files, [str(file) for file in files], str(tmp_path / "*" / "a.jsonl")):
        assert contents(load_pairs(source, streaming=streaming)) == known(IMAGES)


def test_a_name_may_have_brackets(tmp_path):
    path = write_table(tmp_path / "set [1]" / "a.jsonl", path_rows(tmp_path / "set [1]"))
    assert contents(load_pairs(path)) == known(IMAGES)


@both_ways
def test_a_folder_of_tables_has_the_splits_of_their_names(streaming, tmp_path):
    for name, rows in {
        "data/train-00000-of-00002-ab12.parquet": range(0, 2),
        "data/train-00001-of-00002-cd34.parquet": range(2, 4),
        "data/validation_unique-00000-of-00001.parquet": range(4, 5),
        "data/dev/rest.parquet": range(5, 8),
    }.items():
        write_table(tmp_path / name, stored_pairs(rows).to_list())
    (tmp_path / "README.md").write_text("Test data")
    splits = {"train": IMAGES[:4], "validation_unique": IMAGES[4:5], "validation": IMAGES[5:]}
    for split, pairs in splits.items():
        assert contents(load_pairs(tmp_path, split=split, streaming=streaming)) == known(pairs)
    with pytest.raises(ValueError, match="no split 'test'; its splits: validation, train, validation_unique"):
        load_pairs(tmp_path, split="test")


def test_an_arrow_file_is_read_where_it_is(tmp_path):
    table = stored_pairs().data.table
    for name, new in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with new(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
        assert contents(load_pairs(tmp_path / name)) == known(IMAGES)
    loaded = load_pairs(tmp_path / "stream.arrow")
    assert [file["filename"] for file in loaded.cache_files] == [str(tmp_path / "stream.arrow")]


# ---- Data sets ---------------------------------------------------------------------------------------------------


@both_ways
def test_a_saved_data_set_is_read(streaming, tmp_path):
    stored_pairs().save_to_disk(tmp_path / "one")
    DatasetDict(train=stored_pairs(range(4)), test=stored_pairs(range(4, 8))).save_to_disk(tmp_path / "two")
    assert contents(load_pairs(tmp_path / "one", streaming=streaming)) == known(IMAGES)
    assert contents(load_pairs(tmp_path / "two", split="test", streaming=streaming)) == known(IMAGES[4:])
    with pytest.raises(ValueError, match="two has no split 'dev'; its splits: train, test"):
        load_pairs(tmp_path / "two", split="dev")


def test_a_loaded_data_set_is_taken():
    dataset = stored_pairs()
    assert load_pairs(dataset) is dataset
    assert load_pairs(DatasetDict(train=dataset)) is dataset
    assert contents(load_pairs(dataset, streaming=True)) == known(IMAGES)
    with pytest.raises(ValueError, match="the data set has no split 'test'; its splits: train"):
        load_pairs(DatasetDict(train=dataset), split="test")


def test_options_reach_the_pairs(tmp_path):
    rows = [{"caption": "p", "left": "a", "right": "b", "label_0": label} for label in (1.0, 0.5)]
    options = {"column_map": {"jpg_0": "left", "jpg_1": "right"}, "ties": "half", "label_noise": 0.999, "seed": 3}
    path = write_table(tmp_path / "a.jsonl", rows)
    assert [tuple(row.values()) for row in load_pairs(path, **options)] == [
        ("p", str(tmp_path / "b"), str(tmp_path / "a"), 1.0),
        ("p", str(tmp_path / "b"), str(tmp_path / "a"), 0.5),
    ]
    ranked = write_table(tmp_path / "b.jsonl", [{"prompt": "p", "images": ["a", "b", "c"], "scores": [1, 2, 4]}])
    assert len(load_pairs(ranked, ranking_pairs="all", min_score_difference=2)) == 2
    judged = {"path_A": "a", "path_B": "b", "prompt": "p", "VQ": "A", "MQ": "B", "TA": "A"}
    loaded = load_pairs(write_table(tmp_path / "c.csv", [judged]), preference_dimension="MQ")
    assert loaded[0]["chosen"] == str(tmp_path / "b")
    with pytest.raises(ValueError, match="ties='x' is none of"):
        load_pairs(path, ties="x")


def test_errors_of_a_layout_name_the_source(tmp_path):
    path = write_table(tmp_path / "a.jsonl", [{"text": "p"}])
    with pytest.raises(ValueError, match=f"{path} has no known layout; its columns: text"):
        load_pairs(path)


# ---- The Hub -----------------------------------------------------------------------------------------------------


def test_a_name_is_loaded_from_the_hub(monkeypatch):
    asked = []

    def hub(name, **arguments):
        asked.append((name, arguments))
        return stored_pairs()

    monkeypatch.setattr(load, "load_dataset", hub)
    for name in ("owner/name", "name"):
        assert contents(load_pairs(name, split="test")) == known(IMAGES)
    assert asked == [(name, {"split": "test", "streaming": False}) for name in ("owner/name", "name")]


def test_a_split_that_the_hub_does_not_have_is_named(monkeypatch):
    def hub(name, **arguments):
        raise ValueError("Unknown split \"dev\". Should be one of ['train', 'test'].")

    monkeypatch.setattr(load, "load_dataset", hub)
    with pytest.raises(
        ValueError, match=r"'owner/name' cannot be loaded with split='dev'.*one of \['train', 'test'\]"
    ):
        load_pairs("owner/name", split="dev")


def test_a_name_that_is_nowhere_says_where_was_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=f"neither a file or folder here .*exists is {tmp_path}.*nor a data set of the"
    ):
        load_pairs("owner/name")


# ---- Files and folders that cannot be read -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b/c/pairs.jsonl", "a/b/c/", "a/b/*.tar", "/nowhere/a.csv", "./a"])
def test_a_missing_path_names_the_nearest_folder(name, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "other").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    nearest = "/" if name.startswith("/") else tmp_path / "a"
    with pytest.raises(
        ValueError, match=rf"(there is no file or folder|no file matches) .*that exists is {nearest}\)"
    ):
        load_pairs(name)


def make_images(folder: Path) -> Path:
    write_files(folder, [jpeg(0)])
    return folder


def make_mixed(folder: Path) -> Path:
    write_table(folder / "a.jsonl", [{"prompt": "p"}])
    return write_table(folder / "b.csv", [{"prompt": "p"}]).parent


def make_text(folder: Path) -> Path:
    (folder / "a.xlsx").write_text("x")
    return folder / "a.xlsx"


def make_broken(name: str):
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(b'{"prompt": "p", "chosen": \xff')
        return folder / name

    return make


UNREADABLE = {
    "empty folder": (lambda folder: folder, "is empty"),
    "images alone": (make_images, r"no file that can be read; suffixes: .jpg. It needs .*metadata.jsonl or .*\(w/l, "),
    "mixed folder": (make_mixed, "mixes kinds of files: .*a.jsonl, .*b.csv"),
    "mixed list": (lambda folder: [*make_mixed(folder).iterdir()], "mixes kinds of files"),
    "unknown suffix": (make_text, "a.xlsx: a file with the suffix '.xlsx' is none of .parquet, .json"),
    "empty list": (lambda folder: [], "The list of files is empty"),
    "broken JSON": (make_broken("a.json"), "a.json cannot be read"),
    "broken parquet": (make_broken("a.parquet"), "a.parquet cannot be read"),
    "broken Arrow": (make_broken("a.arrow"), "a.arrow cannot be read"),
    "broken metadata": (lambda folder: make_broken("metadata.jsonl")(folder).parent, "metadata.jsonl cannot be read"),
    "broken tar": (make_broken("a.tar"), "a.tar cannot be read"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named(name, tmp_path):
    make, message = UNREADABLE[name]
    with pytest.raises(ValueError, match=message):
        load_pairs(make(tmp_path))


# ---- Folders of samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_metadata_may_be_in_a_folder_of_its_split(split, tmp_path):
    (tmp_path / split).mkdir()
    image_folder(tmp_path / split)
    assert contents(load_pairs(tmp_path, split=split)) == known(IMAGES)


def test_metadata_may_have_columns_of_plain_paths(tmp_path):
    write_table(tmp_path / "metadata.jsonl", path_rows(tmp_path, prefix="./"))
    assert contents(load_pairs(tmp_path)) == known(IMAGES)


def test_metadata_makes_images_of_file_names(tmp_path):
    assert load_pairs(image_folder(tmp_path)).features["chosen"] == Image()


@pytest.mark.parametrize(
    "names",
    [("w", "l"), ("chosen", "rejected"), ("win", "lose"), ("good", "bad"), ("preferred", "rejected")],
    ids="/".join,
)
def test_two_folders_are_read_by_any_of_their_names(names, tmp_path):
    assert contents(load_pairs(two_folders(tmp_path, names))) == known(IMAGES)


@both_ways
@pytest.mark.parametrize(("pairs", "feature"), [(IMAGES, Image), (VIDEOS, Video), (AUDIO, Audio)], ids=["i", "v", "a"])
def test_two_folders_may_hold_images_videos_or_audio(pairs, feature, streaming, tmp_path):
    loaded = load_pairs(two_folders(tmp_path, pairs=pairs), streaming=streaming)
    assert isinstance(loaded.features["chosen"], feature) and isinstance(loaded.features["rejected"], feature)
    assert contents(loaded) == known(pairs)


def test_suffixes_and_subfolders_of_two_folders_may_differ(tmp_path, caplog):
    for name, suffix, data in (("w", ".png", b"chosen"), ("l", ".JPG", b"rejected")):
        write_files(tmp_path / name / "deep", [data], suffix)
    (tmp_path / "w" / "deep" / "0.txt").write_text("a cat")
    (tmp_path / "w" / ".hidden.png").write_bytes(b"")
    (tmp_path / "l" / "0.npz").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "trl_diffusion_pref"):
        assert contents(load_pairs(tmp_path)) == [("a cat", b"chosen", b"rejected")]
    assert caplog.messages == [f"{tmp_path / 'l'}: 1 files are ignored, such as 0.npz."]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "l" / "3.jpg").unlink(), "w/3.jpg: no file of the same name in .*/l"),
        (lambda folder: (folder / "w" / "3.jpg").unlink(), "l/3.jpg: no file of the same name in .*/w"),
        (lambda folder: (folder / "w" / "3.txt").unlink(), "w/3.jpg: no caption. Write it .* such as to 3.txt"),
        (lambda folder: (folder / "w" / "3.txt").write_text(" \n"), "w/3.jpg: no caption"),
        (lambda folder: write_files(folder / "w", [b""], ".png"), "w/0.jpg and .*w/0.png have the same name"),
        (
            lambda folder: (folder / "l" / "3.jpg").rename(folder / "l" / "3.mp4"),
            "mixes kinds of files: .*0.jpg|7.jpg",
        ),
        (lambda folder: write_files(folder / "win", []) or write_files(folder / "lose", []), "w/l and win/lose"),
        (lambda folder: [shutil.rmtree(folder / x) or (folder / x).mkdir() for x in "wl"], "has no images, videos"),
    ],
    ids=["partner", "preferred", "caption", "empty caption", "twice", "kinds", "names", "empty"],
)
def test_an_incomplete_pair_of_folders_is_named(change, message, tmp_path):
    change(two_folders(tmp_path))
    with pytest.raises(ValueError, match=message):
        load_pairs(tmp_path)


# ---- Tars --------------------------------------------------------------------------------------------------------


@both_ways
def test_tars_are_read_one_by_one_by_glob_and_by_folder(streaming, tmp_path):
    pick_a_pic_tars(tmp_path)
    sources = {tmp_path: IMAGES, str(tmp_path / "*.tar"): IMAGES, tmp_path / "00001.tar": IMAGES[4:]}
    for source, pairs in sources.items():
        assert contents(load_pairs(source, streaming=streaming)) == known(pairs)


def test_members_that_no_layout_needs_are_not_read(tmp_path):
    members = [member for row, pair in enumerate(IMAGES) for member in pick_a_pic_members(f"./{row}", pair)]
    extra = [("./0.scores.pth", b"no pickle"), ("./0.id.json", b"{"), ("./._0.jpg_0.jpg", b""), ("./README", b"")]
    assert contents(load_pairs(write_tar(tmp_path / "a.tar", extra[2:] + extra[:2] + members))) == known(IMAGES)


def test_members_of_other_names_are_mapped(tmp_path):
    members = [
        (f"{row}.{name}", data)
        for row, pair in enumerate(VIDEOS)
        for name, data in (("txt", pair.prompt.encode()), ("win.mp4", pair.chosen), ("lose.mp4", pair.rejected))
    ]
    mapping = {"prompt": "txt", "chosen": "win.mp4", "rejected": "lose.mp4"}
    for streaming in (False, True):
        loaded = load_pairs(write_tar(tmp_path / "a.tar", members), column_map=mapping, streaming=streaming)
        assert contents(loaded) == known(VIDEOS)


def test_a_tar_that_changed_is_read_again(tmp_path):
    for pairs in (IMAGES[:4], IMAGES[4:]):
        members = [member for row, pair in enumerate(pairs) for member in pick_a_pic_members(str(row), pair)]
        path = write_tar(tmp_path / "a.tar", members)
        os.utime(path, ns=(0, 10**9 * len(pairs[0].prompt) + ord(pairs[0].prompt[-1])))
        assert contents(load_pairs(path)) == known(pairs)


@both_ways
def test_a_missing_member_is_named_with_key_and_tar(streaming, tmp_path, monkeypatch):
    # It is found before anything is copied.
    monkeypatch.setattr(Dataset, "from_generator", lambda *_, **__: pytest.fail("copied"))
    members = [member for row, pair in enumerate(IMAGES) for member in pick_a_pic_members(f"{row:04d}", pair)]
    for missing in ("0000.jpg_1.jpg", "0006.label_0.txt"):
        path = write_tar(tmp_path / "a.tar", [member for member in members if member[0] != missing])
        key, column = missing.split(".", 1)
        with pytest.raises(
            ValueError, match=f"a.tar: key '{key}' has no member {column}; found: .*original_prompt.txt"
        ):
            list(load_pairs(path, streaming=streaming))


@both_ways
def test_a_text_in_another_encoding_is_named(streaming, tmp_path):
    members = dict(pick_a_pic_members("0", IMAGES[0])) | {"0.original_prompt.txt": b"caf\xe9"}
    with pytest.raises(ValueError, match="a.tar: key '0', member original_prompt.txt: the text is not in UTF-8"):
        list(load_pairs(write_tar(tmp_path / "a.tar", list(members.items())), streaming=streaming))


def add_member(path: Path, name: str, kind: bytes = tarfile.REGTYPE) -> None:
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info, io.BytesIO())


@both_ways
@pytest.mark.parametrize(
    ("name", "kind"),
    [("../9.jpg_0.jpg", tarfile.REGTYPE), ("/9.jpg_0.jpg", tarfile.REGTYPE), ("9.jpg_0.jpg", tarfile.SYMTYPE)]
    + [("9.jpg_0.jpg", tarfile.LNKTYPE), ("a/../9.txt", tarfile.REGTYPE)],
    ids=["parent", "absolute", "symbolic link", "hard link", "parent inside"],
)
def test_a_tar_that_leads_elsewhere_is_refused(name, kind, streaming, tmp_path):
    pick_a_pic_tars(tmp_path)
    add_member(tmp_path / "00001.tar", name, kind)
    with pytest.raises(ValueError, match="00001.tar: the member .* is a link or a sparse file, or its path leads out"):
        list(load_pairs(tmp_path, streaming=streaming))


@both_ways
def test_a_tar_whose_members_could_grow_is_refused(streaming, tmp_path):
    """A compressed one, and a sparse member of 2 TB."""
    pick_a_pic_tars(tmp_path)
    first, second = tmp_path / "00000.tar", tmp_path / "00001.tar"
    packed = gzip.compress(second.read_bytes())
    with tarfile.open(second, "a", format=tarfile.PAX_FORMAT) as archive:
        sparse = tarfile.TarInfo("9.jpg_0.jpg")
        sparse.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2 * 10**12)}
        archive.addfile(sparse, io.BytesIO())
    with pytest.raises(ValueError, match="00001.tar: the member '9.jpg_0.jpg' is a link or a sparse file"):
        list(load_pairs(tmp_path, streaming=streaming))
    second.unlink()
    first.write_bytes(packed)
    with pytest.raises(ValueError, match="00000.tar cannot be read as a tar archive .* It is compressed; unpack it"):
        list(load_pairs(first, streaming=streaming))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.txt", b""), ("b.txt", b"")], "a.tar has no known layout; its columns: txt"),
        ([("README", b"")], "a.tar has no members of a WebDataset, which are named key.column"),
        ([*pick_a_pic_members("0", IMAGES[0]), ("0.jpg_0.jpg", b"")], "key '0' has the member jpg_0.jpg twice"),
    ],
    ids=["layout", "names", "twice"],
)
def test_a_tar_without_rows_of_a_layout_is_named(members, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_pairs(write_tar(tmp_path / "a.tar", members))


def test_undecodable_images_are_left_to_the_encoder(tmp_path):
    rows = [{"prompt": "p", "chosen": cell(b"no image"), "rejected": cell(jpeg(0))}]
    Dataset.from_list(rows).cast_column("chosen", Image()).cast_column("rejected", Image()).to_parquet(
        tmp_path / "a.parquet"
    )
    assert contents(load_pairs(tmp_path / "a.parquet")) == [("p", b"no image", jpeg(0))]


def test_a_folder_of_parquet_files_is_read(tmp_path):
    assert contents(load_pairs(pick_a_pic(tmp_path).parent)) == known(IMAGES)

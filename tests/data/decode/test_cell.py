"""Files of cells, and which kind of sample they hold."""

import io
import os
import zipfile
from importlib.util import find_spec

import pyarrow as pa
import pytest
from datasets import Dataset, Image, List, Value
from helpers import tiny
from helpers.encoding import encode_rows
from helpers.pipelines import png
from PIL import Image as PILImage

from trl_diffusion_pref.data import EncodingOptions, preparation_for
from trl_diffusion_pref.data.decode.cell import CellProblem, kind_of, paths_outside, read_cell
from trl_diffusion_pref.families import family_for


PNG = png(PILImage.effect_noise((16, 16), 50))["bytes"]


def test_every_form_of_a_file_is_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("inside.png", PNG)
    inside = f"zip://inside.png::{tmp_path / 'a.zip'}"
    for cell in (PNG, path, str(path), inside, {"bytes": PNG, "path": None}, {"bytes": None, "path": str(path)}):
        assert read_cell(cell) == PNG


@pytest.fixture
def damaged_zip(tmp_path) -> str:
    """A path into an archive whose member lost some of its bytes."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", os.urandom(5000))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[1000:1100] = bytes(100)
    (tmp_path / "a.zip").write_bytes(data)
    return f"zip://a.png::{tmp_path / 'a.zip'}"


def url(address: str, package: str):
    """A URL that is read with a package, which this environment does not have."""
    skip = pytest.mark.skipif(find_spec(package) is not None, reason=f"{package} is installed")
    return pytest.param(address, f"the file at {address} cannot be read here .*{package}", marks=skip)


UNREADABLE = [
    url("http://example.com/a.png", "aiohttp"),
    url("s3://bucket/a.png", "s3fs"),
    url("gs://bucket/a.png", "gcsfs"),
    ("data:image/png;base64,xxx", "cannot be read .*Incorrect padding"),
    ("data:nothing", "cannot be read"),
    ("foo://a.png", "cannot be read .*Protocol not known: foo"),
    ("/", "/ is a folder, not a file"),
    ("", "the path is empty"),
    (b"", "the file has no bytes"),
    ("/dev/zero", "/dev/zero is a pipe or a device, not a file"),
    ("a\0b", "cannot be read .*embedded null byte"),
    ("/nowhere/x.png", "no file at /nowhere/x.png"),
    ({"bytes": None, "path": "foo://a.png"}, "the file at foo://a.png cannot be read"),
]


@pytest.mark.parametrize(("cell", "message"), UNREADABLE, ids=str)
def test_a_file_that_cannot_be_read_is_a_problem_of_its_cell(cell, message):
    with pytest.raises(CellProblem, match=message):
        read_cell(cell)


@pytest.mark.parametrize("name", ["sd", "wan", "stable_audio"])
def test_every_preparation_reports_damaged_archives_and_wrong_types(name, damaged_zip, tiny_pipeline):
    pipeline = tiny_pipeline if name == "sd" else tiny.build(name)
    preparation = preparation_for(pipeline, family_for(pipeline))
    with pytest.raises(CellProblem, match="a.zip cannot be read .BadZipFile"):
        preparation.decode(damaged_zip)
    with pytest.raises(CellProblem, match="a cell of type int"):
        preparation.decode(5)


def test_a_long_data_url_is_shortened_in_messages():
    with pytest.raises(CellProblem) as caught:
        read_cell("data:image/png;base64," + "x" * 10001)
    assert len(str(caught.value)) < 250


def test_an_integer_column_is_reported_by_row(tiny_pipeline, tmp_path):
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": [1], "rejected": [2]})
    with pytest.raises(ValueError, match="row 0, column 'chosen': a cell of type int is not an image"):
        encode_rows(
            dataset,
            tiny_pipeline,
            family_for(tiny_pipeline),
            EncodingOptions(resolution=16),
            what="train_dataset",
            cache_folder=tmp_path,
            batch_size=2,
        )


def test_columns_keep_types_that_hold_no_media(tiny_pipeline):
    preparation = preparation_for(tiny_pipeline, family_for(tiny_pipeline))
    assert preparation.feature(Value("int64")) == Value("int64")
    assert preparation.feature(Image()) == Image(decode=False)
    assert preparation.feature(List(Image())) == List(Image(decode=False))


@pytest.mark.parametrize(
    ("brands", "kind"),
    [
        (["heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1", "avif", "avis"], "image"),
        (["isom", "mp42", "qt  ", "iso5", "3gp4"], "video"),
        (["M4A ", "M4B "], "audio"),
    ],
)
def test_the_brand_of_a_container_is_its_kind(brands, kind):
    for brand in brands:
        assert kind_of(b"\x00\x00\x00\x18ftyp" + brand.encode() + bytes(40)) == kind, brand


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_images_that_pillow_writes_are_images(format):
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8)).save(buffer, format=format)
    assert kind_of(buffer.getvalue()) == "image"


def test_paths_are_found_in_lists_of_fixed_length_too():
    cells = pa.chunked_array([pa.array([["a.png", "b.png"]], type=pa.list_(pa.string(), 2))])
    assert list(paths_outside(cells)) == ["a.png", "b.png"]

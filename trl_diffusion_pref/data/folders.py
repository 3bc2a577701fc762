"""Preference data without a table: two folders with files of equal names, and WebDataset tars."""

import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath

from datasets import Audio, Dataset, Features, Image, IterableDataset, Value, Video
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from .decode.cell import Kind
from .known_layouts import recognise_layout


logger = logging.getLogger(__name__)

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"),
    "video": (".mp4", ".mov", ".mkv", ".webm", ".avi"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"),
}
_FEATURES = {"image": Image, "video": Video, "audio": Audio}
# Names of the folder of preferred files, and of the other one.
FOLDER_NAMES = (("w", "l"), ("chosen", "rejected"), ("win", "lose"), ("good", "bad"), ("preferred", "rejected"))
_CAPTIONS = (".txt", ".caption")
# Keys of a tar whose members tell its columns.
_FIRST_KEYS = 100


def kind_of_file(name: str) -> Kind | None:
    """Whether a file is an image, a video or audio, by its suffix."""
    suffix = PurePosixPath(name).suffix.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)


# ---- Two folders -------------------------------------------------------------------------------------------------


def pair_folders(folder: Path) -> tuple[Path, Path] | None:
    """The folders of preferred and of rejected files in a folder, or None.

    Raises:
        ValueError: There are several such pairs of folders.
    """
    found = [names for names in FOLDER_NAMES if all((folder / name).is_dir() for name in names)]
    if len(found) > 1:
        listed = " and ".join("/".join(names) for names in found)
        raise ValueError(f"{folder} has several pairs of folders: {listed}. Keep one.")
    return (folder / found[0][0], folder / found[0][1]) if found else None


def load_pair_folders(preferred: Path, rejected: Path) -> Dataset:
    """Pairs of the files that have equal names in two folders, also in their subfolders, sorted by name.

    The suffixes of the two files may differ. The caption is the text of `x.txt` or `x.caption` beside the preferred
    file. Hidden files are ignored.

    Raises:
        ValueError: A file has no partner or no caption, or files of several kinds are mixed; the message names them.
    """
    chosen_files, rejected_files = _media_files(preferred), _media_files(rejected)
    for files, others, other in ((chosen_files, rejected_files, rejected), (rejected_files, chosen_files, preferred)):
        alone = [path for name, path in files.items() if name not in others]
        if alone:
            raise ValueError(f"{_listed(alone)}: no file of the same name in {other}.")
    if not chosen_files:
        raise ValueError(f"{preferred} has no images, videos or audio files.")
    kinds = {kind_of_file(path.name): path for path in (*chosen_files.values(), *rejected_files.values())}
    if len(kinds) > 1:
        raise ValueError(f"{preferred.parent} mixes kinds of files: {', '.join(map(str, kinds.values()))}.")
    [kind] = kinds
    rows = {
        "prompt": _captions(chosen_files),
        "chosen": [str(path) for path in chosen_files.values()],
        "rejected": [str(rejected_files[name]) for name in chosen_files],
    }
    dataset = Dataset.from_dict(rows)
    for column in ("chosen", "rejected"):
        dataset = dataset.cast_column(column, _FEATURES[kind or "image"]())
    return dataset


def _media_files(folder: Path) -> dict[str, Path]:
    """Images, videos and audio files by their path in the folder without suffix, sorted."""
    files: dict[str, Path] = {}
    ignored = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if kind_of_file(path.name) is None:
            if path.suffix.lower() not in _CAPTIONS:
                ignored.append(path)
            continue
        other = files.setdefault(str(name.with_suffix("")), path)
        if other != path:
            raise ValueError(f"{other} and {path} have the same name without suffix. Keep one.")
    if ignored:
        logger.warning("%s: %d files are ignored, such as %s.", folder, len(ignored), ignored[0].name)
    return files


def _captions(files: Mapping[str, Path]) -> list[str]:
    """The captions beside files."""
    captions: list[str] = []
    without = []
    for path in files.values():
        beside = [path.with_suffix(suffix) for suffix in _CAPTIONS if path.with_suffix(suffix).is_file()]
        caption = beside[0].read_text(encoding="utf-8").strip() if beside else ""
        if not caption:
            without.append(path)
        captions.append(caption)
    if without:
        name = without[0].with_suffix(".txt").name
        raise ValueError(f"{_listed(without)}: no caption. Write it beside the file, such as to {name}.")
    return captions


def _listed(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - 10} more" if len(paths) > 10 else ""
    return ", ".join(map(str, paths[:10])) + more


# ---- WebDataset tars ---------------------------------------------------------------------------------------------


def load_tars(
    tars: Sequence[Path], *, label: str, column_map: Mapping[str, str] | None, streaming: bool
) -> Dataset | IterableDataset:
    """The members of WebDataset tars that belong to a known layout, one row per key.

    The loader "webdataset" of `datasets` ignores links, decodes members that nobody needs, also pickled ones, and
    does not say where a member is missing, so the tars are read here. A stored data set is copied to the cache, after
    all tars have been checked; a stream is checked as it is read.

    Args:
        label: How messages call the data set.
        column_map: Members by the names that the layout has for them.

    Raises:
        ValueError: The members have no known layout, one is missing, or a tar has links or paths that lead out of it.
            The message names key, tar and member.
    """
    fields = dict.fromkeys(field for tar in tars[:1] for _, key in islice(_keys(tar), _FIRST_KEYS) for field in key)
    if not fields:
        raise ValueError(f"{tars[0]} has no members of a WebDataset, which are named key.column, such as 0.jpg_0.jpg.")
    columns = recognise_layout(list(fields), label, column_map).columns.values()
    features = Features({column: _feature(column) for column in columns})
    arguments = {"tars": [str(tar) for tar in tars], "columns": tuple(features)}
    if streaming:
        return IterableDataset.from_generator(_rows, features=features, gen_kwargs=arguments)
    stamps = []
    for tar in tars:
        for key, members in _keys(tar):
            _check_members(tar, key, members, features)
        stamps.append((str(tar.resolve()), os.stat(tar).st_mtime_ns, os.stat(tar).st_size))
    fingerprint = Hasher.hash([stamps, arguments["columns"]])
    try:
        return Dataset.from_generator(_rows, features=features, gen_kwargs=arguments, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(str(error.__cause__)) from error
        raise


def _feature(column: str) -> Image | Value:
    kind = kind_of_file(column)
    # Video and audio are kept as bytes: writing them by type needs torchcodec.
    return Image() if kind == "image" else Value("string" if kind is None else "binary")


def _rows(tars: list[str], columns: tuple[str, ...]) -> Iterator[dict[str, object]]:
    """The rows of tars."""
    for tar in tars:
        with _opened(tar) as archive:
            for key, members in _keys_of(archive, tar):
                _check_members(tar, key, members, columns)
                row: dict[str, object] = {}
                for column in columns:
                    file = archive.extractfile(members[column])
                    data = file.read() if file is not None else b""
                    kind = kind_of_file(column)
                    row[column] = {"bytes": data, "path": members[column].name} if kind == "image" else data
                    if kind is None:
                        row[column] = _text(data, f"{tar}: key {key!r}, member {column}")
                yield row


def _text(data: bytes, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: the text is not in UTF-8 ({error}).") from error


@contextmanager
def _opened(tar: str | Path) -> Iterator[tarfile.TarFile]:
    try:
        # Uncompressed alone: a member of a compressed archive could be as large as it wants.
        with tarfile.open(tar, "r:") as archive:
            yield archive
    except (tarfile.TarError, EOFError) as error:
        reason = str(error).splitlines()[0]
        advice = "It is compressed; unpack it." if _is_compressed(tar) else "Copy it again."
        raise ValueError(f"{tar} cannot be read as a tar archive ({reason}). {advice}") from error


def _is_compressed(file: str | Path) -> bool:
    """Whether a file begins as gzip, bzip2, xz or zstandard files do."""
    with open(file, "rb") as start:
        return start.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))


def _check_members(tar: str | Path, key: str, members: Mapping[str, object], columns: Iterable[str]) -> None:
    missing = [column for column in columns if column not in members]
    if missing:
        raise ValueError(f"{tar}: key {key!r} has no member {', '.join(missing)}; found: {', '.join(members)}.")


def _keys(tar: str | Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    with _opened(tar) as archive:
        yield from _keys_of(archive, tar)


def _keys_of(archive: tarfile.TarFile, tar: str | Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Each key with its members by column; a member is named key.column, and those of a key follow each other."""
    current, members = None, dict[str, tarfile.TarInfo]()
    for member in archive:
        path = PurePosixPath(member.name)
        # A sparse member may claim terabytes of zeros.
        is_file = member.isreg() and not member.issparse()
        if path.is_absolute() or ".." in path.parts or not (is_file or member.isdir()):
            raise ValueError(
                f"{tar}: the member {member.name!r} is a link or a sparse file, or its path leads out of the archive, "
                "which is not read. Pack the archive again from plain files."
            )
        name = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]*)", member.name)
        if member.isdir() or name is None:
            continue
        key, column = name.groups()
        if key != current and members:
            yield str(current), members
            members = {}
        if column in members:
            raise ValueError(f"{tar}: key {key!r} has the member {column} twice.")
        current, members[column] = key, member
    if members:
        yield str(current), members

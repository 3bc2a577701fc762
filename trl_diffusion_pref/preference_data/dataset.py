"""Writes rows with samples as a data set in a folder, beside a record of what made it and a card."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Audio, Dataset, Features, Image, List, Value, load_from_disk
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from ..evaluation.sample_files import frame_files, remove_unfinished
from ..export.files import unfinished_name, write_whole
from ..families.base import Modality
from ..version import __version__


RECORD, CARD = "options.json", "README.md"
_TEMPLATE = Path(__file__).parent / "card.md"
_TASKS: dict[Modality, str] = {"image": "text-to-image", "video": "text-to-video", "audio": "text-to-audio"}
_SHOWN = 200


def cell(file: Path) -> Any:
    """A sample as a cell of a data set, which refers to its file; of a video, to those of its frames."""
    if file.is_dir():
        return [{"bytes": None, "path": str(frame)} for frame in frame_files(file)]
    return {"bytes": None, "path": str(file)}


def sample_feature(modality: Modality) -> Any:
    """The type of a column of samples: images, videos as lists of frames, or audio files."""
    if modality == "video":
        return List(Image())
    # Decoding audio needs torchcodec, and the trainers read the file.
    return Image() if modality == "image" else Audio(decode=False)


def _as_made(feature: Any) -> Any:
    """The type in which cells are put into a data set: encoding audio by its own type needs torchcodec."""
    if isinstance(feature, Audio):
        return {"bytes": Value("binary"), "path": Value("string")}
    return List(_as_made(feature.feature)) if isinstance(feature, List) else feature


def check_stored(folder: Path, record: Mapping[str, Any]) -> None:
    """Raises where a folder holds a data set that was made with other options.

    Args:
        record: Options that must be equal, as far as they are known already.

    Raises:
        ValueError: Says which ones differ.
    """
    if not folder.exists():
        return
    file = folder / RECORD
    stored = json.loads(file.read_text())["options"] if file.is_file() else None
    wanted = json.loads(json.dumps(record))
    different = ["it has no options.json"]
    if stored is not None:
        different = differences({name: value for name, value in stored.items() if name in wanted}, wanted)
    if different:
        raise ValueError(
            f"{folder} holds the results of other options: {'; '.join(different)}. Choose another output, or remove "
            f"{folder}: the samples and scores beside it are used again where they fit."
        )


def load_stored(folder: Path) -> Dataset:
    """The data set in a folder."""
    return load_from_disk(str(folder))


def differences(stored: Any, wanted: Any, name: str = "") -> list[str]:
    """In which entries two records differ, in words."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = list(dict.fromkeys([*stored, *wanted]))
        parts = (differences(stored.get(key), wanted.get(key), f"{name} {key}".strip()) for key in keys)
        return [difference for part in parts for difference in part]
    if stored == wanted:
        return []
    return [f"{name} was {_short(stored)} and is {_short(wanted)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def write_dataset(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    features: Mapping[str, Any],
    record: Mapping[str, Any],
    card: Mapping[str, Any],
) -> Dataset:
    """Writes a data set with its samples, in shards, whole or not at all; the main process does.

    Args:
        folder: As `load_from_disk` reads it; does not exist yet, unless another process has made it.
        rows: At least one.
        features: The columns' types.
        record: What made it, as JSON can hold it.
        card: For the card's template.

    Returns:
        The stored data set, in every process.
    """
    state = PartialState()
    if state.is_main_process and not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder.parent)
        unfinished = unfinished_name(folder)
        try:
            made = Features({name: _as_made(feature) for name, feature in features.items()})
            columns = {name: [row[name] for row in rows] for name in features}
            dataset = Dataset.from_dict(columns, features=made)
            for name, feature in features.items():
                if made[name] != feature:
                    dataset = dataset.cast_column(name, feature)
            # Files are embedded, so that the folder can be moved.
            dataset.save_to_disk(str(unfinished))
            text = {"options": record, "counts": card["counts"]}
            write_whole(unfinished / RECORD, json.dumps(text, indent=1, ensure_ascii=False).encode())
            write_whole(unfinished / CARD, str(dataset_card(card)).encode())
            try:
                os.rename(unfinished, folder)
            except OSError:
                # Another run of the same options may have written it meanwhile.
                same = (folder / RECORD).is_file() and json.loads((folder / RECORD).read_text(encoding="utf-8")) == (
                    json.loads(json.dumps(text))
                )
                if not same:
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    state.wait_for_everyone()
    return load_stored(folder)


def dataset_card(values: Mapping[str, Any]) -> DatasetCard:
    """The card: how the data set was made, from what, and what was left out.

    Args:
        values: `modality`, `kind` ("pairs" or "rankings"), `models`, `rewards`, `options`, `counts`, `columns`.
    """
    data = DatasetCardData(
        task_categories=["image-to-image" if "image" in values["columns"] else _TASKS[values["modality"]]],
        tags=["preference", "synthetic", "trl-diffusion-pref"],
    )
    return DatasetCard.from_template(data, template_path=str(_TEMPLATE), version=__version__, **values)


def push_dataset(
    folder: str | os.PathLike[str], repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Uploads pairs or rankings with their card to the Hub.

    Args:
        folder: `pairs` or `rankings` in the output of `make_pairs` or `make_rankings`.
        repo_id: Of the data set, "user/name"; it is made if it does not exist.
        private: Whether a new repository is private.
        token: Of the Hub; default the one that is stored.

    Returns:
        The repository's address.

    Raises:
        ValueError: The folder holds no data set.
    """
    path = Path(folder)
    if not (path / CARD).is_file():
        raise ValueError(f"{path} holds no data set with a card; pass the folder that make_pairs wrote, OUTPUT/pairs.")
    api = HfApi(token=token)
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    # Before the rows: pushing them adds what the viewer needs to the card that is there.
    api.upload_file(
        path_or_fileobj=path / CARD, path_in_repo=CARD, repo_id=url.repo_id, repo_type="dataset", token=token
    )
    load_from_disk(str(path)).push_to_hub(url.repo_id, private=private, token=token)
    return str(url)

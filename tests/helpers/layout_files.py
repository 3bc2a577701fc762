"""Eight pairs, written to disk in every published layout."""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Audio, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from helpers.media import noise, wav
from trl_diffusion_pref.data.decode.cell import read_cell, undecoded_feature


class Known(NamedTuple):
    """A pair, and where the chosen sample stands in layouts in which that differs."""

    prompt: str
    chosen: bytes
    rejected: bytes
    chosen_first: bool


def jpeg(seed: int, side: int = 4) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


ORDER = (True, False, False, True, True, False, True, False)
IMAGES = [Known(f"prompt {row}", jpeg(row), jpeg(100 + row), first) for row, first in enumerate(ORDER)]
AUDIO = [
    Known(f"sound {row}", wav(noise(row, samples=4)), wav(noise(100 + row, samples=4)), first)
    for row, first in enumerate(ORDER)
]
VIDEOS = [
    Known(f"video {row}", b"\0\0\0\x18ftypisom" + bytes([row]), b"\0\0\0\x18ftypisom" + bytes([100 + row]), first)
    for row, first in enumerate(ORDER)
]


def in_order(pair: Known) -> tuple[bytes, bytes]:
    """The two samples as layouts store them whose columns say nothing about the preference."""
    return (pair.chosen, pair.rejected) if pair.chosen_first else (pair.rejected, pair.chosen)


def contents(dataset: Any) -> list[tuple[Any, ...]]:
    """Prompt and the bytes of both samples of each row, in a stream or a stored data set."""
    for column, feature in (dataset.features or {}).items():
        dataset = dataset.cast_column(column, undecoded_feature(feature))
    return [(row["prompt"], read_cell(row["chosen"]), read_cell(row["rejected"])) for row in dataset]


def known(pairs: Sequence[Known]) -> list[tuple[Any, ...]]:
    return [pair[:3] for pair in pairs]


# ---- Writing -----------------------------------------------------------------------------------------------------


def write_files(folder: Path, samples: Sequence[bytes], suffix: str = ".jpg") -> list[str]:
    """Files 0.jpg, 1.jpg, ... in a folder; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(samples):
        (folder / f"{number}{suffix}").write_bytes(data)
    return [f"{number}{suffix}" for number in range(len(samples))]


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return path


def image_parquet(path: Path, rows: Sequence[dict[str, Any]], types: dict[str, Any]) -> Path:
    """Parquet as the Hub stores images and audio: bytes and a path, with the type in the metadata."""
    path.parent.mkdir(exist_ok=True)
    table = {name: [row[name] for row in rows] for name in rows[0]}
    as_struct = {"bytes": Value("binary"), "path": Value("string")}
    inferred = Dataset.from_dict({name: cells for name, cells in table.items() if name not in types}).features
    structs = {name: List(as_struct) if isinstance(types[name], List) else as_struct for name in types}
    dataset = Dataset.from_dict(table, features=Features({**{name: inferred.get(name) for name in table}, **structs}))
    for name, feature in types.items():
        dataset = dataset.cast_column(name, feature)
    dataset.to_parquet(path)
    return path


def cell(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": None}


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pick_a_pic_members(key: str, pair: Known) -> list[tuple[str, bytes]]:
    first, second = in_order(pair)
    return [
        (f"{key}.jpg_0.jpg", first),
        (f"{key}.jpg_1.jpg", second),
        (f"{key}.label_0.txt", str(float(pair.chosen_first)).encode()),
        (f"{key}.label_1.txt", str(float(not pair.chosen_first)).encode()),
        (f"{key}.original_prompt.txt", pair.prompt.encode()),
    ]


# ---- One writer per layout ---------------------------------------------------------------------------------------


def pick_a_pic(folder: Path) -> Path:
    rows = []
    for pair in IMAGES:
        first, second = in_order(pair)
        labels = {"label_0": float(pair.chosen_first), "label_1": float(not pair.chosen_first)}
        rows.append(
            {"caption": pair.prompt, "jpg_0": first, "jpg_1": second, **labels, "has_label": True, "user_id": 1}
        )
    return write_table(folder / "train-00000-of-00001.parquet", rows)


def pick_a_pic_tars(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    half = len(IMAGES) // 2
    for shard, pairs in enumerate((IMAGES[:half], IMAGES[half:])):
        write_tar(
            folder / f"{shard:05d}.tar",
            [member for number, pair in enumerate(pairs) for member in pick_a_pic_members(f"{number:04d}", pair)],
        )
    return folder


def hpdv2_train(folder: Path, column: str = "image_path") -> Path:
    rows = []
    for number, pair in enumerate(IMAGES):
        names = write_files(folder / str(number), in_order(pair))
        paths = [f"{number}/{name}" for name in names]
        preference = [int(pair.chosen_first), int(not pair.chosen_first)]
        rows.append({"prompt": pair.prompt, column: paths, "human_preference": preference, "user_hash": "x"})
    return write_table(folder / "train.json", rows)


def hpdv2_train_file_path(folder: Path) -> Path:
    return hpdv2_train(folder, "file_path")


def hpdv2_test(folder: Path) -> Path:
    rows = []
    for number, pair in enumerate(IMAGES):
        samples = [jpeg(200 + 10 * number + index) for index in range(9)]
        best, worst = (6, 2) if pair.chosen_first else (0, 8)
        samples[best], samples[worst] = pair.chosen, pair.rejected
        ranks = dict(zip([index for index in range(9) if index not in (best, worst)], range(2, 9), strict=True))
        ranks |= {best: 1, worst: 9}
        names = write_files(folder / str(number), samples)
        paths = [f"{number}/{name}" for name in names]
        rows.append({"prompt": pair.prompt, "image_path": paths, "rank": [ranks[index] for index in range(9)]})
    return write_table(folder / "test.json", rows)


def hpdv3(folder: Path, with_confidence: bool = True) -> Path:
    names = write_files(folder, [sample for pair in IMAGES for sample in pair[1:3]])
    rows = [
        {"prompt": pair.prompt, "path1": names[2 * number], "path2": names[2 * number + 1], "model1": "a"}
        | ({"confidence": 0.9} if with_confidence else {})
        for number, pair in enumerate(IMAGES)
    ]
    return write_table(folder / "train.json", rows)


def hpdv3_without_confidence(folder: Path) -> Path:
    return hpdv3(folder, with_confidence=False)


def open_image_preferences(folder: Path) -> Path:
    rows = [
        {"prompt": pair.prompt, "chosen": cell(pair.chosen), "rejected": cell(pair.rejected), "category": "Cinematic"}
        for pair in IMAGES
    ]
    return image_parquet(folder / "train.parquet", rows, {"chosen": Image(), "rejected": Image()})


def rapidata(folder: Path, labels: Callable[[bool], dict[str, Any]]) -> Path:
    rows = []
    for pair in IMAGES:
        first, second = in_order(pair)
        rows.append(
            {"prompt": pair.prompt, "image1": cell(first), "image2": cell(second), **labels(pair.chosen_first)}
        )
    return image_parquet(folder / "train.parquet", rows, {"image1": Image(), "image2": Image()})


def rapidata_votes(folder: Path) -> Path:
    return rapidata(folder, lambda first: {"votes_image1": 9 if first else 3, "votes_image2": 3 if first else 9})


def rapidata_weighted(folder: Path) -> Path:
    return rapidata(
        folder,
        lambda first: {
            "weighted_results_image1_preference": 0.75 if first else 0.25,
            "weighted_results_image2_preference": 0.25 if first else 0.75,
        },
    )


def rapidata_aggregated(folder: Path) -> Path:
    return rapidata(
        folder,
        lambda first: {"aggregated_results": json.dumps({"image1": 9 if first else 3, "image2": 3 if first else 9})},
    )


def rapidata_detailed(folder: Path) -> Path:
    def labels(first: bool) -> dict[str, Any]:
        names = ["flux/1.jpg"] * 9 + ["sd3/1.jpg"] * 3
        votes = [{"votedFor": name, "userDetails": {"country": "IN", "userScore": 0.8}} for name in names]
        paths = ("flux/1.jpg", "sd3/1.jpg") if first else ("sd3/1.jpg", "flux/1.jpg")
        detailed = json.dumps({"votes": votes, "metadata": {}})
        return {"image1_path": paths[0], "image2_path": paths[1], "detailed_results": detailed}

    return rapidata(folder, labels)


def audio_alpaca(folder: Path) -> Path:
    rows = [
        {"prompt": pair.prompt, "chosen": cell(pair.chosen), "rejected": cell(pair.rejected), "strategy": "x"}
        for pair in AUDIO
    ]
    return image_parquet(folder / "train.parquet", rows, {"chosen": Audio(), "rejected": Audio()})


def video_align(folder: Path) -> Path:
    rows = []
    for number, pair in enumerate(VIDEOS):
        write_files(folder / f"videos/{number}", in_order(pair), ".mp4")
        better, worse = ("A", "B") if pair.chosen_first else ("B", "A")
        labels = {"VQ": better, "MQ": worse if number % 2 else "same", "TA": better}
        paths = {"path_A": f"videos/{number}/0.mp4", "path_B": f"videos/{number}/1.mp4"}
        rows.append({**paths, "prompt": pair.prompt, **labels, "fps_A": 8.0, "num_frames_A": 49})
    return write_table(folder / "train.csv", rows)


def edit_reward(folder: Path) -> Path:
    rows = []
    for number, pair in enumerate(IMAGES):
        first, second = in_order(pair)
        vote = "leftvote" if pair.chosen_first else "rightvote"
        outputs = {"left_output_image": cell(first), "right_output_image": cell(second)}
        source = {"source_img": cell(jpeg(300 + number))}
        rows.append({"instruction": pair.prompt, **source, **outputs, "vote_type": vote, "left_overall_score": 4.0})
    images = dict.fromkeys(("source_img", "left_output_image", "right_output_image"), Image())
    return image_parquet(folder / "train.parquet", rows, images)


def metadata(folder: Path, pairs: Sequence[Known], name: str, suffix: str) -> Path:
    names = write_files(folder / "files", [sample for pair in pairs for sample in pair[1:3]], suffix)
    rows = [
        {
            "prompt": pair.prompt,
            "chosen_file_name": f"files/{names[2 * number]}",
            "rejected_file_name": f"files/{names[2 * number + 1]}",
        }
        for number, pair in enumerate(pairs)
    ]
    write_table(folder / name, rows)
    return folder


def image_folder(folder: Path) -> Path:
    return metadata(folder, IMAGES, "metadata.jsonl", ".jpg")


def image_folder_csv(folder: Path) -> Path:
    return metadata(folder, IMAGES, "metadata.csv", ".jpg")


def video_folder(folder: Path) -> Path:
    return metadata(folder, VIDEOS, "metadata.jsonl", ".mp4")


def verl_omni(folder: Path) -> Path:
    rows = [
        {"prompt": pair.prompt, "negative_prompt": "", "img_win": pair.chosen, "img_lose": pair.rejected}
        | {"win_score": 0.9, "lose_score": 0.1}
        for pair in IMAGES
    ]
    return write_table(folder / "train.parquet", rows)


def image_reward_db(folder: Path) -> Path:
    """The images of a prompt follow each other in reversed order, after those of all other prompts."""
    rows: list[dict[str, Any]] = []
    for place in (2, 0, 1):
        for number, pair in enumerate(IMAGES):
            rank, sample = ((1, pair.chosen), (2, jpeg(400 + number)), (3, pair.rejected))[place]
            ids = {"image_path": "x", "prompt_id": f"{number:06d}-0001", "prompt": pair.prompt, "classification": "y"}
            rows.append({**ids, "image": cell(sample), "rank": rank, "overall_rating": 8 - rank})
    return image_parquet(folder / "train.parquet", rows, {"image": Image()})


def ranking(folder: Path, column: str, values: Sequence[float]) -> Path:
    """Three images per prompt, of which the second is the best and the first the worst."""
    rows = [
        {"prompt": pair.prompt, "images": [cell(pair.rejected), cell(pair.chosen), cell(jpeg(500 + number))]}
        | {column: list(values)}
        for number, pair in enumerate(IMAGES)
    ]
    return image_parquet(folder / "train.parquet", rows, {"images": List(Image())})


def images_with_scores(folder: Path) -> Path:
    return ranking(folder, "scores", [-2.5, 1.25, 0.0])


def images_with_ranks(folder: Path) -> Path:
    return ranking(folder, "ranks", [3, 1, 2])


def two_folders(folder: Path, names: tuple[str, str] = ("w", "l"), pairs: Sequence[Known] = IMAGES) -> Path:
    suffix = {id(IMAGES): ".jpg", id(VIDEOS): ".mp4", id(AUDIO): ".wav"}[id(pairs)]
    write_files(folder / names[0], [pair.chosen for pair in pairs], suffix)
    write_files(folder / names[1], [pair.rejected for pair in pairs], suffix)
    for number, pair in enumerate(pairs):
        (folder / names[0] / f"{number}{'.txt' if number % 2 else '.caption'}").write_text(pair.prompt + "\n")
    return folder


# Every layout: its writer, and what it holds.
LAYOUTS: dict[str, tuple[Callable[[Path], Path], list[Known]]] = {
    **{
        writer.__name__: (writer, IMAGES)
        for writer in (
            pick_a_pic,
            pick_a_pic_tars,
            hpdv2_train,
            hpdv2_train_file_path,
            hpdv2_test,
            hpdv3,
            hpdv3_without_confidence,
            open_image_preferences,
            rapidata_votes,
            rapidata_weighted,
            rapidata_aggregated,
            rapidata_detailed,
            edit_reward,
            image_folder,
            image_folder_csv,
            verl_omni,
            image_reward_db,
            images_with_scores,
            images_with_ranks,
            two_folders,
        )
    },
    "audio_alpaca": (audio_alpaca, AUDIO),
    "video_align": (video_align, VIDEOS),
    "video_folder": (video_folder, VIDEOS),
}

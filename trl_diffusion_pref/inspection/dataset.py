"""The inspection of a data set: one pass over its rows, samples decoded a few at a time."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from diffusers import DiffusionPipeline

from ..data.bad_rows import BadRowPolicy
from ..data.decode.cell import Kind
from ..data.layouts import PAIRS, Layout
from ..data.load import Source, read_source
from ..data.pair_options import PairOptions, RankingPairs, Ties
from ..data.preference_labels import Dimension
from ..data.resolution import as_resolution
from .contact_sheet import SheetChoice, SheetEntry, SheetSample, draw_sheet
from .model import InspectedModel
from .parts import Duplicates, EncodedSize, Finding
from .reading import ReadRows, read_rows
from .result import DatasetInspection
from .rows import SourceRows
from .summaries import SampleSummary


# Beyond it most pictures are similar to each other.
_MOST_DISTANCE = 16
_ARTICLED: Mapping[Kind, str] = {"image": "an image", "video": "a video", "audio": "audio"}
# What the contact sheet says of a row, by the finding.
_REMARKS = {
    "identical_pairs": "identical",
    "similar_pairs": "similar",
    "repeated_pairs": "repeated",
    "contradictory_pairs": "contradicted",
    "unedited_chosen": "not edited",
}


def inspect_dataset(
    source: Source | Sequence[Source] | Dataset | IterableDataset | DatasetDict | IterableDatasetDict,
    *,
    model: str | os.PathLike[str] | DiffusionPipeline | None = None,
    resolution: int | str | Sequence[int] | None = None,
    num_frames: int | None = None,
    latent_sampling: Literal["sample", "mean"] = "sample",
    split: str = "train",
    streaming: bool = False,
    column_map: Mapping[str, str] | None = None,
    ranking_pairs: RankingPairs = "best_worst",
    min_score_difference: float = 0.0,
    ties: Ties = "drop",
    soft_label: float = 1.0,
    label_noise: float = 0.0,
    preference_dimension: Dimension = "majority",
    seed: int = 0,
    max_rows: int | None = None,
    min_image_side: int = BadRowPolicy.min_image_side,
    max_aspect_ratio: float = BadRowPolicy.max_aspect_ratio,
    max_hash_distance: int = 6,
    contact_sheet: str | os.PathLike[str] | None = None,
    contact_sheet_rows: int = 12,
    font: str | os.PathLike[str] | None = None,
) -> DatasetInspection:
    """Says what is in a data set, and what training would make of it, without changing or encoding anything.

    Every sample that training would use is read and decoded once, JPEG files at a fraction of their size. Rows that
    cannot be used never stop it; they are counted. As `load_pairs` does it, `datasets` keeps a copy of the rows of
    JSON, CSV, Parquet and tar files in its own cache, unless they are streamed. Samples are never copied by it.

    Args:
        source: What `load_pairs` takes; also rows of `prompt` with one of `image`, `video` and `audio`, or of prompts
            alone.
        model: A folder or Hub id, of which configs and tokenizers are read and no weights, or a loaded pipeline. With
            it prompts are counted in tokens, and bytes on disk and the model's size are known.
        resolution: As for the trainers; default: the model's, or 1024 without one.
        num_frames: As for the trainers; videos of another length are counted as rows that cannot be used if a model is
            given.
        latent_sampling: As for the trainers; decides the bytes on disk.
        split, streaming, column_map, ranking_pairs, min_score_difference, ties, soft_label, label_noise,
            preference_dimension, seed: As for `load_pairs`; `seed` also chooses the rows of the contact sheet.
        max_rows: Read so many rows from the beginning; None for all.
        min_image_side, max_aspect_ratio: As for the trainers.
        max_hash_distance: Two images are similar if their perceptual hashes of 64 bits differ in at most so many, at
            most 16. With 6, copies in another compression or size are found, and hardly any other images.
        contact_sheet: A PNG file to write, with randomly chosen pairs, chosen and rejected side by side, condition
            images left of them, below them the prompt.
        contact_sheet_rows: How many pairs, or single samples, it shows.
        font: A TrueType or OpenType file for the prompts on it. By default they are written in fonts of this machine
            that have their letters, if there are any; a note says where none has.

    Returns:
        What was found. Printed, a report; `to_json` and `as_dict` give the same to programs, with the rows of every
        finding.

    Raises:
        ValueError: The source does not exist or cannot be read, or an option cannot be used.
        TypeError: `model` is no supported pipeline.

    Example:

    ```python
    from trl_diffusion_pref import inspect_dataset

    print(inspect_dataset("pairs.jsonl", resolution=512, contact_sheet="pairs.png"))
    ```
    """
    _check(max_rows, max_hash_distance, contact_sheet, contact_sheet_rows)
    options = PairOptions(
        column_map=column_map,
        ranking_pairs=ranking_pairs,
        min_score_difference=min_score_difference,
        ties=ties,
        soft_label=soft_label,
        label_noise=label_noise,
        preference_dimension=preference_dimension,
        seed=seed,
    )
    policy = BadRowPolicy(min_image_side=min_image_side, max_aspect_ratio=max_aspect_ratio)
    asked = as_resolution(resolution)
    of_model = None if model is None else InspectedModel(model, asked, num_frames)
    dataset, label = read_source(source, split=split, streaming=streaming, column_map=column_map, any_columns=True)
    rows = SourceRows(dataset, label, options, max_rows)
    kind, frames = (None, num_frames) if of_model is None else (of_model.kind, of_model.num_frames)
    chosen = SheetChoice(contact_sheet_rows if contact_sheet is not None else 0, seed)
    read = read_rows(rows, kind, frames, policy, chosen)
    samples = SampleSummary(read) if read.facts else None
    duplicates = None if samples is None else samples.duplicates(max_hash_distance)
    if of_model is not None:
        size = of_model.size
    else:
        size = (asked, asked) if isinstance(asked, int) else asked
    encoded = None if of_model is None else _encoded(of_model, read, latent_sampling)
    notes, sheet = _notes(rows, read, kind, of_model), None
    if of_model is not None and rows.sample_columns and encoded is None:
        kind_of_pipeline = type(of_model.pipeline).__name__
        notes.append(f"Bytes on disk are known to a loaded {kind_of_pipeline} alone; pass that as model.")
    if contact_sheet is not None and chosen.numbers:
        sheet = Path(contact_sheet)
        notes += draw_sheet(sheet, _entries(read, duplicates), font)
    elif contact_sheet is not None:
        notes.append("There is no contact sheet, since there are no samples to show.")
    return DatasetInspection(
        source=label,
        rows=rows.count,
        rows_in_source=rows.rows_in_source,
        complete=not rows.is_cut,
        columns=rows.columns,
        content=rows.content,
        layout=None if rows.match is None else rows.match.layout.name,
        layout_problem=rows.layout_problem,
        pairs=rows.report,
        bad_rows=read.bad_rows.result(),
        prompts=None if rows.prompt_column is None else read.prompts.result(of_model),
        samples=None if samples is None else samples.summary(size, of_model),
        duplicates=duplicates,
        model=None if of_model is None else of_model.name,
        encoded=encoded,
        contact_sheet=None if sheet is None else str(sheet),
        notes=notes,
    )


def _check(
    max_rows: int | None,
    max_hash_distance: int,
    contact_sheet: str | os.PathLike[str] | None,
    contact_sheet_rows: int,
) -> None:
    """Raises a ValueError for options that cannot be used."""
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows}: it must be at least 1.")
    if not 0 <= max_hash_distance <= _MOST_DISTANCE:
        raise ValueError(f"max_hash_distance={max_hash_distance} is outside [0, {_MOST_DISTANCE}].")
    if contact_sheet_rows < 1:
        raise ValueError(f"contact_sheet_rows={contact_sheet_rows}: it must be at least 1.")
    if contact_sheet is not None and Path(contact_sheet).suffix.lower() != ".png":
        raise ValueError(f"contact_sheet={str(contact_sheet)!r} is written as PNG; let its name end in .png.")


def _encoded(model: InspectedModel, read: ReadRows, latent_sampling: str) -> EncodedSize | None:
    rows = read.rows
    if not rows.sample_columns:
        return None
    layout = Layout(
        samples=PAIRS.samples if rows.content == "pairs" else rows.sample_columns,
        conditions=tuple(name for name in rows.conditions if name in model.family.condition_images),
    )
    return model.encoded_size(layout, read.usable, len(read.prompts.rows), keep_std=latent_sampling == "sample")


def _notes(rows: SourceRows, read: ReadRows, kind: Kind | None, model: InspectedModel | None) -> list[str]:
    notes, columns = [], list(rows.conditions.values())
    if model is not None and rows.match is not None:
        name, family = type(model.pipeline).__name__, model.family
        missing = [column for column in family.condition_images if column not in rows.conditions]
        if rows.conditions and not family.condition_images:
            notes.append(f"A {name} takes no condition images; training refuses the column '{columns[0]}'.")
        elif missing and not family.condition_is_optional:
            notes.append(f"A {name} edits images; training needs the column '{missing[0]}' too, which is not there.")
    if columns:
        noun = f"column{'s' * (len(columns) > 1)} {', '.join(map(repr, columns))}"
        notes.append(f"Condition images ({noun}) are compared with samples of their own row alone.")
    if read.kind == "audio":
        notes.append("Audio is compared byte by byte alone; there is no perceptual hash of it.")
    if read.kind == "video":
        notes.append("Videos are compared byte by byte, and by their first frames alone where they are similar.")
    if kind is not None and rows.sample_columns and not read.facts:
        notes.append(f"No sample is {_ARTICLED[kind]} that can be decoded, and the model generates no other.")
    return notes


def _entries(read: ReadRows, duplicates: Duplicates | None) -> list[SheetEntry]:
    """What the contact sheet shows, in the order of the rows."""
    soft: dict[tuple[int, ...], float | None] = {
        (pair.row, pair.chosen, pair.rejected): pair.soft_label for pair in read.rows.pairs
    }
    entries = []
    for row, *numbers in sorted(read.chosen.numbers):
        remarks = []
        for name in _REMARKS if duplicates is not None else ():
            found: Finding | None = getattr(duplicates, name)
            if found is not None and row in found.rows:
                remarks.append(_REMARKS[name])
        label = soft.get((row, *numbers))
        names = ("chosen", "rejected") if len(numbers) == 2 else ("",)
        sources = sorted(
            number
            for number in read.chosen.cells
            if read.rows.is_condition(number) and read.rows.row_of(number) == row
        )
        entries.append(
            SheetEntry(
                title=f"row {row}" + (f" · soft label {label:.2f}" if label is not None else ""),
                remarks=tuple(remarks),
                prompt=" | ".join(read.prompts.texts_of(row)),
                samples=tuple(
                    SheetSample(name, read.chosen.cells.get(number))
                    for name, number in zip(
                        (*map(read.rows.condition_name, sources), *names), (*sources, *numbers), strict=True
                    )
                ),
            )
        )
    return entries

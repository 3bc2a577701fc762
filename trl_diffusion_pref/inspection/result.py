"""What an inspection found, as text and as JSON."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.pair_options import PairReport
from ..export.files import write_whole
from .parts import BadRows, Duplicates, EncodedSize, Prompts, Samples
from .report import bad_row_lines, duplicate_lines, encoded_lines, line, prompt_lines, sample_lines


@dataclass(frozen=True)
class DatasetInspection:
    """What is in a data set; see `inspect_dataset`. Printed, a report.

    Args:
        source: What was inspected.
        rows: Rows that were read; of a stored data set without `max_rows`, all.
        rows_in_source: All rows; None for a stream.
        complete: Whether all rows were read; a stream is read to its end without `max_rows`.
        columns: Names and types; types are empty for a stream that does not know them.
        content: "pairs", "samples", "prompts", or "unknown" where nothing can be trained on.
        layout: Name of the layout; None where the rows are no pairs.
        layout_problem: Why they are none, with the nearest layout; None for pairs.
        pairs: What became of the rows; None where they are no pairs.
        bad_rows: Rows that cannot be used.
        prompts: None where there is no column of prompts.
        samples: None where there is no readable sample.
        duplicates: Likewise.
        model: The pipeline that prompts and sizes were computed for; None without.
        encoded: None without a model, and where there are no samples.
        contact_sheet: The file; None where none was asked for, or there is nothing to show.
        notes: What was not looked at, and why.
    """

    source: str
    rows: int
    rows_in_source: int | None
    complete: bool
    columns: dict[str, str]
    content: str
    layout: str | None
    layout_problem: str | None
    pairs: PairReport | None
    bad_rows: BadRows
    prompts: Prompts | None = None
    samples: Samples | None = None
    duplicates: Duplicates | None = None
    model: str | None = None
    encoded: EncodedSize | None = None
    contact_sheet: str | None = None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        values = json.loads(json.dumps(asdict(self)))
        if self.encoded is not None:
            values["encoded"]["total"] = self.encoded.total
        return values

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Everything, as JSON.

        Args:
            path: Where it is also written, in whole or not at all.
        """
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False)
        if path is not None:
            write_whole(Path(path), f"{text}\n".encode())
        return text

    def __str__(self) -> str:
        lines = [self.source, *self._row_lines()]
        if self.content != "unknown":
            lines += bad_row_lines(self.bad_rows)
        lines += prompt_lines(self.prompts) if self.prompts else []
        lines += sample_lines(self.samples) if self.samples else []
        lines += duplicate_lines(self.duplicates, self.content == "pairs") if self.duplicates else []
        lines += encoded_lines(self.encoded, self.model) if self.encoded and self.model else []
        lines += line("contact sheet", self.contact_sheet) if self.contact_sheet else []
        return "\n".join([*lines, *(text for note in self.notes for text in line("note", note))])

    def _row_lines(self) -> list[str]:
        rows = f"{self.rows}"
        if not self.complete:
            rows = f"the first {self.rows}" + f" of {self.rows_in_source}" * (self.rows_in_source is not None)
        columns = ", ".join(f"{name} ({kind})" if kind else name for name, kind in self.columns.items())
        if self.pairs is not None:
            made = line("pairs", str(self.pairs))
        elif self.content == "unknown":
            made = line("layout", self.layout_problem or "unknown")
        else:
            held = "single samples with prompts" if self.content == "samples" else "prompts alone"
            made = line("layout", f"{held}. As pairs: {self.layout_problem}")
        return [*line("rows", rows), *line("columns", columns or "none"), *made]

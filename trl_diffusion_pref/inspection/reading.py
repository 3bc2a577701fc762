"""One pass over the rows of a source, samples decoded a few at a time."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from tqdm.auto import tqdm

from ..data.bad_rows import BadRowPolicy, RowProblem
from ..data.cells import captions_of, prompt_problems
from ..data.decode.cell import CellProblem, Kind
from ..data.image_shapes import shape_problems
from ..data.layouts import Layout
from .contact_sheet import SheetChoice
from .counters import BadRowCounter, PromptCounter
from .rows import Sample, SourceRow, SourceRows
from .sample_facts import SampleFacts, problem_with, sample_facts


# Threads that decode; Pillow and FFmpeg let others run meanwhile.
_WORKERS = 4


@dataclass(frozen=True)
class ReadRows:
    """What one pass found.

    Args:
        rows: That were read, with their pairs.
        facts: Of the samples that can be decoded, by their number.
        kind: Of these; None where there are none.
        bad_rows: Rows that cannot be used.
        prompts: Of all rows.
        chosen: What the contact sheet shows.
    """

    rows: SourceRows
    facts: dict[int, SampleFacts]
    kind: Kind | None
    bad_rows: BadRowCounter
    prompts: PromptCounter
    chosen: SheetChoice

    @property
    def usable(self) -> int:
        """How many pairs, or single samples, could be trained on."""
        numbers: list[tuple[int, tuple[int, ...]]]
        if self.rows.content == "pairs":
            numbers = [(pair.row, (pair.chosen, pair.rejected)) for pair in self.rows.pairs]
        else:
            numbers = [(self.rows.row_of(number), (number,)) for number in self.facts]
        return sum(
            all(number in self.facts for number in used)
            and not any(bad in self.bad_rows for bad in (row, *map(self.rows.row_of, used)))
            for row, used in numbers
        )


def read_rows(
    rows: SourceRows, kind: Kind | None, num_frames: int | None, policy: BadRowPolicy, chosen: SheetChoice
) -> ReadRows:
    """Reads and decodes what training would use.

    Args:
        kind: Of the samples that are wanted; None for that of the first one.
        num_frames: Of the videos that are wanted; None for any number.
        policy: Says how small and thin an image may be.
        chosen: Chooses what the contact sheet shows.
    """
    found = ReadRows(rows, {}, kind, BadRowCounter(), PromptCounter(), chosen)
    if rows.rows_in_source is not None:
        chosen.offer([(pair.row, pair.chosen, pair.rejected) for pair in rows.pairs])
    offered = len(rows.pairs)
    bar = tqdm(total=rows.total, desc=f"Inspecting {rows.label}", unit=" rows", delay=2)
    with ThreadPoolExecutor(max_workers=_WORKERS) as pool, bar:
        for batch in rows:
            if rows.content == "samples":
                chosen.offer([(row.row, sample.number) for row in batch for sample in row.samples])
            else:
                chosen.offer([(pair.row, pair.chosen, pair.rejected) for pair in rows.pairs[offered:]])
                offered = len(rows.pairs)
            samples = [sample for row in batch for sample in row.samples]
            chosen.keep((sample.number, sample.cell) for sample in samples)
            _add_prompts(found, batch)
            for sample, result in zip(samples, pool.map(_facts_or_problem, samples), strict=True):
                if isinstance(result, SampleFacts):
                    # Condition images are images whatever is generated.
                    wanted: Kind | None = "image" if rows.is_condition(sample.number) else found.kind
                    if wanted is None:
                        wanted = result.kind
                        found = replace(found, kind=wanted)
                    frames = num_frames if wanted == "video" else None
                    problem = problem_with(result, wanted, frames)
                    if problem is None:
                        found.facts[sample.number] = result
                        continue
                    result = problem
                found.bad_rows.add([_row_problem(rows, sample.number, result)])
            bar.update(len(batch))
    found.bad_rows.add(rows.problems)
    found.bad_rows.add(_shape_problems(found, policy))
    return found


def _facts_or_problem(sample: Sample) -> SampleFacts | CellProblem:
    try:
        return sample_facts(sample.cell)
    except CellProblem as problem:
        return problem


def _row_problem(rows: SourceRows, number: int, problem: CellProblem) -> RowProblem:
    return RowProblem(rows.row_of(number), rows.place(number), str(problem), problem.kind)


def _add_prompts(found: ReadRows, batch: list[SourceRow]) -> None:
    if found.rows.prompt_column is None:
        return
    for row in batch:
        found.prompts.add(row.row, captions_of(row.prompt))
    found.bad_rows.add(
        replace(problem, row=batch[problem.row].row, place=f"column '{found.rows.prompt_column}'")
        for problem in prompt_problems([row.prompt for row in batch])
    )


def _shape_problems(found: ReadRows, policy: BadRowPolicy) -> Iterable[RowProblem]:
    """Images and videos that are too small or too thin."""
    numbers = [number for number, facts in found.facts.items() if facts.size is not None]
    sizes = np.asarray([found.facts[number].size for number in numbers], dtype=np.int64).reshape(-1, 1, 2)
    for problem in shape_problems(sizes, Layout(samples=("sample",)), policy, None):
        number = numbers[problem.row]
        yield replace(problem, row=found.rows.row_of(number), place=found.rows.place(number))

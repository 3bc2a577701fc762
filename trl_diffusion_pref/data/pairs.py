"""Data sets in any known layout as pairs: rows of prompt, chosen and rejected."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import blake2b
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset

from .bad_rows import RowProblem
from .known_layouts import PAIRS_LAYOUT, Match, recognise_layout
from .layouts import column_names
from .pair_options import DEFAULT_OPTIONS, PairOptions, PairReport
from .pair_rows import PairTable, build_pairs, stream_pairs
from .pair_source import PairSource
from .preference_labels import Cells, LabelProblem, Scores
from .stored import list_lengths


logger = logging.getLogger(__name__)

_TOLERANCE = 1e-9  # 2 * 0.95 - 1 is less than 0.9


class Pair(NamedTuple):
    """Two samples of a row or ranking by their number, and the probability that the first one is better."""

    chosen: int
    rejected: int
    soft_label: float | None


def as_pairs(
    dataset: Dataset | IterableDataset, label: str, options: PairOptions = DEFAULT_OPTIONS
) -> Dataset | IterableDataset:
    """A data set in any known layout as pairs.

    A stored data set's images are not copied where each of its rows has two columns of samples, such as Pick-a-Pic's:
    the result refers to the same files. Rankings are copied to the cache of `datasets`, undecoded: the pairs of lists
    of samples, and of rankings that have one row per sample. Lists of paths need little space there.

    A stream's rows are converted as they are read, so nothing is counted. With `label_noise` the rows of each data
    loader worker are counted from 0.

    Args:
        dataset: A layout is recognised by the names of the columns; docs/dataset_formats.md lists all.
        label: How messages call the data set, such as "train_dataset".
        options: How rows become pairs.

    Returns:
        Rows of `prompt`, `chosen`, `rejected`; `image` if the layout has a condition image; and `soft_label`, the
        probability that `chosen` is better, if the layout has shares of votes or ties are kept as 0.5. Prompts are
        taken as they are, also lists of captions. A data set that has `prompt`, `chosen` and `rejected` is returned
        as it is, or with all its other columns if `column_map` or `label_noise` change it.

    Raises:
        ValueError: The columns have no known layout, rows have labels that cannot be used (the first ten are listed),
            an option does not fit the layout, or no pair is left.
        TypeError: Not a `datasets.Dataset` or `IterableDataset`.
    """
    return pairs_and_report(dataset, label, options)[0]


def pair_report(dataset: Dataset, label: str, options: PairOptions = DEFAULT_OPTIONS) -> PairReport:
    """What `as_pairs` makes of the rows of a stored data set, without making the pairs.

    Raises:
        ValueError: As `as_pairs`, or the data set is a stream, whose rows are not known before they are read.
    """
    match = _recognised(dataset, label, options)
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{label} is a stream; its pairs are counted by reading it.")
    return _unchanged(dataset) if _stays(match, options) else _plan(dataset, match, label, options)[1]


def pairs_and_report(
    dataset: Dataset | IterableDataset, label: str, options: PairOptions = DEFAULT_OPTIONS
) -> tuple[Dataset | IterableDataset, PairReport | None]:
    """`as_pairs` and, except for a stream, `pair_report`, which is logged: as a warning if anything is left out."""
    pairs, report, source = convert(dataset, label, options)
    if source is not None:
        _raise_problems(source.problems, source.rows, label)
    return pairs, report


class Converted(NamedTuple):
    """A data set as pairs, what became of its rows, and where the pairs come from, if they are not its rows."""

    pairs: Dataset | IterableDataset
    report: PairReport | None
    source: PairSource | None


def convert(dataset: Dataset | IterableDataset, label: str, options: PairOptions = DEFAULT_OPTIONS) -> Converted:
    """`pairs_and_report`, with rows of a stored data set whose labels cannot be used as problems of the source.

    Raises:
        ValueError: As `as_pairs`, and of such rows only if there are no others.
    """
    match = _recognised(dataset, label, options)
    if isinstance(dataset, IterableDataset):
        if match.layout.shape == "rows":
            raise ValueError(
                f"{label} is a stream in the layout {match.layout.name}, in which a ranking has several rows; they "
                "cannot be found together in a stream. Load the data set without streaming."
            )
        if _stays(match, options):
            return Converted(dataset, None, None)
        make_rows = partial(_rows_of_batch, match=match, label=label, options=options)
        return Converted(stream_pairs(dataset, match, make_rows, _soft(match, options)), None, None)
    if _stays(match, options):
        return Converted(dataset, _unchanged(dataset), None)
    table, report, problems = plan_pairs(dataset, match, label, options)
    if not report.pairs:
        _raise_problems(problems, len(dataset), label)
        raise ValueError(f"{label} has no pairs: {report}.")
    logger.log(logging.WARNING if report.left_out else logging.INFO, "%s: %s.", label, report)
    source = PairSource(match, table, len(dataset), problems)
    return Converted(build_pairs(dataset, match, table, label), report, source)


def _stays(match: Match, options: PairOptions) -> bool:
    """Whether a data set holds pairs already and no option changes them."""
    return match.layout is PAIRS_LAYOUT and not options.column_map and not options.label_noise


def _unchanged(dataset: Dataset) -> PairReport:
    return PairReport(PAIRS_LAYOUT.name, rows=len(dataset), rankings=len(dataset), pairs=len(dataset))


def _recognised(dataset: Any, label: str, options: PairOptions) -> Match:
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"{label} is a {type(dataset).__name__}; pass a datasets.Dataset or IterableDataset (one split, not a "
            "dictionary of splits)."
        )
    match = recognise_layout(column_names(dataset), label, options.column_map)
    options.check_layout(match.layout, label)
    return match


def _soft(match: Match, options: PairOptions) -> bool:
    """Whether the pairs have soft labels."""
    layout = match.layout
    return layout.shares or "soft_label" in match.columns or (options.ties == "half" and bool(layout.labels))


# ---- The pairs of one row or ranking -----------------------------------------------------------------------------


def _scores_of(match: Match, cells: Cells, count: int, options: PairOptions) -> Scores:
    """A row's scores. Raises `LabelProblem`, also if there are not `count` of them."""
    layout = match.layout
    scores = layout.read_scores(cells, options.preference_dimension)
    if scores is not None and len(scores) != count:
        reason = f"has {len(scores)} entries for the {count} samples in column '{match.samples[0]}'"
        raise LabelProblem(layout.labels[0], reason)
    stated = cells.get("soft_label", 1.0)
    if not isinstance(stated, (int, float)) or not 0 <= stated <= 1:
        raise LabelProblem("soft_label", f"is {stated!r}, not a probability in [0, 1]")
    return scores


def _pairs_of(
    scores: Scores, row: int, match: Match, cells: Cells, options: PairOptions, counts: Counter[str]
) -> list[Pair]:
    """The pairs of one row or ranking, as `options` say."""
    if scores is None:
        counts["unlabelled"] += 1
        return []
    if len(scores) < 2:
        counts["short_rankings"] += 1
        return []
    best_first = sorted(range(len(scores)), key=lambda index: -scores[index])
    candidates: Sequence[tuple[int, int]] = [(best_first[0], best_first[-1])]
    if options.ranking_pairs != "best_worst":
        choose = pairwise if options.ranking_pairs == "adjacent" else partial(combinations, r=2)
        candidates = list(choose(best_first))
    pairs = []
    for number, (chosen, rejected) in enumerate(candidates):
        difference = scores[chosen] - scores[rejected]
        tie = difference == 0
        if tie and options.ties == "drop":
            counts["ties_dropped"] += 1
            continue
        if difference < options.min_score_difference - _TOLERANCE:
            counts["too_close"] += 1
            continue
        soft_label = None
        if _soft(match, options):
            certain = float(cells.get("soft_label", options.soft_label))  # type: ignore[arg-type]  # checked by _scores_of
            soft_label = scores[chosen] if match.layout.shares else 0.5 if tie else certain
        pair = Pair(chosen, rejected, soft_label)
        if options.label_noise and _uniform(options.seed, row, number) < options.label_noise:
            # The soft label stays: with 1 - s the swapped pair would say the same as before.
            pair = Pair(rejected, chosen, soft_label)
            counts["swapped"] += 1
        counts["ties_kept"] += tie
        counts["pairs"] += 1
        pairs.append(pair)
    return pairs


def _uniform(*key: int) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest()) / 2**64


def row_pairs(
    row: int, cells: Cells, count: int, match: Match, options: PairOptions, counts: Counter[str]
) -> list[Pair] | RowProblem:
    """The pairs of a row that holds all samples of its ranking, or why its labels cannot be used.

    Args:
        row: Its number.
        cells: Its labels by the layout's names.
        count: How many samples it has.
        counts: What becomes of rows, by the names of `PairReport`; it is added to.
    """
    try:
        return _pairs_of(_scores_of(match, cells, count, options), row, match, cells, options, counts)
    except LabelProblem as error:
        return _problem(row, error, match)


def _problem(row: int, error: LabelProblem, match: Match) -> RowProblem:
    columns = [f"'{match.columns.get(name, name)}'" for name in error.columns]
    place = f"column{'s' * (len(columns) > 1)} {' and '.join(columns)}"
    return RowProblem(row, place, str(error), "unusable label")


def _raise_problems(problems: Sequence[RowProblem], rows: int, label: str) -> None:
    """Lists the first ten rows that cannot be used, if there are any."""
    if problems:
        more = [f"and {len(problems) - 10} more"] * (len(problems) > 10)
        listed = "\n  ".join([*map(str, problems[:10]), *more])
        raise ValueError(
            f"{label} has labels that cannot be used, in {len(problems)} of {rows} rows:\n  {listed}\nRepair them, or "
            "leave these rows out: dataset.filter(lambda row, index: index not in bad_rows, with_indices=True)."
        )


# ---- Stored data sets --------------------------------------------------------------------------------------------


def _plan(dataset: Dataset, match: Match, label: str, options: PairOptions) -> tuple[PairTable, PairReport]:
    table, report, problems = plan_pairs(dataset, match, label, options)
    _raise_problems(problems, len(dataset), label)
    return table, report


def plan_pairs(
    dataset: Dataset, match: Match, label: str, options: PairOptions
) -> tuple[PairTable, PairReport, list[RowProblem]]:
    """All pairs of a stored data set, from its labels alone: no sample is read.

    Returns:
        The pairs, what became of the rows, and the rows whose labels cannot be used.
    """
    layout, counts, problems = match.layout, Counter[str](), []
    lengths: Sequence[int] | np.ndarray = [len(layout.samples)] * len(dataset)
    if layout.shape == "list":
        lengths = list_lengths(dataset, match.samples[0], label)
    rankings: dict[Any, tuple[list[int], list[float], object]] = {}
    pairs: list[tuple[int, Pair]] = []
    for row, cells in enumerate(_label_cells(dataset, match)):
        try:
            scores = _scores_of(match, cells, int(lengths[row]), options)
            if layout.ranking_id is not None and scores is not None:
                ranking, prompt = cells[layout.ranking_id], cells[layout.prompt]
                if ranking is None:
                    raise LabelProblem(layout.ranking_id, "is None, so the ranking is not known")
                rows, known, first_prompt = rankings.setdefault(ranking, ([], [], prompt))
                if prompt != first_prompt:
                    raise LabelProblem(layout.prompt, f"differs from row {rows[0]}, of the same ranking")
                rows.append(row)
                known += scores
                continue
        except LabelProblem as error:
            problems.append(_problem(row, error, match))
            continue
        pairs += [(row, pair) for pair in _pairs_of(scores, row, match, cells, options, counts)]
    for rows, known, _ in rankings.values():
        for chosen, rejected, soft_label in _pairs_of(known, rows[0], match, {}, options, counts):
            pairs.append((rows[0], Pair(rows[chosen], rows[rejected], soft_label)))
    table = PairTable(
        rows=np.array([row for row, _ in pairs], dtype=np.int64),
        chosen=np.array([pair.chosen for _, pair in pairs], dtype=np.int64),
        rejected=np.array([pair.rejected for _, pair in pairs], dtype=np.int64),
        soft_labels=np.array([pair.soft_label for _, pair in pairs], dtype=np.float64)
        if _soft(match, options)
        else None,
    )
    found = len(rankings) if layout.shape == "rows" else len(dataset)
    report = PairReport(layout=layout.name, rows=len(dataset), rankings=found, **{"pairs": 0, **counts})
    return table, report, problems


def _label_cells(dataset: Dataset, match: Match) -> Iterator[Cells]:
    """Each row's labels by the layout's names; of rankings with several rows, also the prompt and the ranking."""
    columns = match.labels
    if match.layout.ranking_id is not None:
        columns |= {name: match.columns[name] for name in (match.layout.ranking_id, match.layout.prompt)}
    if not columns:
        yield from ({} for _ in range(len(dataset)))
        return
    # In batches, since some labels are long texts.
    for batch in dataset.with_format(None).select_columns([*set(columns.values())]).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns.values()), strict=True):
            yield dict(zip(columns, values, strict=True))


# ---- Streams -----------------------------------------------------------------------------------------------------


def _rows_of_batch(
    batch: dict[str, list[Any]], rows: list[int], *, match: Match, label: str, options: PairOptions
) -> Iterator[tuple[int, Any, Any, float | None]]:
    """The pairs of a batch: position in the batch, chosen cell, rejected cell, soft label."""
    problems: list[RowProblem] = []
    for position, row in enumerate(rows):
        cells = {name: batch[column][position] for name, column in match.labels.items()}
        samples = [batch[column][position] for column in match.samples]
        if match.layout.shape == "list":
            samples = samples[0] or []
        pairs = row_pairs(row, cells, len(samples), match, options, Counter())
        if isinstance(pairs, RowProblem):
            problems.append(pairs)
            continue
        for chosen, rejected, soft_label in pairs:
            yield position, samples[chosen], samples[rejected], soft_label
    _raise_problems(problems, len(rows), label)

"""Every method on the same three tasks with the embedded pipelines, at equal numbers of denoiser calls.

    python benchmarks/methods.py --workers 2     # runs what is missing
    python benchmarks/methods.py --report        # writes results/methods.md and .json from the finished runs

A run trains one method on one task with one learning rate and one seed, see `methods_run.py`. With seed 0 a method
runs with each of its four learning rates; the one with the best validation images is kept, and the other seeds run
with it alone. Every finished run is a line of `runs.jsonl` in the work folder. A run that was stopped is done again,
finished ones are not, unless the method's settings in `METHODS` have changed; after other changes of the code take
another work folder.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import datasets
from methods_run import (
    BASE,
    HELD_OUT,
    IMAGES_PER_STEP,
    METHODS,
    PAIRS,
    SAMPLING_STEPS,
    TASKS,
    TEST,
    VALIDATION,
    Run,
    do,
    in_this_version,
)

from trl_diffusion_pref.shapes import prompts


RESULTS = Path(__file__).parent / "results"
WORK = Path(datasets.config.HF_CACHE_HOME) / "trl_diffusion_pref_methods"
BUDGET, SEEDS = 7680, (0, 1, 2)
# Of this seed every learning rate is trained, and the best one is this seed's run.
FIRST_SEED = 0


class Runs:
    """The finished runs of a work folder, and which are to be done.

    Args:
        work: Is made if it does not exist.
        budget: Denoiser calls of each run.
        seeds: Of the training.
    """

    def __init__(self, work: Path, budget: int, seeds: Sequence[int]) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.file, self.budget, self.seeds = work / "runs.jsonl", budget, seeds
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.records: list[dict[str, Any]] = [self._parsed(number, line) for number, line in enumerate(lines, 1)]

    def _parsed(self, number: int, line: str) -> dict[str, Any]:
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.file}, line {number} is not whole ({error}). Remove the line; its run is then repeated."
            ) from error

    def add(self, record: dict[str, Any]) -> None:
        """Writes a line in one piece."""
        file = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(file, (json.dumps(record) + "\n").encode())
            os.fsync(file)
        finally:
            os.close(file)
        self.records.append(record)

    def of(self, run: Run) -> dict[str, Any] | None:
        """The record of a run; None if it is not finished."""
        return next((record for record in self.records if run.is_record(record)), None)

    def base(self, task: str) -> Run:
        return Run(task, BASE, 0.0, FIRST_SEED, 0)

    def grid(self, task: str, method: str) -> list[Run]:
        """The runs among which validation chooses."""
        return [self._run(task, method, rate, FIRST_SEED) for rate in METHODS[method].learning_rates]

    def chosen(self, task: str, method: str) -> float | None:
        """The best learning rate, the lowest of several that are as good; None while one of them is missing."""
        found = [self.of(run) for run in self.grid(task, method)]
        if any(record is None for record in found):
            return None
        return max(zip(map(_validation, found), METHODS[method].learning_rates, strict=True), key=lambda one: one[0])[
            1
        ]

    def with_chosen(self, task: str, method: str) -> list[Run]:
        """The runs of all seeds with the best learning rate; empty while it is not known."""
        rate = self.chosen(task, method)
        return [] if rate is None else [self._run(task, method, rate, seed) for seed in self.seeds]

    def _run(self, task: str, method: str, rate: float, seed: int) -> Run:
        return Run(task, method, rate, seed, self.budget * METHODS[method].more_calls)

    def possible(self, tasks: Sequence[str], methods: Sequence[str]) -> Iterator[Run]:
        """What can be done now, task by task."""
        for task in tasks:
            runs = [self.base(task)]
            for method in methods:
                runs += [*self.grid(task, method), *self.with_chosen(task, method)]
            yield from (run for run in runs if self.of(run) is None)


def _validation(record: dict[str, Any] | None) -> tuple[float, float]:
    """By what a learning rate is chosen: good images, then those in the preferred style with colour and shape."""
    if record is None or "error" in record:
        return -1.0, -1.0
    found = record["validation"]
    return found["good"], min(found["preferred"], found["right"])


def train(runs: Runs, tasks: Sequence[str], methods: Sequence[str], workers: int) -> list[Run]:
    """Does what is missing.

    Returns:
        The runs that failed, whose errors are printed.
    """
    failed: list[Run] = []
    at_work: dict[Future, Run] = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        while True:
            for run in runs.possible(tasks, methods):
                if len(at_work) < workers and run not in failed and run not in at_work.values():
                    at_work[pool.submit(do, run, runs.file.parent)] = run
            if not at_work:
                return failed
            for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                run = at_work.pop(future)
                if error := future.exception():
                    traceback.print_exception(error)
                    failed.append(run)
                else:
                    runs.add(future.result())
                print("failed" if error else "finished", run, flush=True)


# ---- Report ------------------------------------------------------------------------------------------------------


def report(runs: Runs, tasks: Sequence[str], methods: Sequence[str]) -> tuple[str, list[dict[str, Any]], list[str]]:
    """The page, the records that it shows, and what is missing."""
    lines = [*_introduction(runs)]
    shown: list[dict[str, Any]] = []
    missing: list[str] = []
    lines += ["", "## All three tasks", "", "Images that are in the preferred style, right and clean:", ""]
    lines += [
        "| method | " + " | ".join(TASKS[task].title.partition(":")[0] for task in tasks) + " |",
        "|---" * (len(tasks) + 1) + "|",
    ]
    for method in (BASE, *methods):
        title = "base" if method == BASE else METHODS[method].title
        lines.append(f"| {title} | " + " | ".join(_good(runs, task, method) for task in tasks) + " |")
    for task in tasks:
        names = ["preferred", "right", "clean", "all three", "diversity", "held-out accuracy", "time"]
        lines += ["", f"## {TASKS[task].title}", "", "| method | learning rate | " + " | ".join(names) + " |"]
        lines.append("|---" * (len(names) + 2) + "|")
        found = {BASE: [record for record in [runs.of(runs.base(task))] if record]}
        for method in methods:
            wanted = runs.with_chosen(task, method)
            records = [(run, runs.of(run)) for run in wanted]
            found[method] = [record for _, record in records if record]
            left = [f"seed {run.seed}" for run, record in records if record is None]
            left += [f"learning rate {run.learning_rate:g}" for run in runs.grid(task, method) if not runs.of(run)]
            missing += [f"{task}, {METHODS[method].title}: {', '.join(left)}"] if left else []
        missing += [] if found[BASE] else [f"{task}, base"]
        unit = [record["seconds"] for record in found.get("sft", []) if "test" in record]
        for method, records in found.items():
            shown += [record for record in records if record not in shown]
            if records:
                lines.append(_row(method, records, len(runs.seeds), unit))
        lines += ["", "Good validation images (all three) by learning rate, with seed 0:", ""]
        lines += ["| method | first | second | third | fourth |", "|---|---|---|---|---|"]
        for method in methods:
            grid = [runs.of(run) for run in runs.grid(task, method)]
            shown += [record for record in grid if record and record not in shown]
            if any(grid):
                cells = [_of_grid(rate, each) for rate, each in zip(METHODS[method].learning_rates, grid, strict=True)]
                lines.append(f"| {METHODS[method].title} | " + " | ".join(cells) + " |")
    if missing:
        lines += ["", "Not measured yet:", "", *(f"* {one}" for one in missing)]
    return "\n".join(lines) + "\n", shown, missing


def _introduction(runs: Runs) -> Iterator[str]:
    yield "# Every method on the same tasks"
    yield ""
    yield (
        f"Written by `benchmarks/methods.py`. {PAIRS} pairs of drawings in each method's layout: pairs; chosen images "
        "for SFT; both sides as votes, or as rewards 1 and 0; rankings of four from two pairs of the same prompt, "
        "with ties; prompts and the judge's scores for online training. All weights are trained, with AdamW at a "
        f"constant learning rate and {IMAGES_PER_STEP} images a step, half as many online. Each run has "
        f"{runs.budget} denoiser calls: one for each image in each forward pass, also of a reference or of a sampler, "
        "and two more for its backward pass."
    )
    yield ""
    yield (
        f"The learning rate is the best of four by {VALIDATION[0] * len(prompts())} validation images with seed 0, "
        f"then there are {len(runs.seeds)} seeds of training: mean (least to greatest) on "
        f"{TEST[0] * len(prompts())} other images, {SAMPLING_STEPS} DDIM steps, guidance 3. The prompts are the same "
        f"{len(prompts())} captions everywhere; the noise of the samples differs. Shares of images: in the preferred "
        "(outlined) style; colour and shape right; clean within their style; and all three. Diversity: mean distance "
        "of size and position between images of the same prompt that are clean and right, 1 for drawings at random; - "
        f"where they are too few. Held-out accuracy: on {HELD_OUT} other pairs, whose labels are right, against the "
        "base. Time: the processor's, of training, in units of SFT's."
    )


def _good(runs: Runs, task: str, method: str) -> str:
    """The share of good images of a method's runs with the learning rate that was chosen for it."""
    wanted = [runs.base(task)] if method == BASE else runs.with_chosen(task, method)
    return _cell([record["test"]["good"] for record in map(runs.of, wanted) if record and "test" in record])


def _row(method: str, records: list[dict[str, Any]], seeds: int, unit: Sequence[float]) -> str:
    """A line of the table: the mean of each measure over the seeds, and its least and greatest value."""
    measured = [record for record in records if "test" in record]
    title, rate = "base", ""
    if method != BASE:
        title, rate = METHODS[method].title, f"{records[0]['run']['learning_rate']:g}"
        title += f" ({len(measured)} of {seeds} seeds)" if len(measured) < seeds else ""
    tests = [record["test"] for record in measured]
    cells = [_cell([test[name] for test in tests]) for name in ("preferred", "right", "clean", "good")]
    cells.append(_cell([test["diversity"] for test in tests if test["diversity"] is not None], ".2f"))
    cells.append(_cell([test["accuracy"] for test in tests]))
    seconds = [record["seconds"] for record in measured if "seconds" in record]
    cells.append(f"{statistics.mean(seconds) / statistics.mean(unit):.2f}" if seconds and unit else "-")
    return f"| {title} | {rate} | " + " | ".join(cells) + " |"


def _cell(values: Sequence[float], form: str = ".0%") -> str:
    if not values:
        return "-"
    spread = f" ({min(values):{form}} to {max(values):{form}})" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def _of_grid(rate: float, record: dict[str, Any] | None) -> str:
    if record is None:
        return f"{rate:g}: not measured"
    return f"{rate:g}: " + ("loss not finite" if "error" in record else f"{record['validation']['good']:.0%}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = in_this_version(list(METHODS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=there)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--budget", type=int, default=BUDGET, help="denoiser calls of each run")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    work_help = f"folder of finished runs and encoded data, default {WORK}"
    parser.add_argument("--work", type=Path, default=WORK, help=work_help)
    parser.add_argument("--report", action="store_true", help="write the tables instead of training")
    options = parser.parse_args(argv)
    for method in set(options.methods) - set(there):
        parser.error(f"{method}: this version has no trainer {METHODS[method].trainer!r}.")
    runs = Runs(options.work, options.budget, options.seeds)
    if not options.report:
        failed = train(runs, options.tasks, options.methods, options.workers)
        return 1 if failed else 0
    text, shown, missing = report(runs, options.tasks, options.methods)
    (RESULTS / "methods.md").write_text(text)
    (RESULTS / "methods.json").write_text("\n".join(["[", ",\n".join(map(json.dumps, shown)), "]"]) + "\n")
    print(text, *missing, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

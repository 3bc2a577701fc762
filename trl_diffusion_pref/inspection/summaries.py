"""From what was read of each row and sample to what is said of all of them."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..data.buckets import BucketOptions, aspect_differences, assign, bucket_sizes
from ..data.decode.cell import Kind
from ..data.image_shapes import cropping_report
from .duplicates import in_both_orders, positions_by, similar_pictures
from .model import InspectedModel
from .parts import Bucket, Duplicates, Finding, Samples, Sizes, Spread
from .reading import ReadRows
from .rows import FoundPair
from .sample_facts import SampleFacts


_LISTED = 10
# The size that images are taken to be trained at where neither a model nor a resolution says it.
_USUAL_SIZE, _USUAL_STEP = (1024, 1024), 64


class SampleSummary:
    """What is said of all samples that can be decoded.

    Args:
        read: What was read; at least one sample.
    """

    def __init__(self, read: ReadRows) -> None:
        self.rows, self.facts, self.prompts = read.rows, read.facts, read.prompts
        self.kind: Kind = next(iter(read.facts.values())).kind if read.kind is None else read.kind

    def summary(self, size: tuple[int, int] | None, model: InspectedModel | None) -> Samples:
        """How many, how long and how large.

        Args:
            size: Height and width in pixels that the sizes are compared with; None for the usual one.
            model: Which sizes it takes.
        """
        facts = list(self.facts.values())
        return Samples(
            kind=self.kind,
            count=len(facts),
            sizes=None if self.kind == "audio" else self._sizes(size, model),
            frames=Spread.of([fact.frames for fact in facts if fact.frames is not None]),
            seconds=Spread.of([fact.seconds for fact in facts if fact.seconds is not None]),
            rates=_most_frequent(str(fact.rate) for fact in facts if fact.rate is not None),
            channels=_most_frequent(str(fact.channels) for fact in facts if fact.channels is not None),
        )

    def _sizes(self, size: tuple[int, int] | None, model: InspectedModel | None) -> Sizes:
        height, width = size or _USUAL_SIZE
        sizes = np.asarray([fact.size or (0, 0) for fact in self.facts.values()], dtype=np.int64)
        of_pairs = [
            (pair.row, sides)
            for pair in self.rows.pairs
            if (sides := [self.facts[number].size for number in (pair.chosen, pair.rejected) if number in self.facts])
            and len(sides) == 2
        ]
        pair_sizes = np.asarray([sides for _, sides in of_pairs], dtype=np.int64).reshape(-1, 2, 2)
        to_one = cropping_report(sizes[:, None], np.zeros(len(sizes), dtype=np.int64), [(height, width)])
        assert to_one is not None
        different = aspect_differences(pair_sizes) > BucketOptions().max_aspect_difference * (1 + 1e-9)
        of_rows = [of_pairs[index][0] for index in np.flatnonzero(different).tolist()]
        buckets: list[Bucket] = []
        in_buckets = None
        if self.kind == "image" and height == width:
            step, largest = (_USUAL_STEP, None) if model is None else (model.size_step, model.largest_side)
            table = bucket_sizes(height, step, largest)
            row_sizes = pair_sizes if self.rows.content == "pairs" else sizes[:, None]
            if len(row_sizes):
                numbers = assign(row_sizes, table)
                in_buckets = cropping_report(row_sizes, numbers, table)
                counts = np.bincount(numbers, minlength=len(table)).tolist()
                buckets = [Bucket(*shape, count) for shape, count in zip(table, counts, strict=True) if count]
        return Sizes(
            distinct=len(np.unique(sizes, axis=0)),
            most_frequent=_most_frequent(f"{across}x{down}" for across, down in sizes.tolist()),
            shorter_side=_spread(sizes.min(axis=1)),
            resolution=[height, width],
            smaller=int(((sizes[:, 0] < width) | (sizes[:, 1] < height)).sum()),
            cropped=round(to_one.mean_share, 6),
            cropped_most=round(to_one.largest_share, 6),
            buckets=buckets,
            cropped_in_buckets=None if in_buckets is None else round(in_buckets.mean_share, 6),
            cropped_most_in_buckets=None if in_buckets is None else round(in_buckets.largest_share, 6),
            different_shapes=_finding([[row] for row in of_rows], lambda row: row, lambda row: f"row {row}"),
        )

    def duplicates(self, distance: int) -> Duplicates:
        """What is there more than once.

        Args:
            distance: Bits in which the hashes of similar pictures differ at most.
        """
        numbers = [number for number in self.facts if not self.rows.is_condition(number)]
        by_key = positions_by(self.facts[number].key for number in numbers)
        picture_of = {numbers[position]: index for index, group in enumerate(by_key.values()) for position in group}
        pictures = [[numbers[position] for position in group] for group in by_key.values()]
        looks = [self.facts[group[0]].look for group in pictures]
        groups = similar_pictures(looks, distance)
        similar = [group for group in positions_by(map(groups.find, range(len(pictures)))).values() if len(group) > 1]
        equal = [group for group in pictures if len(group) > 1]
        pairs = [pair for pair in self.rows.pairs if pair.chosen in picture_of and pair.rejected in picture_of]
        named = [(self.prompts.of_row(pair.row), picture_of[pair.chosen], picture_of[pair.rejected]) for pair in pairs]

        def samples(found: Sequence[Sequence[int]]) -> Finding:
            return _finding(found, self.rows.row_of, self._place)

        def pair_rows(found: Sequence[Sequence[int]]) -> Finding:
            return _finding(found, lambda position: pairs[position].row, lambda position: _named(pairs[position]))

        sources: dict[int, set[bytes]] = {}
        for number in self.facts:
            if self.rows.is_condition(number):
                sources.setdefault(self.rows.row_of(number), set()).add(self.facts[number].key)

        def unedited(side: str) -> Finding | None:
            if not self.rows.conditions:
                return None
            keys = [self.facts[getattr(pair, side)].key for pair in pairs]
            return pair_rows([[i] for i, pair in enumerate(pairs) if keys[i] in sources.get(pair.row, ())])

        return Duplicates(
            equal=samples(equal),
            equal_across_prompts=sum(
                len({self.prompts.of_row(self.rows.row_of(number)) for number in group}) > 1 for group in equal
            ),
            similar=samples([[pictures[index][0] for index in group] for group in similar]),
            blank=samples([[number] for number in numbers if _is_blank(self.facts[number])]),
            identical_pairs=pair_rows([[i] for i, (_, one, other) in enumerate(named) if one == other]),
            similar_pairs=pair_rows(
                [
                    [i]
                    for i, (_, one, other) in enumerate(named)
                    if one != other and groups.find(one) == groups.find(other)
                ]
            ),
            repeated_pairs=pair_rows([group for group in positions_by(named).values() if len(group) > 1]),
            contradictory_pairs=pair_rows(in_both_orders(named)),
            unedited_chosen=unedited("chosen"),
            unedited_rejected=unedited("rejected"),
        )

    def _place(self, number: int) -> str:
        return f"row {self.rows.row_of(number)}, {self.rows.place(number)}"


def _named(pair: FoundPair) -> str:
    return f"row {pair.row}"


def _is_blank(facts: SampleFacts) -> bool:
    return facts.look is not None and facts.look.hash is None


def _spread(values: np.ndarray) -> Spread:
    spread = Spread.of(values)
    assert spread is not None
    return spread


def _most_frequent(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common(_LISTED))


def _finding(groups: Sequence[Sequence[int]], row_of: Callable[[int], int], describe: Callable[[int], str]) -> Finding:
    rows = sorted({row_of(number) for group in groups for number in group})
    examples = [[describe(number) for number in group[:_LISTED]] for group in groups[:_LISTED]]
    return Finding(len(groups), rows, examples)

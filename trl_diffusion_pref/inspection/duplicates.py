"""Equal and nearly equal pictures, and pairs that repeat or contradict each other."""

from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from typing import TypeVar

import numpy as np

from .sample_facts import Look


Key = TypeVar("Key", bound=Hashable)

# Bits of a perceptual hash.
_BITS = 64
# Of 255: mean difference of two pictures' colours up to which they may be the same picture.
_COLOUR_TOLERANCE = 8.0
# Pictures compared with each other at once, 48 bytes each.
_COMPARED_AT_ONCE = 4096


def close_hashes(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of hashes that differ in at most so many bits.

    Of `distance + 2` parts that two such hashes are divided into at least two are equal, so that only hashes with two
    equal parts are compared (Norouzi, Punjani and Fleet, Fast Search in Hamming Space with Multi-Index Hashing, CVPR
    2012, with one part). A million random hashes take seconds.

    Args:
        hashes: `(N,)` uint64.
        distance: At least 0 and below 64.

    Returns:
        `(P, 2)` int64, positions i < j, sorted.
    """
    found = [np.empty((0, 2), dtype=np.int64)]
    edges = np.linspace(0, _BITS, distance + 3).astype(int).tolist()
    bands = [
        (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
    for one_band, other_band in combinations(bands, 2):
        # A band has 32 bits at most.
        parts = (one_band << np.uint64(_BITS // 2)) | other_band
        order = np.argsort(parts, kind="stable")
        end = np.searchsorted(parts[order], parts[order], side="right")
        position, step = np.arange(len(hashes)), 1
        while True:
            # Each with the hash that stands so many places after it, as long as that has the same parts.
            position = position[position + step < end[position]]
            if not len(position):
                break
            one, other = order[position], order[position + step]
            close = np.bitwise_count(hashes[one] ^ hashes[other]) <= distance
            found.append(np.sort(np.stack([one[close], other[close]], axis=1), axis=1))
            step += 1
    return np.unique(np.concatenate(found), axis=0)


class Groups:
    """Numbers that belong together, directly or by way of others.

    Args:
        count: How many numbers there are, from 0.
    """

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def find(self, number: int) -> int:
        """The number that stands for the group."""
        parents = self._parents
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    def join(self, one: int, other: int) -> None:
        """Puts two groups together."""
        one, other = self.find(one), self.find(other)
        self._parents[max(one, other)] = min(one, other)


def similar_pictures(looks: Sequence[Look | None], distance: int) -> Groups:
    """Groups of pictures that look the same.

    Two pictures do if their hashes differ in at most `distance` bits and their colours are close; and two that look
    the same as a third. Pictures without a hash are alone.
    """
    groups = Groups(len(looks))
    numbers = [number for number, look in enumerate(looks) if look is not None and look.hash is not None]
    if not numbers:
        return groups
    kept = [look for look in looks if look is not None and look.hash is not None]
    colours = np.frombuffer(b"".join(look.colours for look in kept), dtype=np.uint8).reshape(len(kept), -1)
    hashes, inverse = np.unique(np.asarray([look.hash for look in kept], dtype=np.uint64), return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(inverse))[:-1])
    several = [index for index, of_hash in enumerate(members) if len(of_hash) > 1]
    for one, other in [*((index, index) for index in several), *close_hashes(hashes, distance).tolist()]:
        for start in range(0, len(members[one]), _COMPARED_AT_ONCE // len(members[other]) + 1):
            block = members[one][start : start + _COMPARED_AT_ONCE // len(members[other]) + 1]
            for first, second in _close_colours(colours, block, members[other]):
                groups.join(numbers[first], numbers[second])
    return groups


def _close_colours(colours: np.ndarray, some: np.ndarray, others: np.ndarray) -> list[tuple[int, int]]:
    difference = np.abs(colours[some][:, None].astype(np.int16) - colours[others][None].astype(np.int16))
    pairs = np.argwhere(difference.mean(axis=2) <= _COLOUR_TOLERANCE)
    return [(int(some[one]), int(others[other])) for one, other in pairs.tolist()]


def positions_by(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """Where each key stands, in the order in which keys come first."""
    found: dict[Key, list[int]] = {}
    for position, key in enumerate(keys):
        found.setdefault(key, []).append(position)
    return found


def in_both_orders(pairs: Sequence[tuple[Hashable, int, int]]) -> list[list[int]]:
    """Positions of pairs that name the same two pictures in both orders under the same prompt, in groups.

    Args:
        pairs: Prompt, picture that was chosen, picture that was rejected.
    """
    groups = positions_by((prompt, *sorted((chosen, rejected))) for prompt, chosen, rejected in pairs)
    return [group for group in groups.values() if len({pairs[position][1] for position in group}) > 1]

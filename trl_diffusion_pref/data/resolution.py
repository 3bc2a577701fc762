"""What `resolution` may be: a side, or a height and a width."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any


Resolution = int | tuple[int, int] | None


def as_resolution(value: int | str | Sequence[int] | None) -> Resolution:
    """A side in pixels, (height, width), or None for what the pipeline generates.

    Args:
        value: As a number, a pair of numbers, or text, "512" or "768x1360", height first.

    Raises:
        ValueError: None of these, or not positive.
    """
    if value is None:
        return None
    parts: Sequence[Any] = [value]
    if isinstance(value, str):
        parts = value.lower().split("x")
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        parts = value
    sides = [side for part in parts if (side := _side(part)) is not None]
    if len(parts) not in (1, 2) or len(sides) < len(parts):
        raise ValueError(
            f"resolution={value!r} is neither a positive number of pixels, such as 512, nor a height and a width, "
            'such as "768x1360".'
        )
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _side(part: Any) -> int | None:
    """A positive number, or None."""
    if isinstance(part, str) and part.strip().isdecimal():
        part = int(part)
    good = isinstance(part, Integral) and not isinstance(part, bool) and int(part) > 0
    return int(part) if good else None

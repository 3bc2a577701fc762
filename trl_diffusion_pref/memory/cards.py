"""How large a card is, and the sizes that there are."""

import re


GIB = 2**30
# In GB, as they are sold, which are GiB.
SIZES = (8, 12, 16, 24, 40, 48, 80, 141)
# What training may take of a card. The rest is for what the estimate does not count.
SHARE = 0.9
_NAMED = re.compile(r"(\d+(?:\.\d+)?) ?gi?b", re.IGNORECASE)


def card_bytes(card: str | int) -> int:
    """Bytes of a card that is given by its size, such as "24GB", or in bytes.

    Raises:
        ValueError: No size, or not a positive one.
    """
    if isinstance(card, str):
        named = _NAMED.fullmatch(card.strip())
        size = int(float(named[1]) * GIB) if named else 0
    else:
        size = card if isinstance(card, int) and not isinstance(card, bool) else 0
    if size < 1:
        raise ValueError(f'card={card!r} is no size of a card. Write it with its unit, such as "24GB", or in bytes.')
    return size


def smallest_card(needed: int) -> int | None:
    """The smallest of the cards in GB with room for so many bytes; None where there is none."""
    return next((size for size in SIZES if needed <= SHARE * size * GIB), None)

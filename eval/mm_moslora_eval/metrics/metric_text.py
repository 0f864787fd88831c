"""String helpers of several metrics."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")


def levenshtein(first: Sequence[str], second: Sequence[str]) -> int:
    """Levenshtein distance: fewest edits (insert, delete, replace) that turn one string into the other.

    A column of the table is the bits of two integers (Myers 1999, Hyyrö 2003), so that long texts take little time.
    """
    if len(first) > len(second):
        first, second = second, first
    if not first:
        return len(second)
    places = bit_places(second, set(first))
    whole, last = (1 << len(second)) - 1, 1 << (len(second) - 1)
    rising, falling, distance = whole, 0, len(second)
    for item in first:
        equal = places[item]
        right = equal | falling
        down = (((equal & rising) + rising) ^ rising) | equal
        up = falling | (whole & ~(down | rising))
        below = rising & down
        distance += bool(up & last) - bool(below & last)
        up, below = (up << 1 | 1) & whole, (below << 1) & whole
        rising, falling = below | (whole & ~(right | up)), up & right
    return distance


def bit_places(items: Sequence[str], wanted: set[str]) -> dict[str, int]:
    """For every wanted item an integer with a bit for each of its places."""
    found = {item: bytearray(len(items) // 8 + 1) for item in wanted}
    for index, item in enumerate(items):
        if item in found:
            found[item][index // 8] |= 1 << index % 8
    return {item: int.from_bytes(bits, "little") for item, bits in found.items()}


def strip_each(text: str, characters: str) -> str:
    """Strip the characters from both ends one after the other, in their order (not as a set)."""
    for character in characters:
        text = text.strip(character)
    return text


def plain_number(text: str) -> float | None:
    """The number that the whole text writes in decimal or scientific form, or None.

    Unlike `float` it does not accept `nan`, `inf` or `1_000` in a model's output.
    """
    stripped = text.strip()
    return float(stripped) if _NUMBER.fullmatch(stripped) else None


def letters(count: int) -> list[str]:
    """The first option letters: A, B, C, ..."""
    return list(string.ascii_uppercase[:count])

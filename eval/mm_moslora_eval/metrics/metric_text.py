"""String helpers of several metrics."""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Hashable, Sequence

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")


def levenshtein(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Levenshtein distance: fewest edits (insert, delete, replace) that turn one string into the other."""
    if len(first) > len(second):
        first, second = second, first
    if not second:
        return 0
    # A column of the table of edits is the bits of two integers (Myers 1999, Hyyrö 2003): long texts take little time.
    places, size = bit_places(second, set(first)), len(second)
    whole, last = (1 << size) - 1, 1 << size >> 1
    rising, falling, distance = whole, 0, size
    for item in first:
        equal = places.get(item, 0)
        right = equal | falling
        down = (((equal & rising) + rising) ^ rising) | equal
        up = falling | (whole & ~(down | rising))
        below = rising & down
        distance += bool(up & last) - bool(below & last)
        up, below = (up << 1 | 1) & whole, (below << 1) & whole
        rising, falling = below | (whole & ~(right | up)), up & right
    return distance


def bit_places(items: Sequence[Hashable], wanted: Collection[Hashable]) -> dict[Hashable, int]:
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


FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}
"""Full-width signs -> those of ASCII."""


def letters(count: int) -> list[str]:
    """The first option letters: A, B, C, ..."""
    return list(string.ascii_uppercase[:count])

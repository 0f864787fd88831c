"""String helpers of several metrics."""

from __future__ import annotations

import re
import string
from collections import deque
from collections.abc import Collection, Hashable, Iterator, Sequence

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")


def levenshtein(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Levenshtein distance: fewest edits (insert, delete, replace) that turn one string into the other."""
    if len(first) > len(second):
        first, second = second, first
    return EditPattern(second, wanted=set(first)).distance(first)


class EditPattern:
    """A string that others are compared with.

    A column of the table of edits is the bits of two integers (Myers 1999, Hyyrö 2003), so that long texts take little
    time.

    Args:
        items: the string.
        wanted: the items of the others; None: any.
    """

    def __init__(self, items: Sequence[Hashable], *, wanted: Collection[Hashable] | None = None) -> None:
        self.size = len(items)
        self._places = bit_places(items, set(items) if wanted is None else wanted)

    def distance(self, text: Sequence[Hashable]) -> int:
        """The Levenshtein distance of a whole text."""
        if not self.size:
            return len(text)
        return next(iter(deque(self._distances(text, anywhere=False), maxlen=1)), self.size)

    def ends(self, text: Sequence[Hashable]) -> Iterator[int]:
        """For every place of a text the smallest distance of the parts that end there (Sellers 1980)."""
        return self._distances(text, anywhere=True)

    def _distances(self, text: Sequence[Hashable], *, anywhere: bool) -> Iterator[int]:
        whole, last = (1 << self.size) - 1, 1 << self.size >> 1
        rising, falling, distance, first = whole, 0, self.size, int(not anywhere)
        for item in text:
            equal = self._places.get(item, 0)
            right = equal | falling
            down = (((equal & rising) + rising) ^ rising) | equal
            up = falling | (whole & ~(down | rising))
            below = rising & down
            distance += bool(up & last) - bool(below & last)
            up, below = (up << 1 | first) & whole, (below << 1) & whole
            rising, falling = below | (whole & ~(right | up)), up & right
            yield distance


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


def letters(count: int) -> list[str]:
    """The first option letters: A, B, C, ..."""
    return list(string.ascii_uppercase[:count])

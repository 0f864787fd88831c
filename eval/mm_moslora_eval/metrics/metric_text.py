"""String helpers of several metrics."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")


def levenshtein(first: Sequence[str], second: Sequence[str]) -> int:
    """Levenshtein distance: fewest edits (insert, delete, replace) that turn one string into the other."""
    if len(first) > len(second):
        first, second = second, first
    row = list(range(len(first) + 1))
    for i, right in enumerate(second, start=1):
        diagonal, row[0] = row[0], i
        for j, left in enumerate(first, start=1):
            above = row[j]
            row[j] = diagonal if left == right else 1 + min(diagonal, above, row[j - 1])
            diagonal = above
    return row[-1]


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

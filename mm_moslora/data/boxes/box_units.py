"""The units of coordinates: pixels of a file, or shares of its sides."""

from __future__ import annotations

from collections.abc import Sequence


def are_shares(numbers: Sequence[float]) -> bool:
    """Whether numbers say themselves that they are shares of a picture's sides: no annotator draws within a pixel."""
    return all(0 <= number <= 1 for number in numbers) and not all(number.is_integer() for number in numbers)

"""Boxes and points of records: their forms in texts, and where they lie in what the model sees."""

from __future__ import annotations

from collections.abc import Sequence


def are_shares(numbers: Sequence[float]) -> bool:
    """Whether numbers say themselves that they are shares of a picture's sides: no annotator draws within a pixel."""
    return all(0 <= number <= 1 for number in numbers) and not all(number.is_integer() for number in numbers)

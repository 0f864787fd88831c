"""Numbers in answers, as digits or as words, and their comparison with a tolerance."""

from __future__ import annotations

import math
import re

_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_VALUES = {name: value for value, name in enumerate(_UNITS)} | {
    name: 10 * value for value, name in enumerate(_TENS, start=2)
}
_WORD = "|".join(sorted(_VALUES, key=len, reverse=True))
_BELOW_HUNDRED = rf"(?:(?:{'|'.join(_TENS)})[\s-](?:{'|'.join(_UNITS[1:10])})|{_WORD})\b"
_IN_WORDS = rf"\b(?:(?:{_WORD}|a)\s+hundred\b(?:\s+(?:and\s+)?{_BELOW_HUNDRED})?|{_BELOW_HUNDRED})"
_DIGITS = r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?%?"
_NUMBER = re.compile(rf"(?P<words>{_IN_WORDS})|(?P<digits>(?<![\w.])(?=[-+\u2212]?\.?\d){_DIGITS})", re.I)
MOST_CHARACTERS = 100_000
"""Characters of an answer that are searched for numbers."""


def numbers_in(text: str) -> list[float]:
    """The numbers of a text in their order, in digits (12 for `12%`, 1200 for `1,200`) or in words."""
    found = []
    for match in _NUMBER.finditer(text[:MOST_CHARACTERS]):
        value = _words(match["words"]) if match["words"] else _digits(match["digits"])
        if value is not None:
            found.append(value)
    return found


def _digits(text: str) -> float | None:
    try:
        value = float(text.replace(",", "").replace("\u2212", "-").rstrip("%"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _words(text: str) -> float:
    total, part = 0, 0
    for word in re.split(r"[\s-]+", text.lower()):
        if word == "hundred":
            total, part = 100 * part, 0
        elif word != "and":
            part += 1 if word == "a" else _VALUES[word]
    return float(total + part)


def within(answer: str, reference: str, *, relative: float = 0.0, absolute: float = 0.0) -> float:
    """1 where the last number of an answer is the reference's, up to a tolerance of its amount or an absolute one.

    Raises:
        ValueError: the reference holds no number.
    """
    expected, found = numbers_in(reference), numbers_in(answer)
    if not expected:
        raise ValueError(f"the reference {reference[:80]!r} holds no number")
    if not found:
        return 0.0
    margin = max(relative * abs(expected[-1]), absolute)
    # A rounding error of the decimal form does not decide.
    return float(abs(found[-1] - expected[-1]) <= margin + 1e-9 * max(1.0, abs(expected[-1])))


def number_text(value: float) -> str:
    """A number without an empty fraction: `3`, `2.5`."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)

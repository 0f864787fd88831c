"""Numbers in answers, as digits or as words, compared with a tolerance, and formulas, compared by `math-verify`.

`math-verify` may take for ever: see `timed_calls`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_VALUES = {name: value for value, name in enumerate(_UNITS)} | {
    name: 10 * value for value, name in enumerate(_TENS, start=2)
}
_SCALES = {"dozen": 12, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_WORD = "|".join(sorted(_VALUES, key=len, reverse=True))
_SCALE = rf"\s+(?:{'|'.join(_SCALES)})\b"
_BELOW_HUNDRED = rf"(?:(?:{'|'.join(_TENS)})[\s-](?:{'|'.join(_UNITS[1:10])})|{_WORD})\b"
_BELOW_THOUSAND = rf"(?:(?:{_WORD}|a)\s+hundred\b(?:\s+(?:and\s+)?{_BELOW_HUNDRED})?|{_BELOW_HUNDRED})"
_GROUP = rf"(?:{_BELOW_THOUSAND}|a){_SCALE}"
_IN_WORDS = (
    rf"\b(?:{_GROUP}(?:\s+(?:and\s+)?{_GROUP})*(?:\s+(?:and\s+)?{_BELOW_THOUSAND})?|{_BELOW_THOUSAND})"
    rf"(?:\s+point(?:\s+(?:{'|'.join(_UNITS[:10])})\b)+)?"
)
_SIGN = r"(?:(?:minus|negative)\s+|[-+\u2212])?"
_DIGITS = (
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:[\u00a0\u2009\u202f]\d{3}| 000)+(?!\d)|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?"
)
_POWER = r"\s?(?:[x\u00d7*\u00b7]|\\times|\\cdot)\s?10\^\{?(?P<power>[-+\u2212]?\d{1,3})\}?"
_BEHIND = rf"(?:/(?P<below>\d+(?:\.\d+)?)|{_POWER}|(?P<scale>\s+hundred\b|{_SCALE})|%)?"
_MORE = (
    rf"\}}\{{[^{{}}]*\}}|\s?[/^]\s?(?:[({{]|[-\u2212]?\d)[\d({{}})^/.+\u2212-]*|\s?[\u00bc-\u00be\u2150-\u215e]|{_SCALE}"
    r"|[\s-](?:and\s+a\s+)?(?:half|halves|thirds?|fourths?|fifths?|sixths?|eighths?|tenths?|hundredths?)\b"
)
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.]){_SIGN})(?:(?P<words>{_IN_WORDS})"
    rf"|(?<![\w.])(?:(?P<whole>\d{{1,9}})\s(?=\d+/\d))?(?=\.?\d)(?P<digits>{_DIGITS}){_BEHIND})(?P<more>{_MORE})?",
    re.I,
)
MOST_CHARACTERS = 100_000
"""Characters of an answer that are searched for numbers, from its start, or for its last number from its end."""


def numbers_in(text: str, *, from_end: bool = False) -> list[float]:
    """The numbers of a text in their order, in digits (1200 for `1,200`, 12 for `12%`) or in words.

    A sign, a fraction (`2/3`, `3 1/2`), a power of ten (`1.5x10^3`) and a word of size (`3 million`) belong to the
    number. What goes on in another way, such as `2/3/4`, `2^5`, `3½` or `two thirds`, is none. A comma parts thousands,
    never decimals; a plain space parts numbers, but for `1 000`.
    """
    found, before = [], None
    for match in _NUMBER.finditer(text[-MOST_CHARACTERS:] if from_end else text[:MOST_CHARACTERS]):
        value = None if match["more"] else _words(match["words"]) if match["words"] else _digits(match)
        # `10 minus 5` holds two numbers and no sign.
        between = before is not None and not match.string[before : match.start()].strip()
        before = match.end()
        if value is not None and math.isfinite(value):
            found.append(-value if match["sign"].strip() not in ("", "+") and not between else value)
    return found


def _digits(match: re.Match[str]) -> float | None:
    text = re.sub(r"[,\s]", "", match["digits"])
    try:
        value = int(match["whole"] or 0) + float(text) / float(match["below"] or 1)
        power = (match["power"] or "0").replace("\u2212", "-")
        return value * 10.0 ** int(power) * (_words(f"one{match['scale']}") if match["scale"] else 1)
    except (ValueError, ArithmeticError):
        return None


def _words(text: str) -> float:
    whole, _, decimals = re.sub(r"[\s-]+", " ", text.lower()).partition(" point ")
    total, part = 0, 0
    for word in whole.split():
        if word == "hundred":
            part *= 100
        elif word in _SCALES:
            total, part = total + part * _SCALES[word], 0
        elif word != "and":
            part += 1 if word == "a" else _VALUES[word]
    return float(f"{total + part}.{''.join(str(_VALUES[word]) for word in decimals.split())}")


def within(answer: str, reference: str, *, relative: float = 0.0, absolute: float = 0.0) -> float:
    """1 where the last number of an answer is the reference's, up to a tolerance of its amount or an absolute one."""
    expected, found = numbers_in(reference, from_end=True), numbers_in(answer, from_end=True)
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


MOST_FORMULA_CHARACTERS = 20_000
"""Characters of an answer that are read, from its end, where the result stands."""


def equal(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer equals any of the references, as a text or as a formula."""
    from math_verify import parse, verify

    if answer.strip() in {reference.strip() for reference in references}:
        return True
    # The time limit is that of the other process: signals do not end a computation within one long number.
    found = parse(answer[-MOST_FORMULA_CHARACTERS:], parsing_timeout=None)
    unread = []
    for reference in references:
        text = reference if "$" in reference or "\\boxed" in reference else f"${reference}$"
        if not (expected := parse(text, parsing_timeout=None)):
            unread.append(reference)
        elif verify(expected, found, timeout_seconds=None):
            return True
    if unread:
        raise ValueError(f"the reference {unread[0][:80]!r} is no formula that math-verify reads")
    return False


FIRST_CALLS = {"equal": {"answer": "$1$", "references": ["1"]}}
"""Arguments of a first call in a process of its own, which imports what a comparison needs."""

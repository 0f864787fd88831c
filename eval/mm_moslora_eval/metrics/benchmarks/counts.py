"""Counts as the evaluation code of counting benchmarks reads and compares them."""

from __future__ import annotations

import re

_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_NUMERALS = {word: str(number) for number, word in enumerate(_WORDS)} | {"none": "0"}


def count_lmms_eval(text: str) -> str:
    """lmms-eval for CountBench: the whole answer in lower case; a word up to twenty becomes digits."""
    plain = text.strip().lower()
    return _NUMERALS.get(plain, plain)


def first_digits(text: str) -> str:
    """lmms-eval for PixmoCount: the first run of digits, else the whole answer."""
    match = re.search(r"\d+", text)
    return match[0] if match else text.strip()


def contains_vlmevalkit(text: str, reference: str) -> float:
    """VLMEvalKit for CountBench: the reference lies anywhere in the answer, so `12` contains `2`."""
    return float(reference in text)

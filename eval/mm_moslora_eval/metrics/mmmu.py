"""MMMU's open questions: find the key phrases and numbers of an answer and compare them with the reference.

Source: the evaluation script of MMMU. Letters are parsed in `multiple_choice`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Parsed = str | float

_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
# None begins within digits: it would be searched for at each of them.
_SCIENTIFIC = re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_SENTENCES = re.compile(r"\.\s(?=[A-Z])|\n")
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")


def extract_numbers(text: str) -> list[str]:
    """Every number in the text: with thousands commas, then scientific, then plain; overlaps are kept."""
    return [*_WITH_COMMAS.findall(text), *_SCIENTIFIC.findall(text), *_SIMPLE.findall(text)]


def normalize(text: str) -> list[Parsed]:
    """A number becomes a float of two decimals; other text is lower-cased; one character gets a space on each side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def parse_open(text: str) -> list[Parsed]:
    """The phrases and numbers that may be the answer, without repetitions, in order of appearance."""
    phrases = _key_phrases(text)
    candidates = [*phrases, *(number for phrase in phrases for number in extract_numbers(phrase))]
    return list(dict.fromkeys(item for candidate in candidates for item in normalize(candidate)))


def _key_phrases(text: str) -> list[str]:
    text = text.strip().strip(".").lower()
    parts = _SENTENCES.split(text)
    phrases = []
    for index, part in enumerate(parts):
        # The last part may be nothing but an equation.
        indicators = (*_INDICATORS, "=") if index == len(parts) - 1 else _INDICATORS
        tails = [part.split(indicator)[-1].strip() for indicator in indicators if indicator in part]
        shortest = _shortest(tails)
        if shortest and shortest not in _TRIVIAL:
            phrases.append(shortest)
    return phrases or [text]


def _shortest(tails: Sequence[str]) -> str:
    """The shortest tail; an empty tail is replaced by the next one, as in the source."""
    best = ""
    for tail in tails:
        if not best or len(tail) < len(best):
            best = tail
    return best


def options_vlmevalkit(references: Sequence[str]) -> Mapping[str, str]:
    """VLMEvalKit's two options of an open question: A is the reference, B is everything else.

    Several references become one option, written as a Python list.
    """
    return {"A": references[0] if len(references) == 1 else str(list(references)), "B": "Other Answers"}


def open_correct(parsed: Sequence[Parsed], reference: str | Sequence[str]) -> bool:
    """Whether a text reference lies within a parsed phrase or a numeric one equals a parsed number."""
    references = [reference] if isinstance(reference, str) else reference
    gold = [item for text in references for item in normalize(text)]
    for answer in parsed:
        if isinstance(answer, str):
            if any(isinstance(item, str) and item in answer for item in gold):
                return True
        elif answer in gold:
            return True
    return False

"""DynaMath in VLMEvalKit: the short answer of a JSON reply, and its comparison by kind of answer.

The source asks a judge for the short answer where the reply is no JSON; here such a reply is read as it is.
"""

from __future__ import annotations

import math
import re

from mm_moslora.utils.untrusted_data import StrictJsonError, parse_object

_CONTROL = re.compile(r"[\x00-\x1f]")
_FLOAT, _CHOICE = "float", "multiple choice"


def short_answer(text: str, kind: str) -> str:
    """The value of `short answer` in the reply, else the reply, in the form of its kind; empty if it has none.

    Args:
        text: the reply.
        kind: `float`, `multiple choice`, or another word for text.
    """
    plain = text[text.find("{") : text.rfind("}") + 1] if 0 <= text.find("{") < text.rfind("}") else text
    plain = _CONTROL.sub(" ", plain.replace("\\", ""))  # the source's JSON may hold line feeds in strings
    try:
        said = parse_object(plain).get("short answer")
    except StrictJsonError:
        said = None
    return (_in_form(said, kind) if isinstance(said, str) else "") or _in_form(plain, kind)


def _in_form(text: str, kind: str) -> str:
    if kind == _CHOICE:
        return _letter(text)
    if kind == _FLOAT:
        value = _number(text)
        return "" if value is None else repr(value)
    return text


def _letter(text: str) -> str:
    named = [letter for letter in "ABCDE" if letter in text.upper()]
    return text.upper() if len(text) == 1 else named[0] if len(named) == 1 else ""


def _number(text: str) -> float | None:
    first, pi, _ = text.split(" ")[0].partition("\N{GREEK SMALL LETTER PI}")
    try:
        value = float(first) * (math.pi if pi else 1.0)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def score(answer: str, reference: str, kind: str) -> float:
    """A number within 0.001, the letter, or a text that lies within the reference."""
    if kind == _FLOAT:
        expected, found = _number(reference), _number(answer)
        return float(expected is not None and found is not None and abs(found - expected) <= 0.001)
    if kind == _CHOICE:
        return float(answer == reference)
    return float(answer.lower() in reference.lower())

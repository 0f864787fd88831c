"""Values that answers write as Python or JSON does, and code blocks that hold them."""

from __future__ import annotations

import re
from typing import Any

from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json, parse_literal

_FENCE = re.compile(r"```(?:python|json)?\n", re.I)
_RUN = re.compile(r"[\w\s]+")
_SEPARATOR = re.compile(r"[\"']?\s*[:=]")
_VALUE = re.compile(r"\s*[\"']?([^\n,\"'{}]+)[\"']?")


def fenced(text: str) -> list[str]:
    """The contents of the code blocks of a text, which begin and end with lines of their own."""
    found, place = [], 0
    while (start := _FENCE.search(text, place)) and (end := text.find("\n```", start.end())) >= 0:
        found.append(text[start.end() : end])
        place = end + 4
    return found


def mapping_in(text: str) -> dict[str, str]:
    """The keys and values of the first code block, or of a text: JSON, a Python literal, or loose pairs.

    Values are texts. Anything that is no mapping gives none.
    """
    content = next(iter(fenced(text)), text.strip())
    found = literal_or_json(content)
    if found is None:
        return dict(_pairs(content))
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        return {}
    return {key.strip(): str(value).strip() for key, value in found.items()}


def literal_or_json(content: str) -> Any:
    """What a text holds as JSON or as a literal; None: it is neither."""
    try:
        return parse_json(content, constants=True, repeats=True)
    except StrictJsonError:
        pass
    try:
        return parse_literal(content)
    except StrictJsonError:
        return None


def _pairs(content: str) -> list[tuple[str, str]]:
    """What stands before and behind a colon or an equals sign; every character is read a few times at most."""
    found, place = [], 0
    while run := _RUN.search(content, place):
        place = run.end()
        if (sign := _SEPARATOR.match(content, place)) and (value := _VALUE.match(content, sign.end())):
            found.append((run[0].strip(), value[1].strip()))
            place = value.end()
    return found

"""Calls as in Python whose template writes texts between quotes as they are, `[find(name='O'Neil', days=2)]` (LFM2).

Neither Python nor transformers' `python-call-list` reads such a text: nothing in it is escaped.
"""

from __future__ import annotations

import re
from typing import Any

from transformers.utils.chat_parsing.content_parsers import parse_content

_CALL = re.compile(r"\s*(?P<name>[\w.:/-]+)\(\s*")
_KEY = re.compile(r"\s*(?P<key>[\w.-]+)\s*=\s*")
_END = re.compile(
    r"(?P<further>,(?=\s*[\w.-]+\s*=))"  # and another argument
    r"|\)\s*(?:,(?=\s*[\w.:/-]+\()|(?P<last>\]\s*\Z))"  # and another call, or none
)


def read_python_calls(text: str) -> list[dict[str, Any]]:
    """The calls in OpenAI's form.

    A text ends with the first quote that a further argument, a further call or the end of the list follows.

    Raises:
        ValueError: they are no calls.
    """
    place = text.find("[") + 1
    if text[:place].strip() != "[":
        raise ValueError("a list of calls begins with [")
    calls = []
    while call := _CALL.match(text, place):
        arguments, end = _arguments(text, call.end())
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
        if end["last"] is not None:
            return calls
        place = end.end()
    raise ValueError(f"no call at character {place}")


def _arguments(text: str, place: int) -> tuple[dict[str, Any], re.Match[str]]:
    """The arguments of a call, and what follows the last one."""
    arguments: dict[str, Any] = {}
    end = _END.match(text, place)
    while end is None or end["further"] is not None:
        if (key := _KEY.match(text, place)) is None or key["key"] in arguments:
            raise ValueError(f"no argument of its own at character {place}")
        arguments[key["key"]], end = _value(text, key.end())
        place = end.end()
    return arguments, end


def _value(text: str, start: int) -> tuple[Any, re.Match[str]]:
    """The value of an argument, and what follows it."""
    for end in _END.finditer(text, start):
        written = text[start : end.start()].strip()
        if len(written) > 1 and written[0] == written[-1] == "'":
            return written[1:-1], end
        try:
            [call] = parse_content(f"[f(v={written})]", "python-call-list", {})
        except ValueError:
            continue
        return call["arguments"]["v"], end
    raise ValueError(f"no value at character {start}")

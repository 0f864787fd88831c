"""Calls as in Python whose template writes texts between quotes as they are, `[find(name='O'Neil', days=2)]` (LFM2).

Neither Python nor transformers' `python-call-list` reads such a text: nothing in it is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from transformers.utils.chat_parsing.content_parsers import parse_content

Keys = Mapping[str, Collection[str] | None]
"""Names of arguments by tool; None: any."""
_MOST = 200_000
"""Characters of calls; more are not read."""
_CALL = re.compile(r"\s*(?P<name>[\w.:/-]+)\(\s*")
_KEY = re.compile(r"\s*(?P<key>[\w.-]+)\s*=\s*")
_END = re.compile(
    r"\s*(?:(?P<further>,(?=\s*(?P<key>[\w.-]+)\s*=))"  # and another argument
    r"|\)\s*(?:,(?=\s*(?P<call>[\w.:/-]+)\()|(?P<last>\]\s*\Z)))"  # and another call, or none
)
_TEXT_END = re.compile(f"'{_END.pattern}")
_PART = re.compile(r"""'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*"|[][(){},'"]""", re.DOTALL)


def read_python_calls(text: str, keys: Keys | None = None) -> list[dict[str, Any]]:
    """The calls in OpenAI's form, read once from the left.

    A text ends with the first quote that a further argument, a further call or the end of the list follows.

    Args:
        text: the list.
        keys: of the tools that are offered; others begin no argument and no call behind a text. None: not known.

    Raises:
        ValueError: they are no calls, or too long.
    """
    place = text.find("[") + 1
    if text[:place].strip() != "[" or len(text) > _MOST:
        raise ValueError(f"a list of calls begins with [ and has at most {_MOST} characters")
    calls = []
    while call := _CALL.match(text, place):
        arguments, end = _arguments(text, call, keys)
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
        if end["last"] is not None:
            return calls
        place = end.end()
    raise ValueError(f"no call at character {place}")


def _arguments(text: str, call: re.Match[str], keys: Keys | None) -> tuple[dict[str, Any], re.Match[str]]:
    """The arguments of a call, and what follows the last one."""
    arguments: dict[str, Any] = {}
    place = call.end()
    end = _END.match(text, place)
    while end is None or end["further"] is not None:
        if (key := _KEY.match(text, place)) is None or key["key"] in arguments:
            raise ValueError(f"no argument of its own at character {place}")
        if text.startswith("'", key.end()):
            known = None if keys is None else keys.get(call["name"])
            known = (
                known if known and key["key"] in known else None
            )  # else the schema does not tell what the model means
            end = _end_of_text(text, key.end(), known, keys)
            arguments[key["key"]] = text[key.end() + 1 : end.start()]
        else:
            arguments[key["key"]], end = _value(text, key.end())
        place = end.end()
    return arguments, end


def _end_of_text(text: str, start: int, known: Collection[str] | None, tools: Collection[str] | None) -> re.Match[str]:
    """The end of a text that begins with the quote at `start`, and what follows it."""
    for end in _TEXT_END.finditer(text, start + 1):
        key, call = end["key"], end["call"]
        if (key is None or known is None or key in known) and (call is None or tools is None or call in tools):
            return end
    raise ValueError(f"no end of the text at character {start}")


def _value(text: str, start: int) -> tuple[Any, re.Match[str]]:
    """The value of an argument that is no text between single quotes, and what follows it."""
    depth, stop = 0, len(text)
    for part in _PART.finditer(text, start):
        sign = part[0]
        if sign in ("'", '"'):
            raise ValueError(f"a text without an end at character {part.start()}")
        if sign in "[({":
            depth += 1
        elif sign in "])},":
            if depth == 0:
                stop = part.start()
                break
            depth -= 0 if sign == "," else 1
    if (end := _END.match(text, stop)) is None:
        raise ValueError(f"no value at character {start}")
    [call] = parse_content(f"[f(v={text[start:stop]})]", "python-call-list", {})
    return call["arguments"]["v"], end

"""Calls of tools in what a model writes: the form of a chat template's calls, and the calls of an answer.

The form is a response template of transformers (`utils/chat_parsing`): the tokenizer's own, or one that is read off a
call which the chat template renders. A form that is read off is used only if it gives that call back.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

from transformers.utils.chat_parsing import ResponseParser, parse_response

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.conversation_shape import BREAK, PROBE_CALL, PROBE_TOOL
from mm_moslora.data.chat.record_keys import REASONING
from mm_moslora.serve.inference.python_calls import Keys, read_python_calls
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json

_NAME = r"(?P<name>[\w.:/-]+)"
_FUNCTION = PROBE_CALL["function"]
_ARGUMENTS: dict[str, str] = _FUNCTION["arguments"]
_OTHER_CALL = PROBE_CALL | {"function": {"name": "look-up", "arguments": {"town": "Rome 1", "days": 2}}}
_QUOTED = """it's a "C:\\new", b='1') or [f(c=2)]"""
_QUOTED_CALL = PROBE_CALL | {"function": {"name": "look-up", "arguments": {"town": _QUOTED, "days": 2}}}
_OTHER_TOOL = {
    "type": "function",
    "function": {
        "name": "look-up",
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "description": "A text."},
                "days": {"type": "integer", "description": "A number."},
            },
        },
    },
}
"""A tool that no form is read off: a form must give back its call, too."""
_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}


def call_form(encoder: ConversationEncoder) -> dict[str, Any] | None:
    """The response template of a model's answers where they may call tools; None: the form of calls is not known."""
    own: dict[str, Any] | None = getattr(encoder.tokenizer, "response_template", None)
    if own is not None:
        return own
    given = [[PROBE_CALL], [PROBE_CALL] * 2, [_OTHER_CALL], [_QUOTED_CALL]]
    one, two, other, _ = texts = [_rendered(encoder, calls) for calls in given]
    fields = list(_fields(one, two)) if one and other else []
    forms = [{"start_anchor": "\n", "fields": {"tool_calls": f | {"repeats": True}, "content": {}}} for f in fields]
    for count in (4, 3):  # of templates that do not escape texts, some forms read most calls
        for form in forms:
            if all(
                _gives_back(form, text, calls) for text, calls in list(zip(texts, given, strict=True))[:count] if text
            ):
                return form
    return None


def _rendered(encoder: ConversationEncoder, calls: list[dict[str, Any]]) -> str:
    """An answer with these calls, without its end; empty where the template refuses it, or several calls."""
    tools = json.dumps([PROBE_TOOL, _OTHER_TOOL])
    try:
        plan = encoder.template.plan((f"user{BREAK}{tools}", f"assistant:c{BREAK}{json.dumps(calls)}"))
    except ConfigError:
        return ""
    text, end = plan.slots[1].calls, encoder.tokens.special_end(plan.slots[1].calls)
    plain = encoder.tokens.first_special(encoder.template.plan(("user", "assistant")).tail)
    ends = (encoder.tokenizer.eos_token, plain[0] if plain else "")
    return text.removesuffix(end) if end in ends else text


def _gives_back(form: dict[str, Any], text: str, calls: list[dict[str, Any]]) -> bool:
    try:
        read = _flat(parse_response(text, form, prefix="", tools=[PROBE_TOOL, _OTHER_TOOL]).get("tool_calls", []))
    except (ValueError, KeyError, re.error):
        return False
    return [call["function"] for call in read] == [call["function"] for call in calls]


def _fields(one: str, two: str) -> Iterator[dict[str, Any]]:
    """Possible descriptions of the calls in two renderings, with one call and with two."""
    keys = [text for pair in _ARGUMENTS.items() for text in pair]
    name, places = one.find(_FUNCTION["name"]), [one.find(text) for text in keys]
    if -1 in (name, *places):
        return
    inner = one.rfind("{", 0, places[0]), one.find("}", places[-1]) + 1
    outer = one.rfind("{", 0, name), one.find("}", inner[1]) + 1
    whole = _object(one, *outer)
    named = {value: key for key, value in whole.items() if isinstance(value, str)}.get(_FUNCTION["name"])
    given = next((key for key, value in whole.items() if value == _ARGUMENTS), None)
    if named and given:
        call = {"type": "function", "function": {"name": f"{{content.{named}}}", "arguments": f"{{content.{given}}}"}}
        yield _bounds(one, two, *outer, start=rf'\{{\s*"{re.escape(named)}"\s*:') | {
            "content": "json",
            "transform": call,
        }
        each = {"type": "function", "function": {"name": f"{{{named}}}", "arguments": f"{{{given}}}"}}
        listed = one.rfind("[", 0, outer[0]), one.find("]", outer[1]) + 1
        yield _bounds(one, "", *listed, start=r"\[") | {"content": "json", "transform": each, "transform_each": True}
    elif _object(one, *inner) == _ARGUMENTS:
        head = _head(one[name : inner[0]])
        yield _bounds(one, two, name, inner[1], head=head) | {"content": "json", "transform": _CALL}
    ends = [place + len(text) for place, text in zip(places, keys, strict=True)]
    quote = one[ends[0] : places[1]].removeprefix(":").strip()
    if quote:  # JSON with a quote of its own, and keys without (Gemma)
        head = _head(one[name : inner[0]])
        options = {"unquoted_keys": True, "string_delims": [[quote, quote]]}
        field = {"content": "json", "content_args": options, "transform": _CALL}
        yield _bounds(one, two, name, inner[1], head=head) | field
    yield from _python(one)
    yield from _tags(one, two, name, places, keys)


def _tags(one: str, two: str, name: int, places: list[int], keys: list[str]) -> Iterator[dict[str, Any]]:
    """Arguments as tags: the texts around keys and values, of which the second argument shows what belongs to each."""
    ends = [place + len(text) for place, text in zip(places, keys, strict=True)]
    before, between = one[name : places[0]], one[ends[1] : places[2]]
    opening = _common_end(before, between)
    closing, middle = between.removesuffix(opening), one[ends[0] : places[1]]
    if not (opening.strip() and closing.strip() and middle.strip()):
        return
    pattern = rf"{_literal(opening)}\s*(?P<key>.+?){_literal(middle)}(?P<value>.*?){_literal(closing)}"
    stop = one.find(closing.rstrip(), ends[3]) + len(closing.rstrip())
    head = _head(before.removesuffix(opening))
    yield _bounds(one, two, name, stop, head=head) | {
        "content": "xml-inline", "content_args": {"tag_pattern": pattern}, "transform": _CALL,
    }  # fmt: skip


def _python(one: str) -> Iterator[dict[str, Any]]:
    """Calls as in Python, `[name(key="value")]`, with escaped texts, or as `read_python_calls` reads them."""
    start, stop = one.find("["), one.rfind("]") + 1
    bounds = _bounds(one, "", start, stop, start=r"\[\w")
    each = {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}}
    yield bounds | {"content": "python-call-list", "transform": each, "transform_each": True}
    yield bounds | {"content": "text"}


def _bounds(one: str, two: str, begin: int, stop: int, *, head: str = "", start: str = "") -> dict[str, Any]:
    """The texts that open and close one call, `begin` to `stop` of a rendering, without those around all calls.

    Args:
        one: an answer with one call.
        two: an answer with two; empty: all calls stand within one opening and closing.
        begin: start of the call.
        stop: its end.
        head: pattern of its beginning, which belongs to the opening.
        start: pattern of its beginning, for calls without an opening; these begin the answer.
    """
    lead, tail = one[:begin], one[stop:]
    second = two.find(one[begin:stop], stop + len(lead) - begin) if two else -1
    between = two[stop:second] if second >= 0 else f"{tail}{lead}"
    opening = _common_end(lead, between) if second >= 0 else lead
    closing = between.removesuffix(opening).strip() if second >= 0 else tail.strip()
    around, rest = lead.removesuffix(opening), tail.strip().removeprefix(closing)
    opened = rf"\s*{_literal(opening.lstrip())}" if opening.strip() else rf"\A\s*(?={start})" if start else r"(?!)"
    field = {"open_pattern": (rf"(?:\s*{_literal(around)})?" if around.strip() else "") + opened + head}
    if closing:
        field["close_pattern"] = rf"\s*{_literal(closing)}" + (rf"(?:\s*{_literal(rest)})?" if rest.strip() else "")
    return field


def _head(text: str) -> str:
    """A pattern of the beginning of a call, from its name on."""
    name, rest = _FUNCTION["name"], text.removeprefix(_FUNCTION["name"])
    return _NAME + _literal(rest).replace(re.escape(name), "(?P=name)")


def _common_end(first: str, second: str) -> str:
    return os.path.commonprefix([first[::-1], second[::-1]])[::-1]  # noqa: RUF071  (of texts)


def _literal(text: str) -> str:
    """A pattern of a text, in which white space may differ."""
    return r"\s*".join(re.escape(word) for word in re.split(r"\s+", text))


def _object(text: str, start: int, stop: int) -> dict[str, Any]:
    try:
        value = parse_json(text[start:stop]) if 0 <= start < stop else None
    except StrictJsonError:
        return {}
    return value if isinstance(value, dict) else {}


def _flat(calls: list[Any], keys: Keys | None = None) -> list[dict[str, Any]]:
    read = (read_python_calls(item, keys) if isinstance(item, str) else item for item in calls)
    return [call for item in read for call in (item if isinstance(item, list) else [item])]


def _keys(schema: Any) -> list[str] | None:
    """The names of arguments of a schema; None where it allows others, or names none."""
    named = schema.get("properties") if isinstance(schema, dict) and not schema.get("additionalProperties") else None
    return list(named) if isinstance(named, dict) and named else None


class CallSplit:
    """Separates the calls of an answer from its text, piece by piece.

    Args:
        form: from `call_form`.
        tools: JSON text of the tools; arguments get the types of their schemas, and texts end before their names.
    """

    def __init__(self, form: dict[str, Any], tools: str) -> None:
        offered = parse_json(tools, surrogates=True)
        self._new_parser = partial(ResponseParser, form, prefix="", tools=offered)
        self._parser: ResponseParser = self._new_parser()
        self._keys = {tool["function"]["name"]: _keys(tool["function"].get("parameters")) for tool in offered}
        self._held = ""
        """Text that is neither given as content nor part of a complete call."""

    def add(self, text: str, *, last: bool = False) -> tuple[str, str, list[dict[str, Any]]]:
        """Take the next piece; returns the thinking, the content and the calls that are final now.

        What begins like a call and cannot be read as one is content.
        """
        thinking, content, calls = "", "", []
        for letter in [*text, ""] if last else text:
            self._held += letter
            try:
                for event in self._parser.feed(letter) if letter else self._parser.finalize()[1]:
                    piece = event.get("text", "")
                    if event["type"] == "region_chunk" and event["field"] in (*REASONING, "content"):
                        self._held = self._held.removeprefix(piece)
                        thinking += piece if event["field"] in REASONING else ""
                        content += piece if event["field"] == "content" else ""
                    elif event["type"] == "region_close" and event["field"] == "tool_calls":
                        calls += [_checked(call) for call in _flat([event["value"]], self._keys)]
                        self._held = ""
            except (ValueError, KeyError, TypeError, RecursionError):  # calls behind it are read again
                content, self._held, self._parser = content + self._held, "", self._new_parser()
        return thinking, content, calls


def _checked(call: Any) -> dict[str, Any]:
    """A call in OpenAI's form, with an id of its own."""
    function = call["function"]
    name, arguments = function["name"], function["arguments"]
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if not isinstance(parse_json(text, surrogates=True), dict):
        raise ValueError("arguments that are no object")
    # Nine letters and digits, as Mistral's templates want them.
    return {"id": uuid.uuid4().hex[:9], "type": "function", "function": {"name": name, "arguments": text}}

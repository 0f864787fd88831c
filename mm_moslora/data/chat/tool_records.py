"""Tools of records in one form: what is offered, the calls of an answer, and their results.

Tools are OpenAI's schemas, `{"type": "function", "function": {"name", "description", "parameters"}}`, or the functions
alone, as a list or as its JSON text (LLaMA-Factory, ms-swift). Calls are `{"id", "type", "function": {"name",
"arguments"}}` or `{"name", "arguments"}`, one or several, and their arguments an object or its JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from mm_moslora.data.chat.record_keys import CALLING, CALLS, SPEAKER, given
from mm_moslora.data.chat.record_turns import Role, Turn
from mm_moslora.data.record_faults import Code, Where, checked_text, is_nothing, kind_of
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.untrusted_data import MAX_DEPTH, StrictJsonError, parse_json

_SCHEMA = 'write a list of {"type": "function", "function": {"name": ..., "parameters": ...}}'
_CALL = 'write {"name": ..., "arguments": {...}} as JSON'
_MARK = "<think>"


class ToolError(DataError):
    """A fault of tools, of a call or of a result."""

    def __init__(self, code: Code, what: str, remedy: str) -> None:
        self.code, self.what, self.remedy = code, what, remedy
        super().__init__(f"{what}; {remedy}")


@contextmanager
def _refusals(field: str, where: Where) -> Iterator[None]:
    try:
        yield
    except ToolError as error:
        raise where.error(error.code, field, error.what, error.remedy) from error


def offered(value: Any, key: str, where: Where) -> str:
    """The JSON text of a record's tools in OpenAI's form; empty without any."""
    with _refusals(key, where):
        return checked_text(_offered(value), key, where)


def _offered(value: Any) -> str:
    tools = _read(value, Code.BAD_TOOLS, _SCHEMA)
    if not isinstance(tools, list):
        raise ToolError(Code.BAD_TOOLS, f"is {kind_of(tools)}, expected a list of tools", _SCHEMA)
    result: dict[str, Any] = {}
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name.strip():
            raise ToolError(Code.BAD_TOOLS, f"its tool {number} is no function with a name", _SCHEMA)
        if not is_nothing(kind := tool.get("type")) and kind != "function":
            what = f"its tool {number} has the type {ascii(kind)[:60]}, expected function"
            raise ToolError(Code.BAD_TOOLS, what, _SCHEMA)
        if name in result:
            raise ToolError(Code.BAD_TOOLS, f"holds two tools with the name {ascii(name)[:60]}", "keep one of them")
        result[name] = tool if function is not tool else {"type": "function", "function": tool}
    return _text(list(result.values()), Code.BAD_TOOLS) if result else ""


def _read_calls(value: Any) -> list[dict[str, Any]]:
    """The calls of an answer in OpenAI's form, with their arguments as objects."""
    value = _read(value, Code.BAD_CALL, _CALL)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name.strip():
            raise ToolError(Code.BAD_CALL, f"is {kind_of(call)} without the name of a tool", _CALL)
        written = function.get("arguments")
        written = function.get("parameters") if is_nothing(written) else written
        empty = is_nothing(written) or (isinstance(written, str) and not written.strip())
        arguments = {} if empty else _read(written, Code.BAD_CALL, _CALL)
        if not isinstance(arguments, Mapping):
            what = f"the arguments of {ascii(name)[:60]} are {kind_of(arguments)}"
            raise ToolError(Code.BAD_CALL, what, "write an object of arguments by name")
        own = {"id": str(call["id"])} if isinstance(call.get("id"), str | int) else {}
        calls.append(own | {"type": "function", "function": {"name": name, "arguments": dict(arguments)}})
    return calls


def _thinking_before_call(value: Any) -> tuple[str, Any]:
    """The block of thinking before the JSON text of a call (LLaMA-Factory), and the JSON text."""
    if not isinstance(value, str) or not value.lstrip().startswith(_MARK):
        return "", value
    thinking, end, call = value.partition("</think>")
    return (f"{thinking}{end}\n\n", call) if end else ("", value)


class OpenCalls:
    """The calls of one conversation, and those of its last answer that wait for a result."""

    def __init__(self) -> None:
        self._open: list[dict[str, Any]] = []
        self._count = 0

    def of_turn(self, item: Mapping[str, Any], role: Role, content: Any, field: str, where: Where) -> tuple[str, Any]:
        """What a turn calls, or the call that it answers, as JSON text, and its content without that."""
        with _refusals(field, where):
            if role == "tool":
                tools = self._answered(item)
            elif role == "assistant" and given(item, SPEAKER)[1] in CALLING:
                content, called = _thinking_before_call(content)
                tools, content = self._called(_read_calls(called)), "" if is_nothing(content) else content
            elif role == "assistant" and (called := given(item, CALLS)[1]):
                tools, content = self._called(_read_calls(called)), "" if is_nothing(content) else content
            else:
                tools = self._called([])
        return checked_text(tools, field, where), content

    def joined(self, answer: Turn, call: Turn, field: str, where: Where) -> Turn:
        """An answer with a call that came as a turn of its own."""
        if answer.weight != call.weight:
            what = f"weighs {call.weight:g} behind a part of the answer that weighs {answer.weight:g}"
            raise where.error(Code.BAD_WEIGHT, field, what, "write one weight for an answer and its calls")
        tools = self._called(_all_calls(answer.tools, call.tools))
        return replace(answer, text=answer.text + call.text, tools=tools)

    def _called(self, calls: list[dict[str, Any]]) -> str:
        """The JSON text of the calls of an answer, each with an id; empty without calls."""
        self._open = []
        for call in calls:
            if "id" not in call:
                call = {"id": f"call{self._count:05}"} | call  # nine letters and digits, as Mistral has them
                self._count += 1
            self._open.append(call)
        return _text(self._open, Code.BAD_CALL) if calls else ""

    def _answered(self, turn: Mapping[str, Any]) -> str:
        """The JSON text of the id and the name of the call that a turn of a tool answers."""
        named = [(key, turn[key]) for key in ("tool_call_id", "name") if not is_nothing(turn.get(key))]
        key, value = named[0] if named else ("", "")
        fits = [
            call for call in self._open if not named or str(value) == (call["id"] if key != "name" else _name(call))
        ]
        if not fits:
            what = f"has the {key} {ascii(value)[:60]}, as no open call" if named else "has no call"
            raise ToolError(Code.NO_CALL, what, "put each result behind the answer that calls the tool, once")
        call = fits[0]
        self._open.remove(call)
        return _text({"tool_call_id": call["id"], "name": _name(call)}, Code.NO_CALL)


def names_not_offered(offered: str, *calls: str) -> set[str]:
    """The names of tools that are called and not offered."""
    names = {str(tool["function"]["name"]) for tool in parse_json(offered or "[]", surrogates=True)}
    return {_name(call) for call in _all_calls(*calls)} - names


def _all_calls(*texts: str) -> list[dict[str, Any]]:
    return [call for text in texts if text for call in parse_json(text, surrogates=True)]


def _name(call: Mapping[str, Any]) -> str:
    return str(call["function"]["name"])


def _read(value: Any, code: Code, remedy: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, surrogates=True, max_depth=MAX_DEPTH - 8)  # it is put into further objects
    except StrictJsonError as error:
        raise ToolError(code, f"is no JSON ({error}): {ascii(value)[:60]}", remedy) from error


def _text(value: Any, code: Code) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:  # NaN, or dates and bytes of tables
        raise ToolError(code, f"is no JSON ({error})", "write numbers, texts, lists and objects") from error

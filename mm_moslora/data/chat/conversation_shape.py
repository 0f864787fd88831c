"""The shape of a conversation: what a chat template gets of each turn besides its texts.

A turn's part of it is `role`, or `role:kinds` (`t` a text, `i` a picture, `v` a video, `c` calls without text), and
after a line break the JSON text of `Turn.tools`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mm_moslora.utils.untrusted_data import MAX_DEPTH, parse_json

BREAK = "\n"
"""Before the JSON text in a turn's part of a sequence of roles."""
PROBE_CALL: dict[str, Any] = {
    "id": "call00000", "type": "function",
    "function": {"name": "probe_tool", "arguments": {"probe_key": "probe value", "second_key": "second value"}},
}  # fmt: skip
"""A call that shows how a template writes calls."""
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool", "description": "A tool.", "parameters": {
            "type": "object",
            "properties": {key: {"type": "string", "description": "A text."} for key in ("probe_key", "second_key")},
        },
    },
}  # fmt: skip
"""Its tool."""
ASKED_WITH_TOOLS = (f"user{BREAK}{json.dumps([PROBE_TOOL])}",)
"""The shortest prompt in which the tool is offered."""
PROBE_RESULT = {"tool_call_id": "call00000", "name": "probe_tool", "content": "a result"}
"""Its result."""


def role_of(shape: str) -> str:
    """The role of a turn's part of a sequence of roles."""
    return shape.partition(BREAK)[0].partition(":")[0]


def kinds_of(shape: str) -> str:
    """The kinds of its contents; empty: one text."""
    return shape.partition(BREAK)[0].partition(":")[2]


def data_of(shape: str) -> Any:
    """What it gives to the template besides contents, see `Turn.tools`; None: nothing."""
    data = shape.partition(BREAK)[2]
    return parsed_data(data) if data else None


def parsed_data(data: str) -> Any:
    """The value of such a JSON text."""
    return parse_json(data, max_depth=2 * MAX_DEPTH, surrogates=True)


def slots_of(shape: str) -> int:
    """The number of contents that have a slot."""
    kinds = kinds_of(shape) or "t"
    return 0 if role_of(shape) == "tool" else kinds.count("t") + kinds.count("c")


def named(roles: Sequence[str]) -> str:
    """The shape for messages, without JSON."""
    return ", ".join(shape.partition(BREAK)[0] for shape in roles)


def with_text_arguments(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls with their arguments as JSON text."""
    return [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in calls
    ]

"""What a request says about tools: `tools` and `tool_choice`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mm_moslora.data.chat.tool_records import ToolError, offered_tools
from mm_moslora.serve.api.api_errors import ApiError
from mm_moslora.utils.untrusted_data import parse_json


def wanted_tools(body: Mapping[str, Any]) -> tuple[str, bool]:
    """The JSON text of the tools that are offered, and whether the one that is left must be called.

    Raises:
        ApiError: tools are wrong, or something is asked for that cannot be kept.
    """
    given, choice = body.get("tools"), body.get("tool_choice")
    try:
        text = offered_tools([] if given is None else given)
    except ToolError as error:
        raise ApiError(f"tools {error.what}; {error.remedy}.", param="tools") from None
    tools = parse_json(text or "[]", surrogates=True)
    for number, tool in enumerate(tools):
        inner = tool["function"].get("strict")
        if inner or tool.get("strict"):
            param = f"tools[{number}]{'.function' if inner else ''}.strict"
            raise ApiError(
                f"{param} is set, and calls are not checked against their schemas here; leave it out.",
                param=param, code="unsupported_parameter",
            )  # fmt: skip
    if choice in (None, "auto"):
        return text, False
    if choice == "none":
        return "", False
    if choice == "required":
        left = tools
        if len(left) > 1:
            raise ApiError(
                f"tool_choice is required, and {len(left)} tools are offered; one alone can be forced here. Name it "
                'by {"type": "function", "function": {"name": ...}}, offer it alone, or use auto.',
                param="tool_choice", code="unsupported_parameter",
            )  # fmt: skip
    else:
        left = [tool for tool in tools if tool["function"]["name"] == _name(choice)]
    if not left:
        raise ApiError("tool_choice asks for a tool that tools does not offer; offer it.", param="tool_choice")
    return json.dumps(left, ensure_ascii=False), True


def _name(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise ApiError(
            'tool_choice is missing or invalid; expected "none", "auto", "required", or {"type": "function", '
            '"function": {"name": ...}}.',
            param="tool_choice", code="unsupported_parameter",
        )  # fmt: skip
    return name

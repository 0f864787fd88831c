"""The keys of records and turns: those that are read, and those that other trainers follow and this one does not.

A key of the second kind changes what another trainer would learn from the record, so it is a fault here. Any other key
is data about the record; `data check` counts and names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_moslora.data.record_faults import Code, Where, is_nothing, kind_of

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of an answer's thinking in chat messages (transformers, vLLM, OpenRouter, gpt-oss)."""
_SHOWN = {"id", "image", "images", "video", "videos"}
READ = {
    "conversations": _SHOWN | {"conversations", "system"},
    "messages": _SHOWN | {"messages", "system"},
    "texts": _SHOWN | {"texts"},
    "question": _SHOWN | {"question", "answer"},
    "caption": _SHOWN | {"caption"},
}
"""Form of a record, by the key that decides it -> keys that are read."""
READ_OF_TURN = {"from", "value", "role", "content", *REASONING}
"""Keys of a turn that are read."""
_PREFERENCE = (
    "it is a preference record, of which only chosen answers may be learned: write them as answers of their own"
)
_TOOLS = "tools are not supported; write the calls and their results as text, or drop the record"
_WEIGHTS = "every answer of a record is learned with the same weight; drop the key, or split off what is to be learned"
_OF_RECORD = {
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images"), _PREFERENCE),
    "tools": _TOOLS,
    "functions": _TOOLS,
    "objects": "boxes are not filled in; write them into the texts, in the model's own form, and drop the key",
}
"""Key of a record that ms-swift, LLaMA-Factory, TRL or Unsloth follow -> what to do."""
_WEIGHING = dict.fromkeys(("loss", "loss_scale", "train", "training", "train_detail", "weight"), _WEIGHTS)
_OF_TURN = {"tool_calls": _TOOLS, "function_call": _TOOLS, **_WEIGHING}
"""The same of a turn."""


def check_record(value: Mapping[str, Any], where: Where) -> None:
    """Refuse a record with a key that changes what other trainers learn from it.

    Raises:
        RecordError: names the key and what to do.
    """
    for key in value.keys() & _OF_RECORD.keys():
        if not _is_empty(value[key]):
            raise where.error(Code.UNFOLLOWED_KEY, key, f"is {kind_of(value[key])}", _OF_RECORD[key])
    if value.get("label") is False:  # KTO: an answer to be avoided; any other label is data about the record
        raise where.error(Code.UNFOLLOWED_KEY, "label", "is false, an answer to be avoided", _PREFERENCE)


def check_turn(turn: Mapping[str, Any], role: str, field: str, where: Where) -> None:
    """Refuse a turn with such a key; see `check_record`."""
    for key in turn.keys() & _OF_TURN.keys():
        weighs, value = key in _WEIGHING, turn[key]
        if _is_empty(value) or (weighs and (role != "assistant" or value in (1, "1", "true", "default"))):
            continue
        found = f"is {value}" if weighs and isinstance(value, int | float) else f"is {kind_of(value)}"
        raise where.error(Code.UNFOLLOWED_KEY, f"{field}.{key}", found, _OF_TURN[key])


def thinking_of(turn: Mapping[str, Any], role: str, field: str, where: Where) -> str:
    """The thinking that a turn holds beside its text, as the block at the start of an answer; empty without any.

    Raises:
        RecordError: it is no text, is given twice, or belongs to no answer.
    """
    given = {key: turn[key] for key in REASONING if not _is_empty(turn.get(key))}
    if not given:
        return ""
    (key, value), *more = given.items()
    content = turn.get("value", turn.get("content"))
    twice = bool(more) or (isinstance(content, str) and content.lstrip().startswith("<think>"))
    if twice or role != "assistant" or not isinstance(value, str):
        what = "is given twice" if twice else f"is {kind_of(value)} of the turn of the {role}"
        raise where.error(
            Code.UNFOLLOWED_KEY, f"{field}.{key}", what, "write the thinking of an answer once, as a text"
        )
    return f"<think>\n{value.strip()}\n</think>\n\n"


def ignored_keys(value: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of a record, and of its turns as `conversations[].key`, that are not read."""
    form = next((key for key in READ if key in value), "")
    found = [str(key) for key in value if key not in READ.get(form, _SHOWN)]
    turns = value.get(form)
    for turn in turns if form in ("conversations", "messages") and isinstance(turns, list) else ():
        found += [f"{form}[].{key}" for key in turn if key not in READ_OF_TURN] if isinstance(turn, Mapping) else []
    return tuple(dict.fromkeys(found))


def _is_empty(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_empty(item) for item in value.values())
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return is_nothing(value) or (isinstance(value, list | tuple) and not value)

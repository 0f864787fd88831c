"""The keys and texts of records and turns that are read, and the answers to be avoided, which are refused.

`data check` counts and names all other keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mm_moslora.data.record_faults import Code, Where, is_empty, kind_of

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of an answer's thinking in chat messages (transformers, vLLM, OpenRouter, gpt-oss)."""
TOOLS = ("tools", "functions")
"""Keys of a record's tools; the second is OpenAI's older one."""
CALLS = ("tool_calls", "function_call")
"""Keys of an answer's calls; the second is OpenAI's older one."""
CALLING = frozenset({"tool_call", "function_call"})
"""Roles of turns that hold calls as JSON text (ms-swift; LLaMA-Factory)."""
RESULTS = ("tool", "function", "tool_response", "observation")
"""Roles of turns that hold the result of a call (OpenAI's two, ms-swift, LLaMA-Factory)."""
_SHOWN = {"id", "image", "images", "video", "videos", "objects", *TOOLS}
READ = {
    "conversations": _SHOWN | {"conversations", "system"},
    "messages": _SHOWN | {"messages", "system"},
    "texts": _SHOWN | {"texts", "system"},
    "question": _SHOWN | {"question", "answer", "system", *REASONING},
    "caption": _SHOWN | {"caption", "system"},
    "text": {"id", "text"},
}
"""Form of a record, by the key that decides it -> keys that are read."""
WEIGHING = ("loss", "loss_scale", "loss_weight", "train", "training", "weight")
"""Keys of an answer's weight in the loss: a truth value (ms-swift, Axolotl) or a number (OpenAI, ms-swift)."""
SPEAKER, CONTENT = ("from", "role"), ("value", "content")
"""Keys of a turn's speaker and content (LLaVA and ShareGPT; chat messages)."""
READ_OF_TURN = {*SPEAKER, *CONTENT, *CALLS, *REASONING, *WEIGHING}
"""Keys of a turn that are read."""
ASKING = ("human", "user", "system")
"""Speakers whose turns have no weight and no calls."""
READ_OF_RESULT = {"name", "tool_call_id"}
"""Keys of the turn of a tool that are read besides."""
READ_OF_PART = {"type", "text", "image", "image_url", "video", "video_url", "path", "url"}
"""Keys of a content part that are read."""
REJECTED = ("rejected", "rejected_response", "rejected_messages")
"""Keys of a rejected answer (TRL and LLaMA-Factory; ms-swift)."""
LABELS = ("label", "kto_tag")
"""Keys that say whether an answer is good (TRL and ms-swift; LLaMA-Factory)."""
REFERENCES = ("solution", "ground_truth", "reference", "answers", "answer")
"""Keys of the reference answers to a question (ms-swift, TRL's examples, EasyR1)."""
_PAIR = {"prompt", "chosen", *REJECTED}
READ_OF_OBJECTIVE = {
    "sft": set(),
    "dpo": _PAIR,
    "kto": {*_PAIR, *LABELS, "completion"},
    "grpo": {"prompt", "problem", "options", *REFERENCES},
}
"""Objective -> keys of a record that are read besides those of its conversation."""
_PREFERENCE = "it is a preference record: set objective: dpo to learn from its pair, or keep the chosen answer alone"
_AVOIDED = "answers to be avoided are learned by their label (objective: kto) or in pairs (dpo); drop the record"
_CLASS = "; drop the key if it names a class"
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6
"""Bounds of a weight that is not 0; far from those of fp32, in which losses are summed."""
_BLOCK = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_WORDS = {"true": 1.0, "false": 0.0, "default": 1.0}


def check_record(value: Mapping[str, Any], where: Where) -> None:
    """Refuse a record of an answer to be avoided: one of a pair, or one that its label marks as bad."""
    key, answer = given(value, ("chosen", *REJECTED))
    if key:
        raise where.error(Code.UNFOLLOWED_KEY, key, f"is {kind_of(answer)}", _PREFERENCE)
    for key in LABELS:
        if truth_of(value.get(key)) is False:
            what = f"is {ascii(value[key])[:60]}, an answer to be avoided"
            raise where.error(Code.UNFOLLOWED_KEY, key, what, _AVOIDED + _CLASS)


def check_turn(turn: Mapping[str, Any], field: str, where: Where) -> None:
    """Refuse a turn with two contents, or with calls under two keys."""
    texts = [turn[key] for key in CONTENT if not is_empty(turn.get(key))]
    if texts[1:] and texts[0] != texts[1]:
        what = f"is {kind_of(texts[1])} beside another value"
        raise where.error(Code.UNFOLLOWED_KEY, f"{field}.content", what, "keep one of value and content")
    if len(named := [key for key in CALLS if not is_empty(turn.get(key))]) > 1:
        what = f"stands beside {named[0]}"
        raise where.error(Code.BAD_CALL, f"{field}.{named[1]}", what, f"keep one of {' and '.join(named)}")


def weight_of(turn: Mapping[str, Any], field: str, where: Where) -> float:
    """The weight in the loss that the turn of an answer gives to its tokens; 1 without a key."""
    weight = 1.0
    for key in WEIGHING:
        if (value := turn.get(key)) is None or (isinstance(value, str) and not value.strip()):
            continue
        number = _number(value)
        if number is None or not (number == 0 or LEAST_WEIGHT <= number <= MOST_WEIGHT):
            shown = ascii(value)[:60] if isinstance(value, int | float | str) else kind_of(value)
            remedy = f"write true, false, 0 (not learned), or a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
            raise where.error(Code.BAD_WEIGHT, f"{field}.{key}", f"is {shown}", remedy)
        if weight not in (1.0, number) and number != 1.0:
            raise where.error(Code.BAD_WEIGHT, f"{field}.{key}", f"is {number:g} beside {weight:g}", "write one weight")
        weight = number if number != 1.0 else weight
    return weight


def check_blocks(answer: str, field: str, where: Where) -> None:
    """Refuse an answer whose first block of thinking has no end or no start, or is followed by another."""
    first = _BLOCK.match(answer)
    rest = answer[first.end() :] if first else answer
    start, end = rest.find("<think>"), rest.find("</think>")
    if rest.lstrip().startswith("<think>"):
        what, remedy = "opens <think> and does not close it", "write </think> behind the thinking"
        if start < end:
            what, remedy = "begins with two blocks of thinking", "write one block"
    elif end >= 0 and not 0 <= start < end:
        what, remedy = "closes </think> and does not open it", "write <think> before the thinking"
    else:
        return
    raise where.error(Code.UNCLOSED_THINKING, field, what, f"{remedy}, or drop the record")


def content_of(turn: Mapping[str, Any]) -> Any:
    """The content of a turn, under either key; the other may be there and empty, as in tables."""
    key, content = given(turn, CONTENT)
    return content if key else turn.get("value", turn.get("content"))


def thinking_of(turn: Mapping[str, Any], role: str, field: str, where: Where, *, content: Any) -> str:
    """The thinking that a turn holds beside its content, as the block at the start of an answer; empty without any."""
    texts = {key: turn[key] for key in REASONING if not is_empty(turn.get(key))}
    if not texts:
        return ""
    (key, value), *more = texts.items()
    twice = bool(more) or _text_of(content).lstrip().startswith("<think>")
    tagged = isinstance(value, str) and ("<think>" in value or "</think>" in value)
    if twice or tagged or role != "assistant" or not isinstance(value, str):
        what = "is given twice" if twice else f"is {kind_of(value)} of the turn of the {role}"
        what = "holds <think> or </think>" if tagged and not twice else what
        remedy = "write the thinking of an answer once, as a text without tags"
        raise where.error(Code.UNFOLLOWED_KEY, f"{field}.{key}".lstrip("."), what, remedy)
    return f"<think>\n{value.strip()}\n</think>\n\n"


def given(value: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, Any]:
    """The first of some keys that is not empty, and its value; two empty texts without any."""
    return next(((key, value[key]) for key in keys if not is_empty(value.get(key))), ("", ""))


def ignored_keys(value: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of a record, of its turns as `conversations[].key`, and of their parts, that are not read."""
    form = _form(value)
    ignored = [str(key) for key in value if key not in READ.get(form, _SHOWN)]
    turns = _objects(value.get(form))
    read = {"user", "assistant", *REASONING, *WEIGHING} if form == "texts" else READ_OF_TURN
    for turn in turns:
        speaker = given(turn, SPEAKER)[1]
        own = READ_OF_RESULT if speaker in RESULTS else set()
        answers = {*CALLS, *WEIGHING} if speaker in ASKING else set()
        ignored += [f"{form}[].{key}" for key in turn if key not in (read | own) - answers]
    parts = [part for turn in turns for part in _objects(content_of(turn))]
    ignored += [f"{form}[].content[].{key}" for part in parts for key in part if key not in READ_OF_PART]
    return tuple(dict.fromkeys(ignored))


def _form(value: Mapping[str, Any]) -> str:
    """The key that decides the form of a record."""
    return next((key for key in READ if key in value), "")


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _text_of(content: Any) -> str:
    """A content's text, or that of its parts."""
    return content if isinstance(content, str) else "".join(str(part.get("text")) for part in _objects(content))


def _number(value: Any) -> float | None:
    """A weight as a number, from JSON or from the strings of a table; None: it is none."""
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower(), value)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def truth_of(value: Any) -> bool | None:
    """A label as a truth value; tables keep them as numbers or strings. None: it is none."""
    return {1.0: True, 0.0: False}.get(_number(value))  # type: ignore[arg-type]

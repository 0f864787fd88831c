"""Reading of preference records: one conversation with a chosen and a rejected last answer.

Each form is split into two records of `records.py`, one per answer, so that texts, roles, pictures and thinking pass
the same checks.

=============== ===================================================== ==========================================
form            conversation                                          answers
=============== ===================================================== ==========================================
ms-swift        `messages`, which end with the chosen answer          `rejected_response`, or `rejected_messages`
LLaMA-Factory   `conversations`, which end with a question            `chosen` and `rejected`, a turn or a text
TRL, MMPR       `prompt` (turns or a text), or `question`             `chosen` and `rejected`, turns or texts
TRL             none                                                  `chosen` and `rejected`, whole conversations
=============== ===================================================== ==========================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mm_moslora.data.chat.record_forms import IMAGE
from mm_moslora.data.chat.record_keys import OF_REJECTED, READ_OF_PAIR, REJECTED, content_of, given
from mm_moslora.data.chat.records import Record, parse_record
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.record_faults import Code, Where, is_nothing, kind_of

_PROMPTS = ("prompt", "question")
_SHAPE = "write messages and rejected_response, or a conversation, chosen and rejected"


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two records that differ in their last answer alone."""

    chosen: Record
    rejected: Record


def parse_pair(value: Any, where: Where, rules: PictureRules) -> PreferencePair:
    """Turn one value into a pair of records.

    Args:
        value: an object in one of the forms at the top.
        where: for messages.
        rules: rules for its pictures.

    Raises:
        RecordError: with one of `record_faults.Code`.
    """
    if not isinstance(value, Mapping):
        raise where.error(Code.NOT_AN_OBJECT, "-", f"is {kind_of(value)}", "write one JSON object per record")
    chosen, rejected = (parse_record(side, where, rules) for side in _sides(value, where))
    where = chosen.where
    if chosen.turns[:-1] != rejected.turns[:-1]:
        what = "answers another conversation than the chosen answer"
        raise where.error(Code.NO_PAIR, "rejected", what, "only the last answers may differ")
    if any(turn.weight != 1 for turn in (*chosen.turns, *rejected.turns)):
        remedy = "drop the keys of weights: the last answers of a pair count, and all of them alike"
        raise where.error(Code.UNFOLLOWED_KEY, "weight", "weighs an answer of a pair", remedy)
    if chosen.turns[-1].said.strip() == rejected.turns[-1].said.strip():
        remedy = "drop the record: it prefers nothing"
        raise where.error(Code.EQUAL_ANSWERS, "rejected", "equals the chosen answer", remedy)
    return PreferencePair(chosen=chosen, rejected=rejected)


def _sides(value: Mapping[str, Any], where: Where) -> list[dict[str, Any]]:
    """The record of the chosen answer, and that of the rejected one."""
    answers = [key for key in REJECTED if not is_nothing(value.get(key))]
    if len(answers) != 1:
        what = f"is given as {' and '.join(answers)}" if answers else "is missing"
        raise where.error(Code.NO_PAIR, "rejected", what, f"{_SHAPE}; for records without pairs set objective: sft")
    key, other = given(value, OF_REJECTED)
    if key:
        remedy = "both answers see the same pictures, videos, boxes and tools; drop the key"
        raise where.error(Code.UNFOLLOWED_KEY, key, f"is {kind_of(other)}", remedy)
    chosen, rejected = value.get("chosen"), value[answers[0]]
    named = next((key for key in ("conversations", "messages") if not is_nothing(value.get(key))), None)
    prompt = next((value[key] for key in _PROMPTS if not is_nothing(value.get(key))), None)
    rest = {key: item for key, item in value.items() if key not in {*READ_OF_PAIR, *_PROMPTS, *OF_REJECTED, named}}
    if named is not None and is_nothing(chosen):
        turns = _listed(value[named], named, where)
        whole = answers[0] == "rejected_messages"
        sides = [turns, _listed(rejected, answers[0], where) if whole else [*turns[:-1], *_answer(rejected)]]
        return [rest | {named: side} for side in sides]
    if is_nothing(chosen):
        raise where.error(Code.NO_PAIR, "chosen", "is missing", _SHAPE)
    if named is None and prompt is None:
        both = (("chosen", chosen), (answers[0], rejected))
        return [rest | {"messages": _placed(_listed(side, key, where), value)} for key, side in both]
    if named is None:
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _listed(prompt, "prompt", where)
        named, asked = "messages", _placed(asked, value)
    else:
        asked = _listed(value[named], named, where)
    return [rest | {named: [*asked, *_answer(side)]} for side in (chosen, rejected)]


def _answer(side: Any) -> list[Any]:
    """An answer as turns: it is a text, a turn, or a list with a turn."""
    return side if isinstance(side, list) else [side] if isinstance(side, Mapping) else [_said(side)]


def _said(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _listed(value: Any, field: str, where: Where) -> list[Any]:
    if not isinstance(value, list) or not value:
        what = "is empty" if isinstance(value, list) else f"is {kind_of(value)}"
        raise where.error(Code.NO_PAIR, field, f"{what}, expected the turns of a conversation", _SHAPE)
    return value


def _placed(turns: list[Any], value: Mapping[str, Any]) -> list[Any]:
    """The turns with the record's pictures before the first question where none has a place, as in TRL."""
    named: Any = next((value[key] for key in ("images", "image") if not is_nothing(value.get(key))), [])
    count = len(named) if isinstance(named, list | tuple) else 1
    asked = [turn for turn in turns if isinstance(turn, Mapping) and turn.get("role", turn.get("from")) == "user"]
    texts = [content_of(turn) for turn in asked]
    if not count or not all(isinstance(text, str) and IMAGE not in text for text in texts):
        return turns
    if not asked:
        return turns
    placed = {**asked[0], "value": None, "content": f"{IMAGE}\n" * count + str(texts[0])}
    return [placed if turn is asked[0] else turn for turn in turns]

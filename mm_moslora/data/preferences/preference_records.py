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
from mm_moslora.data.chat.record_keys import READ_OF_OBJECTIVE, REJECTED, content_of
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.records import parse_record
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
    refuse_weights(chosen, rejected)
    if chosen.turns[-1].said.strip() == rejected.turns[-1].said.strip():
        remedy = "drop the record: it prefers nothing"
        raise where.error(Code.EQUAL_ANSWERS, "rejected", "equals the chosen answer", remedy)
    return PreferencePair(chosen=chosen, rejected=rejected)


def refuse_weights(*records: Record) -> None:
    """Refuse weights of answers, where the last answers alone count, and all of them alike."""
    for record in records:
        if any(turn.weight != 1 for turn in record.turns):
            remedy = "drop the keys of weights: the last answers count, and all of them alike"
            raise record.where.error(Code.UNFOLLOWED_KEY, "weight", "weighs an answer", remedy)


def _sides(value: Mapping[str, Any], where: Where) -> list[dict[str, Any]]:
    """The record of the chosen answer, and that of the rejected one."""
    answers = [key for key in REJECTED if not is_nothing(value.get(key))]
    if len(answers) != 1:
        what = f"is given as {' and '.join(answers)}" if answers else "is missing"
        raise where.error(Code.NO_PAIR, "rejected", what, f"{_SHAPE}; for records without pairs set objective: sft")
    for key, other in value.items():
        if key.startswith("rejected_") and key not in REJECTED and not is_nothing(other):
            remedy = "both answers see the same pictures, videos, boxes and tools; drop the key"
            raise where.error(Code.UNFOLLOWED_KEY, key, f"is {kind_of(other)}", remedy)
    chosen, rejected = value.get("chosen"), value[answers[0]]
    named = next((key for key in ("conversations", "messages") if not is_nothing(value.get(key))), None)
    prompt = next((value[key] for key in _PROMPTS if not is_nothing(value.get(key))), None)
    rest = {key: item for key, item in value.items() if key not in {*READ_OF_OBJECTIVE["dpo"], *_PROMPTS, named}}
    if named is not None and is_nothing(chosen):
        turns = listed_turns(value[named], named, where)
        whole = answers[0] == "rejected_messages"
        sides = [turns, listed_turns(rejected, answers[0], where) if whole else [*turns[:-1], *answer_turns(rejected)]]
        return [rest | {named: side} for side in sides]
    if is_nothing(chosen):
        raise where.error(Code.NO_PAIR, "chosen", "is missing", _SHAPE)
    if named is None and prompt is None:
        both = (("chosen", chosen), (answers[0], rejected))
        return [rest | {"messages": placed_pictures(listed_turns(side, key, where), value)} for key, side in both]
    if named is None:
        named, asked = "messages", asked_turns(prompt, value, where)
    else:
        asked = listed_turns(value[named], named, where)
    return [rest | {named: [*asked, *answer_turns(side)]} for side in (chosen, rejected)]


def answer_turns(side: Any) -> list[Any]:
    """An answer as turns: it is a text, a turn, or a list with a turn."""
    return side if isinstance(side, list) else [side] if isinstance(side, Mapping) else [_said(side)]


def _said(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def asked_turns(prompt: Any, value: Mapping[str, Any], where: Where) -> list[Any]:
    """The turns of a prompt, which is a question or turns, with the record's pictures."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else listed_turns(prompt, "prompt", where)
    return placed_pictures(asked, value)


def listed_turns(value: Any, field: str, where: Where) -> list[Any]:
    """A value that should be turns."""
    if not isinstance(value, list) or not value:
        what = "is empty" if isinstance(value, list) else f"is {kind_of(value)}"
        raise where.error(Code.NO_PAIR, field, f"{what}, expected the turns of a conversation", _SHAPE)
    return value


def placed_pictures(turns: list[Any], value: Mapping[str, Any]) -> list[Any]:
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

"""Reading of records of the other objectives: pairs, judged answers, and questions with reference answers.

Each becomes records of `records.py`, so that texts, roles, pictures and thinking pass the same checks. A pair is one
conversation with a chosen and a rejected last answer, and becomes two records:

=============== ===================================================== ==========================================
form            conversation                                          answers
=============== ===================================================== ==========================================
ms-swift        `messages`, which end with the chosen answer          `rejected_response`, or `rejected_messages`
LLaMA-Factory   `conversations`, which end with a question            `chosen` and `rejected`, a turn or a text
TRL, MMPR       `prompt` (turns or a text), or `question`             `chosen` and `rejected`, turns or texts
TRL             none                                                  `chosen` and `rejected`, whole conversations
=============== ===================================================== ==========================================

A judged answer has a label (`label`, `kto_tag`), and its conversation any form of records, or `prompt` and
`completion`; a pair is a good and a bad answer. A question is `prompt` or `problem` (turns or a text), or any form of
records; the reference stands beside it (`REFERENCES`), or is the last answer of the conversation.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_moslora.data.chat.record_keys import LABELS, READ, READ_OF_OBJECTIVE, REFERENCES, REJECTED, content_of, truth_of
from mm_moslora.data.chat.record_turns import IMAGE, Record
from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.record_faults import Code, Where, is_nothing, kind_of

_PROMPTS = ("prompt", "question")
_CONVERSATIONS = ("conversations", "messages")
_SHAPE = "write messages and rejected_response, or a conversation, chosen and rejected"


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two records that differ in their last answer alone."""

    chosen: Record
    rejected: Record


def parse_pair(value: Any, where: Where, rules: PictureRules) -> PreferencePair:
    """Turn one value into a pair of records."""
    chosen, rejected = (parse_record(side, where, rules) for side in _sides(_object(value, where), where))
    where = chosen.where
    if chosen.turns[:-1] != rejected.turns[:-1]:
        what = "answers another conversation than the chosen answer"
        raise where.error(Code.NO_PAIR, "rejected", what, "only the last answers may differ")
    _refuse_weights(chosen, rejected)
    if chosen.turns[-1].said.strip() == rejected.turns[-1].said.strip():
        remedy = "drop the record: it prefers nothing"
        raise where.error(Code.EQUAL_ANSWERS, "rejected", "equals the chosen answer", remedy)
    return PreferencePair(chosen=chosen, rejected=rejected)


def _refuse_weights(*records: Record) -> None:
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
    named = next((key for key in _CONVERSATIONS if not is_nothing(value.get(key))), None)
    prompt = next((value[key] for key in _PROMPTS if not is_nothing(value.get(key))), None)
    rest = {key: item for key, item in value.items() if key not in {*READ_OF_OBJECTIVE["dpo"], *_PROMPTS, named}}
    if named is not None and is_nothing(chosen):
        turns = _listed_turns(value[named], named, where)
        whole = answers[0] == "rejected_messages"
        sides = [
            turns,
            _listed_turns(rejected, answers[0], where) if whole else [*turns[:-1], *_answer_turns(rejected)],
        ]
        return [rest | {named: side} for side in sides]
    if is_nothing(chosen):
        raise where.error(Code.NO_PAIR, "chosen", "is missing", _SHAPE)
    if named is None and prompt is None:
        both = (("chosen", chosen), (answers[0], rejected))
        return [rest | {"messages": _placed_pictures(_listed_turns(side, key, where), value)} for key, side in both]
    if named is None:
        named, asked = "messages", _asked_turns(prompt, value, where)
    else:
        asked = _listed_turns(value[named], named, where)
    return [rest | {named: [*asked, *_answer_turns(side)]} for side in (chosen, rejected)]


def _answer_turns(side: Any) -> list[Any]:
    """An answer as turns: it is a text, a turn, or a list with a turn."""
    return side if isinstance(side, list) else [side] if isinstance(side, Mapping) else [_said(side)]


def _said(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _asked_turns(prompt: Any, value: Mapping[str, Any], where: Where) -> list[Any]:
    """The turns of a prompt, which is a question or turns, with the record's pictures."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _listed_turns(prompt, "prompt", where)
    return _placed_pictures(asked, value)


def _listed_turns(value: Any, field: str, where: Where) -> list[Any]:
    """A value that should be turns."""
    if not isinstance(value, list) or not value:
        what = "is empty" if isinstance(value, list) else f"is {kind_of(value)}"
        raise where.error(Code.NO_PAIR, field, f"{what}, expected the turns of a conversation", _SHAPE)
    return value


def _placed_pictures(turns: list[Any], value: Mapping[str, Any]) -> list[Any]:
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


@dataclass(frozen=True, kw_only=True)
class JudgedAnswer:
    """A record whose last answer is good or bad."""

    record: Record
    good: bool


@dataclass(frozen=True, kw_only=True)
class AskedQuestion:
    """A record whose last answer is the first reference."""

    record: Record
    references: tuple[str, ...]
    """Right answers; letters where there are options."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Letter -> text."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Texts and numbers of the record under other keys."""


def parse_judged(value: Any, where: Where, rules: PictureRules) -> tuple[JudgedAnswer, ...]:
    """Turn one value into a judged answer, or a preference record into two."""
    value = _object(value, where)
    if any(not is_nothing(value.get(key)) for key in REJECTED):
        pair = parse_pair(value, where, rules)
        return JudgedAnswer(record=pair.chosen, good=True), JudgedAnswer(record=pair.rejected, good=False)
    labels = {key: value[key] for key in LABELS if not is_nothing(value.get(key))}
    found = {truth_of(label) for label in labels.values()}
    good = found.pop() if len(found) == 1 else None
    if good is None:
        shown = " and ".join(f"{key} {ascii(label)[:40]}" for key, label in labels.items())
        what = f"is given as {shown}" if labels else "is missing"
        raise where.error(Code.NO_LABEL, "label", what, "write label: true (a good answer) or false (a bad one)")
    rest = {key: item for key, item in value.items() if key not in LABELS}
    if not is_nothing(completion := value.get("completion")):
        asked = _asked_turns(rest.pop("prompt", None), value, where)
        del rest["completion"]
        rest["messages"] = [*asked, *_answer_turns(completion)]
    record = parse_record(rest, where, rules)
    _refuse_weights(record)
    return (JudgedAnswer(record=record, good=good),)


def parse_question(value: Any, where: Where, rules: PictureRules) -> AskedQuestion:
    """Turn one value into a question with its references; see `parse_judged`."""
    value = _object(value, where)
    given = next((key for key in REFERENCES if not is_nothing(value.get(key))), None)
    read = READ_OF_OBJECTIVE["grpo"] if given else {"options"}
    rest = {key: item for key, item in value.items() if key not in read}
    references = () if given is None else _references(value[given], given, where)
    if given is not None:
        named = next((key for key in _CONVERSATIONS if not is_nothing(value.get(key))), None)
        prompt = next((value[key] for key in ("prompt", "problem", "question") if not is_nothing(value.get(key))), None)
        if named is not None:
            asked = _listed_turns(value[named], named, where)
            last = asked[-1]
            said = isinstance(last, Mapping) and last.get("role", last.get("from")) in ("assistant", "gpt", "model")
            asked = asked[:-1] if said else asked
        else:
            asked = _asked_turns(prompt, value, where)
        rest = {key: item for key, item in rest.items() if key != "question"}
        rest[named or "messages"] = [*asked, *_answer_turns(references[0])]
    elif any(not is_nothing(value.get(key)) for key in ("prompt", "problem")) or _ends_with_question(value):
        remedy = f"write the right answer, or a list of them, as {REFERENCES[0]}, or as the last answer"
        raise where.error(Code.NO_REFERENCE, REFERENCES[0], "is missing", remedy)
    record = parse_record(rest, where, rules)
    options = _options(value.get("options"), where)
    letters = {text: letter for letter, text in options.items()}
    references = tuple(letters.get(text, text) for text in references or (record.turns[-1].text,))
    if options and not {*references} <= options.keys():
        what = f"is {ascii(references[0])[:60]}, not one of the options {', '.join(options)}"
        raise record.where.error(Code.NO_REFERENCE, given or "answer", what, "write a letter, or the text of an option")
    known = set().union(*READ.values(), READ_OF_OBJECTIVE["grpo"])
    extra = {
        key: str(item) for key, item in value.items()
        if key not in known and isinstance(item, str | int | float) and not is_nothing(item)
    }  # fmt: skip
    return AskedQuestion(record=record, references=references, options=options, extra=extra)


SHOWN: dict[str, Callable[[Any, Where, PictureRules], Record]] = {
    "dpo": lambda *of: parse_pair(*of).chosen,
    "kto": lambda *of: parse_judged(*of)[0].record,
    "grpo": lambda *of: parse_question(*of).record,
}
"""Objective -> reads the conversation by which a record is checked and shown, with a good answer where it has one."""


def _object(value: Any, where: Where) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise where.error(Code.NOT_AN_OBJECT, "-", f"is {kind_of(value)}", "write one JSON object per record")
    return value


def _ends_with_question(value: Mapping[str, Any]) -> bool:
    turns = next((value[key] for key in _CONVERSATIONS if not is_nothing(value.get(key))), None)
    last = turns[-1] if isinstance(turns, list) and turns else None
    return isinstance(last, Mapping) and last.get("role", last.get("from")) in ("user", "human")


def _references(value: Any, key: str, where: Where) -> tuple[str, ...]:
    """The texts of a reference, which is a text, a number, or a list of them."""
    items = value if isinstance(value, list | tuple) else [value]
    texts = tuple(str(item) for item in items if isinstance(item, str | int | float) and not isinstance(item, bool))
    if not texts or len(texts) < len(items):
        what = f"is {kind_of(value)}" if items else "is empty"
        raise where.error(Code.NO_REFERENCE, key, what, "write a text, a number, or a list of them")
    return texts


def _options(value: Any, where: Where) -> dict[str, str]:
    """Letter -> text, from a list of texts or an object."""
    if is_nothing(value):
        return {}
    items = dict(zip(string.ascii_uppercase, value, strict=False)) if isinstance(value, list | tuple) else value
    if not isinstance(items, Mapping) or not items or not all(isinstance(text, str) for text in items.values()):
        raise where.error(
            Code.BAD_TEXT, "options", f"is {kind_of(value)}", "write a list of texts, or letters and texts"
        )
    return {str(letter): text for letter, text in items.items()}

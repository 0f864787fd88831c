"""Reading of records with a judgement: answers that are good or bad, and questions with reference answers.

Each becomes one record of `records.py`, so that texts, roles, pictures and thinking pass the same checks. An answer has
a label (`label`, `kto_tag`), and its conversation any form of records, or `prompt` and `completion`; a preference
record is a good and a bad answer. A question is `prompt` or `problem` (turns or a text), or any form of records; the
reference stands beside it (`REFERENCES`), or is the last answer of the conversation.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_moslora.data.chat.record_keys import LABELS, READ, READ_OF_OBJECTIVE, REFERENCES, REJECTED, truth_of
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.preferences.preference_records import (
    answer_turns,
    asked_turns,
    listed_turns,
    parse_pair,
    refuse_weights,
)
from mm_moslora.data.record_faults import Code, Where, is_nothing, kind_of

_CONVERSATIONS = ("conversations", "messages")


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
    """Turn one value into a judged answer, or a preference record into two.

    Raises:
        RecordError: with one of `record_faults.Code`.
    """
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
        asked = asked_turns(rest.pop("prompt", None), value, where)
        del rest["completion"]
        rest["messages"] = [*asked, *answer_turns(completion)]
    record = parse_record(rest, where, rules)
    refuse_weights(record)
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
            asked = listed_turns(value[named], named, where)
            last = asked[-1]
            said = isinstance(last, Mapping) and last.get("role", last.get("from")) in ("assistant", "gpt", "model")
            asked = asked[:-1] if said else asked
        else:
            asked = asked_turns(prompt, value, where)
        rest = {key: item for key, item in rest.items() if key != "question"}
        rest[named or "messages"] = [*asked, *answer_turns(references[0])]
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

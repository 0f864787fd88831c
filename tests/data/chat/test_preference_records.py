"""Pairs, judged answers and questions with references, in the forms of ms-swift, LLaMA-Factory, TRL, MPO and EasyR1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm_moslora.data.chat.preference_records import PreferencePair, parse_judged, parse_pair, parse_question
from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.record_faults import RecordError, Where

WHERE = Where(file=Path("pairs.jsonl"), line=1, row=0)
RULES = PictureRules(folder=Path("/tmp"))
USER, GOOD, BAD = "which colour?", "red", "blue"
ASKED = {"role": "user", "content": USER}
SEEN = {"role": "user", "content": f"<image>{USER}"}
YES, NO = {"role": "assistant", "content": GOOD}, {"role": "assistant", "content": BAD}
HUMAN = {"from": "human", "value": f"<image>\n{USER}"}
SHARE = {"chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}}
SIDES = {"chosen": GOOD, "rejected": BAD}
PARTS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": USER}]}
FORMS: dict[str, dict[str, Any]] = {
    "ms-swift": {"messages": [SEEN, YES], "rejected_response": BAD, "images": ["a.png"]},
    "ms-swift, whole": {"messages": [SEEN, YES], "rejected_messages": [SEEN, NO], "images": ["a.png"]},
    "LLaMA-Factory": {"conversations": [HUMAN], **SHARE, "images": ["a.png"]},
    "LLaMA-Factory, messages": {"messages": [SEEN], "chosen": YES, "rejected": NO, "images": ["a.png"]},
    "TRL": {"prompt": [ASKED], "chosen": [YES], "rejected": [NO], "images": ["a.png"]},
    "TRL, parts": {"prompt": [PARTS], "chosen": [YES], "rejected": [NO], "image": "a.png"},
    "TRL, texts": {"prompt": USER, **SIDES, "image": "a.png"},
    "TRL, whole": {"chosen": [ASKED, YES], "rejected": [ASKED, NO], "image": "a.png"},
    "MMPR": {"question": f"<image>\n{USER}", **SIDES, "image": "a.png"},
    "RLAIF-V": {"question": USER, **SIDES, "image": "a.png"},
    "a table, with empty cells": {
        "prompt": USER, **SIDES, "image": "a.png", "messages": None, "rejected_response": None,
    },
}  # fmt: skip


def parse(value: Any) -> PreferencePair:
    return parse_pair(value, WHERE, PictureRules(folder=Path("/tmp")))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_pair(form: str) -> None:
    pair = parse({"id": "a", "source": "x", **FORMS[form]})
    for record, answer in ((pair.chosen, GOOD), (pair.rejected, BAD)):
        assert [turn.role for turn in record.turns] == ["user", "assistant"]
        assert [part.strip() for part in record.turns[0].parts()] == ["", USER]
        assert record.turns[1].text == answer
        assert record.image_names == ["/tmp/a.png"]
        assert (record.id, record.ignored) == ("a", ("source",))


def test_earlier_turns_and_the_system_prompt_belong_to_the_question() -> None:
    earlier = [{"role": "system", "content": "be brief"}, ASKED, YES]
    pair = parse({"prompt": [*earlier, ASKED], "chosen": [YES], "rejected": [NO]})
    assert [turn.role for turn in pair.chosen.turns] == ["system", "user", "assistant", "user", "assistant"]
    beside = parse({"system": "be brief", "conversations": [{"from": "human", "value": USER}], **SHARE})
    assert beside.rejected.turns[0].text == "be brief"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "NOT_AN_OBJECT"),
        ({"messages": [ASKED, YES]}, "NO_PAIR.*field rejected: is missing.*objective: sft"),
        ({"prompt": USER, "rejected": BAD}, "NO_PAIR.*field chosen: is missing"),
        ({"prompt": USER, **SIDES, "rejected_response": BAD}, "NO_PAIR.*rejected and rejected_response"),
        ({"prompt": USER, "chosen": GOOD, "rejected": f" {GOOD}\n"}, "EQUAL_ANSWERS.*equals the chosen answer"),
        ({**SIDES}, "NO_PAIR.*field chosen: is a string, expected the turns"),
        ({"prompt": 3, **SIDES}, "NO_PAIR.*field prompt: is a number"),
        ({"prompt": [], **SIDES}, "NO_PAIR.*field prompt: is empty"),
        ({"prompt": USER, "chosen": GOOD, "rejected": 3}, "BAD_TEXT"),
        ({"prompt": USER, "chosen": GOOD, "rejected": "  "}, "EMPTY_ANSWER"),
        ({"prompt": [YES], **SIDES}, "ROLES_DO_NOT_ALTERNATE"),
        ({"prompt": [ASKED, YES], **SIDES}, "ROLES_DO_NOT_ALTERNATE"),
        ({"prompt": f"<image>{USER}", **SIDES}, "IMAGE_COUNT"),
        ({"messages": [SEEN, YES], "rejected_response": BAD, "images": []}, "IMAGE_COUNT"),
        ({"messages": [ASKED, YES], "rejected_messages": [{**ASKED, "content": "why?"}, NO]}, "NO_PAIR.*another conv"),
        ({"prompt": USER, **SIDES, "tools": [{"a": 1}]}, "BAD_TOOLS.*tools"),
        (
            {"prompt": USER, **SIDES, "rejected_images": ["other.png"]},
            "UNFOLLOWED_KEY.*rejected_images.*the same pictures",
        ),
        ({"prompt": USER, **SIDES, "kto_tag": False}, "UNFOLLOWED_KEY.*objective: kto"),
        ({"prompt": [ASKED], "chosen": [{**YES, "weight": 2}], "rejected": [NO]}, "UNFOLLOWED_KEY.*weighs an answer"),
        ({"messages": [ASKED, {**YES, "loss": False}, ASKED, YES], "rejected_response": BAD}, "UNFOLLOWED_KEY.*weigh"),
    ],
)
def test_what_is_no_pair_is_named(value: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        parse(value)


def test_tuning_refuses_pairs_and_names_the_objective() -> None:
    with pytest.raises(RecordError, match=r"UNFOLLOWED_KEY.*objective: dpo"):
        parse_record(FORMS["MMPR"], WHERE, PictureRules(folder=Path("/tmp")))


JUDGED: dict[str, dict[str, Any]] = {
    "ms-swift": {"messages": [SEEN, YES], "images": ["a.png"]},
    "LLaMA-Factory": {"conversations": [SEEN, {"from": "gpt", "value": "red"}], "images": ["a.png"]},
    "TRL": {"prompt": [ASKED], "completion": [YES], "images": ["a.png"]},
    "TRL, texts": {"prompt": "which colour?", "completion": "red", "image": "a.png"},
    "a question": {"question": "which colour?", "answer": "red", "image": "a.png"},
}
ASKING: dict[str, dict[str, Any]] = {
    "ms-swift": {"messages": [SEEN], "solution": "red", "images": ["a.png"]},
    "ms-swift, with another answer": {
        "messages": [SEEN, {"role": "assistant", "content": "blue"}], "solution": "red", "images": ["a.png"],
    },
    "TRL": {"prompt": [ASKED], "ground_truth": "red", "images": ["a.png"]},
    "EasyR1": {"problem": "<image>which colour?", "answer": "red", "images": ["a.png"]},
    "several references": {"prompt": "which colour?", "answers": ["red", "crimson"], "image": "a.png"},
    "tuning, question": {"question": "which colour?", "answer": "red", "image": "a.png"},
    "tuning, messages": {"messages": [SEEN, YES], "image": "a.png"},
}  # fmt: skip


@pytest.mark.parametrize("form", JUDGED)
@pytest.mark.parametrize(
    ("label", "good"),
    [({"label": True}, True), ({"kto_tag": False}, False), ({"label": "false"}, False), ({"label": 1.0}, True)],
)
def test_every_form_of_a_judged_answer_is_one_record(form: str, label: dict[str, Any], good: bool) -> None:
    (answer,) = parse_judged({"id": "a", **JUDGED[form], **label}, WHERE, RULES)
    assert (answer.good, answer.record.id) == (good, "a")
    assert [part.strip() for part in answer.record.turns[0].parts()] == ["", "which colour?"]
    assert answer.record.turns[1].text == "red"
    assert answer.record.image_names == ["/tmp/a.png"]


def test_a_pair_is_a_good_and_a_bad_answer() -> None:
    answers = parse_judged({"messages": [ASKED, YES], "rejected_response": "blue"}, WHERE, RULES)
    assert [(answer.good, answer.record.turns[-1].text) for answer in answers] == [(True, "red"), (False, "blue")]


@pytest.mark.parametrize("form", ASKING)
def test_every_form_of_a_question_is_a_record_with_its_reference(form: str) -> None:
    asked = parse_question({"id": "a", "level": 3, **ASKING[form]}, WHERE, RULES)
    assert [part.strip() for part in asked.record.turns[0].parts()] == ["", "which colour?"]
    assert asked.record.turns[-1].text == asked.references[0] == "red"
    assert asked.references[1:] == (("crimson",) if "several" in form else ())
    assert dict(asked.extra) == {"level": "3"}


def test_options_have_letters_and_the_text_of_one_names_it() -> None:
    asked = parse_question({"prompt": "which?", "solution": "blue", "options": ["red", "blue"]}, WHERE, RULES)
    assert (dict(asked.options), asked.references) == ({"A": "red", "B": "blue"}, ("B",))
    lettered = parse_question({"prompt": "which?", "solution": "x", "options": {"x": "red", "y": "blue"}}, WHERE, RULES)
    assert lettered.references == ("x",)


@pytest.mark.parametrize(
    ("parse", "value", "fault"),
    [
        (parse_judged, [1], "NOT_AN_OBJECT"),
        (parse_judged, {"messages": [ASKED, YES]}, "NO_LABEL.*label: is missing; write label: true"),
        (parse_judged, {"messages": [ASKED, YES], "label": "cat"}, "NO_LABEL.*is given as label 'cat'"),
        (
            parse_judged,
            {"messages": [ASKED, YES], "label": True, "kto_tag": False},
            "NO_LABEL.*True and kto_tag False",
        ),
        (parse_judged, {"messages": [ASKED], "label": True}, "NO_ANSWER"),
        (parse_judged, {"completion": "red", "label": True}, "NO_PAIR.*prompt"),
        (
            parse_judged,
            {"messages": [ASKED, {**YES, "weight": 0.5}], "label": True},
            "UNFOLLOWED_KEY.*weighs an answer",
        ),
        (parse_judged, {"messages": [ASKED, YES], "rejected_response": "red"}, "EQUAL_ANSWERS"),
        (parse_question, {"messages": [ASKED]}, "NO_REFERENCE.*is missing; write the right answer"),
        (parse_question, {"prompt": "which?"}, "NO_REFERENCE.*is missing"),
        (parse_question, {"prompt": "which?", "solution": []}, "NO_REFERENCE.*is empty"),
        (parse_question, {"prompt": "which?", "solution": {"a": 1}}, "NO_REFERENCE.*is an object"),
        (parse_question, {"prompt": "which?", "solution": " "}, "EMPTY_ANSWER"),
        (parse_question, {"prompt": "which?", "solution": "F", "options": ["a", "b"]}, "NO_REFERENCE.*not one of"),
        (parse_question, {"prompt": "which?", "solution": "A", "options": 3}, "BAD_TEXT.*options"),
        (parse_question, {"solution": "A"}, "NO_PAIR.*prompt"),
    ],
)
def test_what_cannot_be_judged_is_named(parse: Any, value: Any, fault: str) -> None:
    with pytest.raises(RecordError, match=fault):
        parse(value, WHERE, RULES)

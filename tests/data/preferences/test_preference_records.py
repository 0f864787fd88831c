"""Preference records in the forms of ms-swift, LLaMA-Factory, TRL and MPO's data set become the same pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm_moslora.data.chat.preference_records import PreferencePair, parse_pair
from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.record_faults import RecordError, Where

WHERE = Where(file=Path("pairs.jsonl"), line=1, row=0)
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

"""Keys that other trainers follow are faults with a remedy; neutral values and data about the record pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.check.check_findings import findings
from mm_moslora.data.check.record_check import check
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.record_faults import RecordError, Where
from tests.data.chat_templates import shared_tokenizer


def parsed(value: dict):
    return parse_record(value, Where(file=Path("data.jsonl"), line=1, row=0), PictureRules(folder=Path.cwd()))


def chat(*, record: dict | None = None, llava: bool = False, user: dict | None = None, **answer) -> dict:
    speaker, text = ("from", "value") if llava else ("role", "content")
    turns = [{speaker: "user", text: "what?"} | (user or {}), {speaker: "assistant", text: "42"} | answer]
    return {"conversations" if llava else "messages": turns} | (record or {})


@pytest.mark.parametrize("llava", [False, True])
@pytest.mark.parametrize(("key", "bad", "neutral"), [
    ("loss", [False, 0], [True, None, 1]),
    ("loss_scale", [0.5, "react"], [1, 1.0, "default", None]),
    ("train", [False], [True, None]),
    ("weight", [0, 2, 0.5], [1, 1.0, None, float("nan")]),
    ("tool_calls", [[{"function": {"name": "f"}}]], [[], None]),
])  # fmt: skip
def test_keys_of_turns(key, bad, neutral, llava) -> None:
    for value in bad:
        with pytest.raises(RecordError, match=rf"^UNFOLLOWED_KEY: .*\[1\]\.{key}: is .*; ") as fault:
            parsed(chat(llava=llava, **{key: value}))
        assert fault.value.code == "UNFOLLOWED_KEY"
    for value in neutral:
        assert parsed(chat(llava=llava, **{key: value})).turns[1].text == "42"


@pytest.mark.parametrize(("key", "bad", "neutral"), [
    ("chosen", ["a", {"role": "assistant", "content": "a"}], [None, ""]),
    ("rejected", ["a"], [None]),
    ("rejected_response", ["a", ["a"]], ["", None]),
    ("tools", [[{"type": "function"}], '[{"name": "f"}]'], [[], "[]", None]),
    ("objects", [{"ref": ["a"], "bbox": [[1, 2, 3, 4]]}], [{"ref": [], "bbox": []}, {}, None]),
    ("label", [False], [True, 3, "cat", None]),
])  # fmt: skip
def test_keys_of_records(key, bad, neutral) -> None:
    for value in bad:
        for llava in (False, True):
            with pytest.raises(RecordError, match=rf"^UNFOLLOWED_KEY: .* field {key}: "):
                parsed(chat(record={key: value}, llava=llava))
        with pytest.raises(RecordError, match="UNFOLLOWED_KEY"):
            parsed({"question": "what?", "answer": "42", key: value})
    for value in neutral:
        assert parsed(chat(record={key: value})).turns[1].text == "42"


def test_a_preference_record_without_a_conversation_is_named_so() -> None:
    with pytest.raises(RecordError, match="preference record"):
        parsed({"prompt": "what?", "chosen": "42", "rejected": "41"})


def test_a_question_is_never_learned_so_its_weight_means_nothing() -> None:
    assert parsed(chat(user={"loss": False, "weight": 0})).turns[1].text == "42"


@pytest.mark.parametrize("role", ["tool", "function", "observation"])
def test_a_turn_of_a_tool_is_a_fault(role) -> None:
    value = chat()
    value["messages"].insert(1, {"role": role, "content": "{}"})
    with pytest.raises(RecordError, match="BAD_ROLE"):
        parsed(value)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_beside_an_answer_is_learned_as_its_block(key) -> None:
    assert parsed(chat(**{key: "It is.\n"})).turns[1].text == "<think>\nIt is.\n</think>\n\n42"
    parts = chat(**{key: "It is."})
    parts["messages"][1]["content"] = [{"type": "text", "text": "42"}]
    assert parsed(parts).turns[1].text == "<think>\nIt is.\n</think>\n\n42"
    for empty in ("", None, "  "):
        assert parsed(chat(**{key: empty})).turns[1].text == "42"


@pytest.mark.parametrize("value", [
    chat(reasoning="a", content="<think>b</think>42"), chat(reasoning="a", thinking="b"), chat(reasoning=["a"]),
    chat(user={"reasoning": "a"}),
])  # fmt: skip
def test_thinking_that_cannot_be_placed_is_a_fault(value) -> None:
    with pytest.raises(RecordError, match=r"UNFOLLOWED_KEY.*write the thinking of an answer once"):
        parsed(value)


def test_a_text_of_thinking_is_checked_like_any_other() -> None:
    with pytest.raises(RecordError, match="BAD_CHARACTER"):
        parsed(chat(reasoning="a\0b"))


def test_other_keys_are_counted_and_named(write) -> None:
    file = write(chat(record={"id": "a", "source": "web", "licence": "x"}, name="me"), chat(record={"source": "web"}))
    report = check([SourceConfig(path=str(file))], ConversationEncoder(shared_tokenizer("bytes-chatml")),
                   config=DataConfig(), vision=False)  # fmt: skip
    assert dict(report.ignored) == {"source": 2, "licence": 1, "messages[].name": 1}
    found = next(item for item in findings(report) if item.name == "keys")
    assert found.status == "ok"
    assert "source (2), licence (1), messages[].name (1)" in found.detail
    assert report.usable == 2


def test_faults_are_counted_like_others(write) -> None:
    file = write(chat(loss=False), chat(), chat(record={"chosen": "a"}))
    report = check([SourceConfig(path=str(file))], ConversationEncoder(shared_tokenizer("bytes-chatml")),
                   config=DataConfig(), vision=False)  # fmt: skip
    assert (report.usable, dict(report.bad)) == (1, {"UNFOLLOWED_KEY": 2})

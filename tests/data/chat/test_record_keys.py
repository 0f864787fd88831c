"""Keys of records: what is read beside the turns; answers to be avoided; all others are counted and named."""

from __future__ import annotations

import pytest

from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.check.check_findings import findings
from mm_moslora.data.check.record_check import check
from mm_moslora.data.record_faults import RecordError
from tests.data.chat_templates import shared_tokenizer
from tests.data.sets import parsed


def chat(*, record: dict | None = None, llava: bool = False, user: dict | None = None, **answer) -> dict:
    speaker, text = ("from", "value") if llava else ("role", "content")
    turns = [{speaker: "user", text: "what?"} | (user or {}), {speaker: "assistant", text: "42"} | answer]
    return {"conversations" if llava else "messages": turns} | (record or {})


@pytest.mark.parametrize(("key", "bad", "neutral"), [
    ("chosen", ["a", {"role": "assistant", "content": "a"}], [None, ""]),
    ("rejected", ["a"], [None]),
    ("rejected_response", ["a", ["a"]], ["", None]),
    ("label", [False, 0, 0.0, "false", "False", "0"], [True, 1, 3, "cat", None, float("nan"), "", [False]]),
    ("kto_tag", [False, 0, "false"], [True, 1, "true", None]),
])  # fmt: skip
def test_answers_to_be_avoided_are_refused(key, bad, neutral) -> None:
    for value in bad:
        for record in (chat(record={key: value}), {"question": "what?", "answer": "42", key: value}):
            with pytest.raises(RecordError, match=rf"^UNFOLLOWED_KEY: .* field {key}: .*objective: (dpo|kto)"):
                parsed(record)
    for value in neutral:
        assert parsed(chat(record={key: value})).turns[1].text == "42"


@pytest.mark.parametrize("form", [
    {"question": "what?", "answer": "42"}, {"texts": [{"user": "what?", "assistant": "42"}]}, {"caption": "42"}, chat(),
])  # fmt: skip
def test_a_system_text_is_read_beside_every_form(form) -> None:
    record = parsed(form | {"system": "Be brief."})
    assert [turn.role for turn in record.turns] == ["system", "user", "assistant"]
    assert record.turns[0].text == "Be brief."
    assert record.ignored == ()
    for empty in ("", None, float("nan")):
        assert [turn.role for turn in parsed(form | {"system": empty}).turns] == ["user", "assistant"]


def test_keys_of_parts_and_pairs_are_counted() -> None:
    part = {"type": "text", "text": "42", "cache_control": {}}
    assert parsed(chat(content=[part])).ignored == ("messages[].content[].cache_control",)
    assert parsed({"texts": [{"user": "what?", "assistant": "42", "source": "x"}]}).ignored == ("texts[].source",)
    asked = chat(user={"weight": 1, "tool_calls": [{"function": {"name": "f"}}]}, loss_mask=0)
    assert parsed(asked).ignored == (
        "messages[].weight", "messages[].tool_calls", "messages[].loss_mask",
    )  # fmt: skip


@pytest.mark.parametrize("llava", [False, True])
def test_a_turn_has_one_content_and_one_speaker(llava) -> None:
    content, speaker = ("content", "role") if llava else ("value", "from")
    with pytest.raises(RecordError, match=r"^UNFOLLOWED_KEY: .*\[1\]\.content: is a string beside another value; keep"):
        parsed(chat(llava=llava, **{content: "43"}))
    with pytest.raises(RecordError, match=r'^BAD_ROLE: .*\[1\]: role is ".*" beside ".*"; use human'):
        parsed(chat(llava=llava, **{speaker: "user"}))
    for empty in (None, "", [], "42"):  # columns of a table
        assert parsed(chat(llava=llava, **{content: empty, speaker: "gpt"})).turns[1].text == "42"
    assert parsed(chat(llava=llava, **{speaker: None})).turns[1].role == "assistant"


@pytest.mark.parametrize("answer", ["<think>\nIt is", " <think>", "<think>a<think>"])
def test_thinking_without_an_end_is_a_fault(answer) -> None:
    with pytest.raises(RecordError, match=r"^UNCLOSED_THINKING: .*opens <think> and does not close it; write </think>"):
        parsed(chat(content=answer))
    assert parsed(chat(content=f"{answer}</think>42")).turns[1].text


@pytest.mark.parametrize(("answer", "what"), [
    ("It is\n</think>\n\n42", "closes </think> and does not open it; write <think>"),
    ("<think>a</think>b</think>42", "closes </think> and does not open it"),
    ("<think>a</think>\n<think>b</think>42", "begins with two blocks of thinking"),
    ("<think>a</think><think>b 42", "opens <think> and does not close it"),
])  # fmt: skip
def test_a_part_of_a_block_is_not_learned_as_the_answer(answer, what) -> None:
    for value in (chat(content=answer), {"question": "what?", "answer": answer}, {"caption": answer}):
        with pytest.raises(RecordError, match=rf"^UNCLOSED_THINKING: .*{what}"):
            parsed(value)
    for text in ("Write <think>a</think> first.", "<think>say <think></think>a <think>", "<think></think>42"):
        assert parsed(chat(content=text)).turns[1].text == text


def test_text_with_an_opening_tag_is_text() -> None:
    assert parsed(chat(content="Write <think> first.")).turns[1].text == "Write <think> first."


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_beside_an_answer_is_learned_as_its_block(key) -> None:
    assert parsed(chat(**{key: "It is.\n"})).turns[1].text == "<think>\nIt is.\n</think>\n\n42"
    parts = chat(**{key: "It is."})
    parts["messages"][1]["content"] = [{"type": "text", "text": "42"}]
    assert parsed(parts).turns[1].text == "<think>\nIt is.\n</think>\n\n42"
    for empty in ("", None, "  "):
        assert parsed(chat(**{key: empty})).turns[1].text == "42"
    single = {"question": "what?", "answer": "42", key: "It is."}
    for value in (single, {"texts": [{"user": "what?", "assistant": "42", key: "It is."}]}):
        assert (parsed(value).turns[1].text, parsed(value).ignored) == ("<think>\nIt is.\n</think>\n\n42", ())
    with pytest.raises(RecordError, match=rf"UNFOLLOWED_KEY: .* field {key}: is a list"):
        parsed(single | {key: ["a"]})


@pytest.mark.parametrize("value", [
    chat(reasoning="a", content="<think>b</think>42"), chat(reasoning="a", thinking="b"), chat(reasoning=["a"]),
    chat(user={"reasoning": "a"}), chat(reasoning="a </think> b"), chat(reasoning="<think>a"),
    chat(reasoning="a", content=[{"type": "text", "text": "<think>b</think>42"}]),
    chat(reasoning="a", content=[{"type": "text", "text": " "}, {"type": "text", "text": "<think>b</think>42"}]),
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
                   config=DataConfig())  # fmt: skip
    assert dict(report.ignored) == {"source": 2, "licence": 1, "messages[].name": 1}
    found = next(item for item in findings(report) if item.name == "keys")
    assert found.status == "ok"
    assert "source (2), licence (1), messages[].name (1)" in found.detail
    assert report.usable == 2

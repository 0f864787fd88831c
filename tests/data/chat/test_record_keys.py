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
    ("loss_mask", [0, False], [1, True, None]),
    ("mask", [True, False, 1], [None, ""]),
    ("train_detail", [[{"begin_offset": 0}]], [[], None]),
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
    ("label", [False, 0, 0.0, "false", "False", "0"], [True, 1, 3, "cat", None, float("nan"), ""]),
    ("labels", [[True, False], False], [[True], [0, 3], ["cat"], [], None]),
    ("kto_tag", [False, 0, "false"], [True, 1, "true", None]),
    ("audio", ["a.mp3", {"path": "a.mp3", "bytes": None}], [None, "", {"path": None, "bytes": None}]),
    ("audios", [["a.mp3"]], [[], None]),
    ("chat_template_kwargs", [{"enable_thinking": False}], [{}, None]),
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


@pytest.mark.parametrize("key", ["instruction", "input", "history"])
def test_the_rest_of_a_question_is_not_left_out(key) -> None:
    """Alpaca's records by `columns`: the answer would be learned without what it is about."""
    for form in ({"question": "Sort", "answer": "1 2 3"}, {"caption": "1 2 3"}):
        for value in ("3 1 2", [["what?", "42"]]):
            with pytest.raises(RecordError, match=rf"^UNFOLLOWED_KEY: .* field {key}: .*into the question"):
                parsed(form | {key: value})
        for value in ("", None, [], float("nan")):
            assert parsed(form | {key: value}).turns[-1].text == "1 2 3"
    assert parsed(chat(record={key: "data about the record"})).turns[1].text == "42"


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


@pytest.mark.parametrize("key", ["loss", "weight", "train", "loss_weight"])
def test_weights_of_parts_are_faults(key) -> None:
    part = {"type": "text", "text": "42"}
    with pytest.raises(RecordError, match=rf"UNFOLLOWED_KEY: .*messages\[1\]\.content\[0\]\.{key}: is 0"):
        parsed(chat(content=[part | {key: 0}]))
    assert parsed(chat(content=[part | {key: 1}])).turns[1].text == "42"
    assert parsed(chat(user={"content": [{"type": "text", "text": "what?", key: 0}]})).turns[0].text == "what?"


def test_keys_of_parts_and_pairs_are_counted() -> None:
    part = {"type": "text", "text": "42", "cache_control": {}}
    assert parsed(chat(content=[part])).ignored == ("messages[].content[].cache_control",)
    assert parsed({"texts": [{"user": "what?", "assistant": "42", "source": "x"}]}).ignored == ("texts[].source",)


def test_a_preference_record_without_a_conversation_is_named_so() -> None:
    with pytest.raises(RecordError, match="preference record"):
        parsed({"prompt": "what?", "chosen": "42", "rejected": "41"})


@pytest.mark.parametrize("role", ["user", "system"])
@pytest.mark.parametrize(("key", "learned", "context"), [
    ("train", [True, "true", "odd"], [False, None, ""]), ("weight", [1, 0.5], [0, "0"]), ("loss_mask", [1], [0, None]),
    ("train_detail", [[{"begin_offset": 0}]], [[]]),
])  # fmt: skip
def test_keys_that_ask_for_a_question_to_be_learned_are_followed_or_named(write, key, learned, context, role) -> None:
    def codes(train_on: str, values: list) -> dict[str, int]:
        system = {"role": "system", "content": "Be brief."}
        rows = [chat(user={key: value}) for value in values]
        if role == "system":
            rows = [{"messages": [system | {key: value}, *chat()["messages"]]} for value in values]
        report = check([SourceConfig(path=str(write(*rows)))], ConversationEncoder(shared_tokenizer("bytes-chatml")),
                       config=DataConfig(train_on=train_on), vision=False)  # fmt: skip
        assert all(f"messages[0].{key}: asks for another weight" in str(fault) for fault in report.faults)
        return {str(code): count for code, count in report.bad.items()}

    assert codes("answers", context) == {}
    assert codes("answers", learned) == {"UNFOLLOWED_KEY": len(learned)}
    followed = [value for value in [*learned, *context] if value in (True, "true", None, "", [])]
    assert codes("all", followed) == {}
    others = [value for value in [*learned, *context] if value not in followed]
    assert codes("all", others) == ({"UNFOLLOWED_KEY": len(others)} if others else {})


@pytest.mark.parametrize("key", ["rejected_videos", "rejected_audios", "rejected_objects", "rejected_tools",
                                 "positive_messages", "negative_messages", "negative_images"])  # fmt: skip
def test_keys_with_the_prefixes_of_ms_swift_are_named(key) -> None:
    for value in (chat(record={key: ["x"]}), {"question": "what?", "answer": "42", key: ["x"]}):
        with pytest.raises(RecordError, match=rf"^UNFOLLOWED_KEY: .* field {key}: is a list; "):
            parsed(value)
    for empty in (None, [], ""):
        assert parsed(chat(record={key: empty})).turns[1].text == "42"


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


def test_calls_belong_to_answers_of_conversations() -> None:
    calls = {"tool_calls": [{"function": {"name": "f"}}]}
    for value in (chat(user=calls), {"texts": [{"user": "what?", "assistant": "42"} | calls]}):
        with pytest.raises(
            RecordError, match=r"UNFOLLOWED_KEY: .*tool_calls: is a list; write the calls into an answer"
        ):
            parsed(value)


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
                   config=DataConfig(), vision=False)  # fmt: skip
    assert dict(report.ignored) == {"source": 2, "licence": 1, "messages[].name": 1}
    found = next(item for item in findings(report) if item.name == "keys")
    assert found.status == "ok"
    assert "source (2), licence (1), messages[].name (1)" in found.detail
    assert report.usable == 2


def test_faults_are_counted_like_others(write) -> None:
    file = write(chat(loss_mask=0), chat(), chat(record={"chosen": "a"}))
    report = check([SourceConfig(path=str(file))], ConversationEncoder(shared_tokenizer("bytes-chatml")),
                   config=DataConfig(), vision=False)  # fmt: skip
    assert (report.usable, dict(report.bad)) == (1, {"UNFOLLOWED_KEY": 2})

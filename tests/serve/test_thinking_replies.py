"""Thinking in replies: apart from the content, whole and streamed, and switched by the request."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.serve.api_errors import ApiError
from mm_moslora.serve.api_routes import Reply
from mm_moslora.serve.chat_request import chat_request
from mm_moslora.serve.continuous_batching import AnswerPart
from mm_moslora.serve.gradio_demo import messages_of
from mm_moslora.serve.prompt_preparation import refuse_unfit
from mm_moslora.serve.request_limits import Limits
from mm_moslora.serve.terminal_chat import folded
from mm_moslora.serve.text_stream import TextStream, ThinkingSplit
from tests.data.chat_templates import tokenizer_of

TEXTS = {
    "<think>\nIt is.\n\nYes.\n</think>\n\na ball": ("It is.\n\nYes.", "a ball"),
    "<think>It is.</think>a ball": ("It is.", "a ball"),
    "<think>\n\n</think>\n\na ball": ("", "a ball"),
    "<think>\nno end": ("no end", ""),
    "a ball": ("", "a ball"),
    "<thin ice": ("", "<thin ice"),
    "a <think>b</think> c": ("", "a <think>b</think> c"),
    "<think>a</think>b <think>c</think>": ("a", "b <think>c</think>"),
    "": ("", ""),
}


def request(**more):
    return chat_request({"model": "m", "messages": [{"role": "user", "content": "a"}]} | more, Limits())


def encoder(name: str, thinking: str = "auto") -> ConversationEncoder:
    return ConversationEncoder(tokenizer_of(name), thinking=thinking)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("text", TEXTS)
def test_thinking_and_content_are_apart_however_the_text_is_cut(text, size) -> None:
    reply = Reply(request=request(stream=True), prompt_tokens=1)
    events = b""
    pieces = [AnswerPart(text=text[start : start + size]) for start in range(0, len(text), size)]
    for piece in [*pieces, AnswerPart(ending="stop")]:
        events += reply.add(0, piece)
    message = reply.whole()["choices"][0]["message"]
    assert (message.get("reasoning_content", ""), message["content"]) == TEXTS[text]
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in events.decode().split("\n\n") if line]
    streamed = ["".join(delta.get(key, "") for delta in deltas) for key in ("reasoning_content", "content")]
    assert tuple(streamed) == TEXTS[text]


@given(st.lists(st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</", "\n", " ", "a"]), max_size=9))
def test_pieces_are_split_as_the_whole_is(pieces) -> None:
    split = ThinkingSplit()
    parts = [split.add(piece) for piece in pieces] + [split.add("", last=True)]
    joined = "".join(thinking for thinking, _ in parts), "".join(content for _, content in parts)
    assert joined == ThinkingSplit().add("".join(pieces), last=True)


@pytest.mark.parametrize("begun", ["<think>\n", "<think>a</think>", ""])
def test_what_is_settled_is_not_kept_so_that_long_answers_take_linear_time(begun) -> None:
    split = ThinkingSplit()
    for piece in [begun, *["word "] * 20_000]:
        split.add(piece)
    assert len(pickle.dumps(split)) < 1000


def test_the_switch_is_read() -> None:
    assert request().thinking is None
    assert request(chat_template_kwargs={}).thinking is None
    assert request(chat_template_kwargs={"enable_thinking": False}).thinking is False
    assert request(chat_template_kwargs={"enable_thinking": True}).thinking is True


@pytest.mark.parametrize("value", [
    {"enable_thinking": "no"}, {"enable_thinking": 0}, {"thinking": True}, {"enable_thinking": True, "x": 1}, [], "a",
])  # fmt: skip
def test_other_values_are_refused(value) -> None:
    with pytest.raises(ApiError, match="chat_template_kwargs"):
        request(chat_template_kwargs=value)


def test_a_template_without_a_switch_refuses_it() -> None:
    asked = request(chat_template_kwargs={"enable_thinking": False})
    for name, refused in (("qwen3", False), ("lfm2_2_5", True), ("qwen2_5", True)):
        models = SimpleNamespace(encoder=encoder(name), takes_pictures=False, context=None)
        if refused:
            with pytest.raises(ApiError, match="one form of prompts"):
                refuse_unfit(asked, models, Limits())
        else:
            refuse_unfit(asked, models, Limits())
        refuse_unfit(request(), models, Limits())


def test_a_block_that_the_prompt_opened_begins_the_text() -> None:
    made = encoder("qwen3_5_think", "always")
    ids = made.tokenizer.encode("It is.\n</think>\n\na ball", add_special_tokens=False)
    for thinking, begun in ((None, "<think>\n"), (True, "<think>\n"), (False, "")):
        stream = TextStream(made, thinking=thinking)
        text = "".join(stream.add(token) for token in ids) + stream.finish()
        assert text == f"{begun}It is.\n</think>\n\na ball"


@pytest.mark.parametrize("size", [1, 4, 100])
def test_the_terminal_folds_thinking(size) -> None:
    fold = "[3 words of thinking; /thinking shows them]\n"
    for text, shown in {
        "<think>\nIt is round.\n</think>\n\na ball": f"{fold}a ball", "<think>It is round.": fold, "a ball": "a ball",
        "<think>\n\n</think>\n\na ball": "a ball", "": "",
    }.items():  # fmt: skip
        pieces = (text[start : start + size] for start in range(0, len(text), size))
        assert "".join(folded(pieces)) == shown


def test_the_demo_sends_no_thinking_back() -> None:
    history = [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "It is round.", "metadata": {"title": "Thinking", "status": "done"}},
        {"role": "assistant", "content": "a ball", "metadata": None},
    ]
    parts = [message.parts for message in messages_of({"text": "sure?"}, history)]
    assert parts == [("what?",), ("a ball",), ("sure?",)]

"""Thinking in answers is tokenised as the chat template means it; proved with the template of Qwen3 as TRL ships it."""

from __future__ import annotations

import copy
import importlib.resources
import pickle

import pytest
import torch
from tiny import CHATML, make_tokenizer
from tokenizers import AddedToken

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, Encoded
from mm_moslora.data.chat.record_turns import Turn
from tests.data.sets import turns

THINKING = [
    "<think>\nIt is round.\n</think>\n\na ball",
    "<think>It is round.</think>a ball",
    "\n<think>\n\nTwo steps.\n\nThen one.\n</think>\n\n\na ball",
    "<think>\n</think>\n\na ball",
]


@pytest.fixture(scope="module")
def tokenizer():
    """With Qwen3's template; its markers are added tokens that are not special, as in Qwen3."""
    made = make_tokenizer()
    made.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    made.chat_template = importlib.resources.files("trl").joinpath("chat_templates", "qwen3.jinja").read_text()
    return made


def stock(tokenizer, *texts: str) -> list[int]:
    """What transformers gives for the conversation; line breaks at its end are not trained on."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    return tokenizer.encode(text, add_special_tokens=False)


def learned(encoded: Encoded, tokenizer) -> str:
    return tokenizer.decode(encoded.input_ids[encoded.supervised])


@pytest.mark.parametrize("answer", THINKING)
def test_thinking_has_the_tokens_of_the_template_and_is_learned(tokenizer, answer):
    encoded = ConversationEncoder(tokenizer).encode(turns("what is it?", answer))
    assert encoded.input_ids.tolist() == stock(tokenizer, "what is it?", answer)
    text = learned(encoded, tokenizer)
    assert text.startswith("<think>\n")
    assert text.endswith("\n</think>\n\na ball<|im_end|>")
    assert encoded.input_ids.tolist().count(tokenizer.convert_tokens_to_ids("<think>")) == 1
    assert encoded.thoughts == (answer != THINKING[3])


def test_the_prompt_of_an_answer_that_thinks_is_the_templates_generation_prompt(tokenizer):
    encoded = ConversationEncoder(tokenizer).encode(turns("what is it?", THINKING[0]))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "what is it?"}], add_generation_prompt=True)
    ids = list(prompt["input_ids"])
    assert encoded.input_ids[: len(ids)].tolist() == ids
    assert not encoded.supervised[: len(ids)].any()
    assert encoded.supervised[len(ids) :].all()
    assert torch.equal(
        ConversationEncoder(tokenizer, thinking="always").encode_prompt(turns("what is it?")), torch.tensor(ids)
    )


def test_an_answer_without_thinking_keeps_the_empty_block_as_its_prompt(tokenizer):
    encoded = ConversationEncoder(tokenizer).encode(turns("what is it?", "a ball"))
    assert encoded.input_ids.tolist() == stock(tokenizer, "what is it?", "a ball")
    assert learned(encoded, tokenizer) == "a ball<|im_end|>"
    prompt = ConversationEncoder(tokenizer).encode_prompt(turns("what is it?"))
    assert prompt.tolist() == encoded.input_ids[: len(prompt)].tolist()


def test_always_learns_the_empty_block_too(tokenizer):
    encoder = ConversationEncoder(tokenizer, thinking="always")
    encoded = encoder.encode(turns("what is it?", "a ball"))
    assert encoded.input_ids.tolist() == stock(tokenizer, "what is it?", "a ball")
    assert learned(encoded, tokenizer) == "<think>\n\n</think>\n\na ball<|im_end|>"
    whole = [*encoder.encode_prompt(turns("what is it?")).tolist(), *encoder.encode_answer("a ball")]
    assert whole == encoded.input_ids[: len(whole)].tolist()


def test_earlier_answers_lose_their_thinking_as_in_the_template_and_are_counted(tokenizer):
    texts = ("what is it?", THINKING[0], "which colour?", "<think>\nLook.\n</think>\n\nred")
    encoded = ConversationEncoder(tokenizer).encode(turns(*texts))
    assert encoded.input_ids.tolist() == stock(tokenizer, *texts)
    assert (encoded.thoughts, encoded.dropped_thoughts) == (1, 1)
    cut = ConversationEncoder(tokenizer).encode(turns(*texts), max_length=len(encoded.input_ids) - 1)
    assert cut.input_ids.tolist() == stock(tokenizer, *texts[:2])
    assert (cut.thoughts, cut.dropped_turns) == (1, 2)


@pytest.mark.parametrize("answer", THINKING)
def test_never_leaves_thinking_out(tokenizer, answer):
    encoded = ConversationEncoder(tokenizer, thinking="never").encode(turns("what is it?", answer))
    assert encoded.input_ids.tolist() == stock(tokenizer, "what is it?", "a ball")
    assert learned(encoded, tokenizer) == "a ball<|im_end|>"
    assert encoded.dropped_thoughts == (answer != THINKING[3])


def test_markers_that_are_typed_stay_text(tokenizer):
    """In a question, within an answer, and within thinking."""
    think = tokenizer.convert_tokens_to_ids("<think>")
    typed = "<think>\nsay <think> twice\n</think>\n\na <think>"
    encoded = ConversationEncoder(tokenizer).encode(turns("is <think>x</think> a tag?", typed))
    assert encoded.input_ids.tolist().count(think) == 1
    encoded = ConversationEncoder(tokenizer).encode(turns("is it a tag?", "yes, <think>x</think> is"))
    assert encoded.input_ids.tolist().count(think) == 1  # the template's empty block
    assert not encoded.thoughts


def test_a_template_that_knows_no_thinking_gets_it_as_the_text_it_is():
    plain = make_tokenizer()
    plain.chat_template = CHATML
    answer = THINKING[0]
    encoded = ConversationEncoder(plain).encode(turns("what is it?", answer))
    assert encoded.input_ids.tolist() == stock(plain, "what is it?", answer)
    assert (
        learned(ConversationEncoder(plain, thinking="never").encode(turns("what is it?", answer)), plain)
        == "a ball<|im_end|>"
    )


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "glm4moe", "qwen3", "qwen3_5_nothink"])
@pytest.mark.parametrize("answer", [THINKING[0], "a ball"])
def test_other_templates_that_think_lose_no_answer(name, answer):
    made = make_tokenizer()
    made.chat_template = importlib.resources.files("trl").joinpath("chat_templates", f"{name}.jinja").read_text()
    for mode in ("auto", "always", "never"):
        encoded = ConversationEncoder(made, thinking=mode).encode(turns("what is it?", answer))
        assert "a ball" in learned(encoded, made)
        assert ("It is round." in learned(encoded, made)) == bool(encoded.thoughts)


def test_turns_are_not_changed(tokenizer):
    given = [Turn(role="user", text="what is it?"), Turn(role="assistant", text=THINKING[0])]
    ConversationEncoder(tokenizer).encode(given)
    assert given[1].text == THINKING[0]


def test_an_encoder_can_be_pickled_and_copied(tokenizer):
    """Data loaders that spawn their workers pickle it."""
    conversation = turns("a", "<think>\nb\n</think>\n\nc")
    encoder = ConversationEncoder(tokenizer)
    fresh = copy.deepcopy(encoder)
    expected = encoder.encode(conversation).input_ids
    for twin in (pickle.loads(pickle.dumps(encoder)), copy.deepcopy(encoder)):
        assert torch.equal(twin.encode(conversation).input_ids, expected)
    fresh.template.source += "!"
    roles = ("user", "assistant") * 3
    assert fresh.template.plan(roles).tail == encoder.template.plan(roles).tail + "!"

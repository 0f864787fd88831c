"""Labels over many templates and tokenizers: training sees what inference sees, and what stock processors make."""

from __future__ import annotations

import functools
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Turn
from tests.data.chat_templates import (
    CHATML,
    GEMMA,
    LLAMA_2,
    QWEN,
    TEMPLATES,
    VICUNA,
    VICUNA_WITHOUT_BOS,
    WITHOUT_END,
    WITHOUT_PROMPT,
    build_tokenizer,
    shared_tokenizer,
)

IMAGES = 3
TYPED = ["</s>", "<s>", "<|im_end|>", "<|im_start|>", "<image>", "[/INST]", " ASSISTANT:", "a", " ", "\n", "🙂", "é写"]
texts = st.lists(st.sampled_from(TYPED), max_size=5).map("".join)
pairs_of_texts = st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=3)
relaxed = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def encoder_for(
    kind: str, template: str | None, *, system_prompt: str | None = None, add_bos: bool = False
) -> ConversationEncoder:
    tokenizer = build_tokenizer(kind, template, add_bos=add_bos)
    image = tokenizer.convert_tokens_to_ids("<image>")
    return ConversationEncoder(tokenizer, image_token_id=image, tokens_per_image=IMAGES, system_prompt=system_prompt)


@functools.cache
def shared_encoder(name: str) -> ConversationEncoder:
    tokenizer = shared_tokenizer(name)
    return ConversationEncoder(
        tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tokens_per_image=IMAGES
    )


def talk(*texts: str) -> list[Turn]:
    roles = itertools.cycle(["user", "assistant"])
    return [Turn(role=role, text=text) for role, text in zip(roles, texts, strict=False)]


def typed(pairs) -> list[Turn]:
    """Turns in which `<image>` is text; every other question has one image."""
    return [
        turn
        for index, (question, answer) in enumerate(pairs)
        for turn in (Turn.asking(question, images=index % 2), Turn(role="assistant", text=answer))
    ]


def spelled(encoder: ConversationEncoder, ids) -> str:
    """Text of ids with every space kept: behind a word that is cut off again."""
    anchor = encoder.tokenizer.encode("x", add_special_tokens=False)
    return encoder.tokenizer.decode([*anchor, *ids], clean_up_tokenization_spaces=False).removeprefix("x")


def rendered(encoder: ConversationEncoder, turns: list[Turn]) -> str:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return encoder.tokenizer.apply_chat_template(
        messages, chat_template=encoder.template.source, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "without" not in name])
@pytest.mark.parametrize(
    "texts",
    [("<image>\nwhat is it?",), ("one", "1", "two", "2 – zwei 🙂", "three <image>\n<image> four")],
    ids=["one", "three"],
)
def test_prompt_ids_are_those_of_the_rendered_template(name, texts):
    encoder = shared_encoder(name)
    turns = talk(*texts)
    text = rendered(encoder, turns).replace("<image>", "<image>" * IMAGES)
    assert encoder.encode_prompt(turns).tolist() == encoder.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", list(TEMPLATES))
@relaxed
@given(pairs_of_texts)
def test_training_ids_are_the_prompt_and_then_the_answer(name, pairs):
    """At every answer: the ids before it are `encode_prompt`, the ids of it are `encode_answer`; nothing is forged."""
    encoder = shared_encoder(name)
    turns = typed(pairs)
    encoded = encoder.encode(turns)
    ids = encoded.input_ids.tolist()
    for index in range(1, len(turns), 2):
        prompt = encoder.encode_prompt(turns[:index]).tolist()
        answer = encoder.encode_answer(turns[index].text)
        end = len(prompt) + len(answer)
        assert ids[: len(prompt)] == prompt
        assert ids[len(prompt) : end] == answer
        assert encoded.supervised[len(prompt) : end + 1].all()
        assert not encoded.supervised[len(prompt) - 1]
    controls = set(encoder.tokenizer.all_special_ids)
    harmless = encoder.encode([Turn(role=turn.role, text="y") for turn in turns]).input_ids.tolist()
    wanted = sum(token in controls for token in harmless) + IMAGES * sum(turn.images for turn in turns)
    assert sum(token in controls for token in ids) == wanted


@pytest.mark.parametrize("name", ["bytes-chatml", "bytes-plain", "sp-vicuna", "sp-legacy-vicuna", "sp-llama2"])
@pytest.mark.parametrize("answer", ["a red circle", "yes", "naïve 🙂", "two\nlines"])
def test_a_generated_answer_put_back_gives_its_own_tokens(name, answer):
    encoder = shared_encoder(name)
    turns = talk("what is it?", answer, "why?")
    generated = encoder.encode_answer(answer)
    assert encoder.decode_answer([*generated, encoder.tokenizer.eos_token_id]).rstrip() == answer
    prompt = encoder.encode_prompt(turns[:1]).tolist()
    assert encoder.encode_prompt(turns)[: len(prompt) + len(generated)].tolist() == prompt + generated


@pytest.mark.parametrize("name", ["bytes-chatml", "sp-vicuna", "sp-legacy-vicuna", "sp-llama2", "sp-legacy-chatml"])
@pytest.mark.parametrize("question", ["<image>\nwhat is it?", "<image>\n<image>\nwhich?", "look: <image> red?"])
def test_stock_llava_processor_agrees(name, question):
    from PIL import Image
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    square = {"height": 6, "width": 6}
    tokenizer = shared_tokenizer(name)
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size=square, crop_size=square), tokenizer, patch_size=2,
        vision_feature_select_strategy="full", num_additional_image_tokens=0,
    )  # fmt: skip
    encoder = ConversationEncoder(
        tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tokens_per_image=9
    )
    turns = talk(question, "red", "sure?")
    images = [Image.new("RGB", (8, 8))] * turns[0].images
    stock = processor(text=rendered(encoder, turns), images=images, add_special_tokens=False)
    assert encoder.encode_prompt(turns).tolist() == list(stock["input_ids"][0])


@pytest.mark.parametrize("kind", ["sp", "sp-legacy"])
@pytest.mark.parametrize("template", [VICUNA, VICUNA_WITHOUT_BOS, LLAMA_2, None])
@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_stands_at_the_start_once_where_tokenizer_or_template_wants_it(kind, template, add_bos):
    encoder = encoder_for(kind, template, add_bos=add_bos)
    ids = encoder.encode_prompt(talk("what?")).tolist()
    wanted = int(add_bos or template in (VICUNA, LLAMA_2))
    assert ids.count(encoder.tokenizer.bos_token_id) == wanted
    assert (ids[0] == encoder.tokenizer.bos_token_id) == bool(wanted)


def test_an_image_typed_in_an_answer_or_in_a_literal_question_is_text():
    encoder = shared_encoder("bytes-chatml")
    question = Turn.asking("what does <image> mean?", images=1)
    ids = encoder.encode([question, Turn(role="assistant", text="<image>!")]).input_ids.tolist()
    assert ids.count(encoder.image_token_id) == IMAGES
    assert "\nwhat does <image> mean?" in spelled(encoder, ids)
    assert "<image>!" in spelled(encoder, ids)


def test_asking_gives_the_ids_of_placeholders_on_lines_of_their_own():
    encoder = shared_encoder("sp-legacy-vicuna")
    marked = Turn(role="user", text="<image>\n<image>\nwhich?")
    assert encoder.encode_prompt([Turn.asking("which?", images=2)]).tolist() == encoder.encode_prompt([marked]).tolist()


def test_without_vision_the_placeholder_is_text():
    encoder = ConversationEncoder(build_tokenizer("bytes", CHATML, image=False))
    assert "<image> what?" in spelled(encoder, encoder.encode_prompt([Turn.asking("<image> what?")]).tolist())


class TestEmptySystemPrompt:
    def text(self, encoder: ConversationEncoder) -> str:
        return spelled(encoder, encoder.encode_prompt(talk("what?")).tolist())

    @pytest.mark.parametrize(
        ("kind", "template", "default"),
        [("bytes", QWEN, "helpful"), ("sp", VICUNA, "curious"), ("sp", VICUNA_WITHOUT_BOS, "curious")],
    )
    def test_it_removes_a_default(self, kind, template, default):
        assert default in self.text(encoder_for(kind, template))
        assert default not in self.text(encoder_for(kind, template, system_prompt=""))

    @pytest.mark.parametrize(("kind", "template"), [("bytes", CHATML), ("sp", LLAMA_2), ("sp", GEMMA), ("bytes", None)])
    def test_it_leaves_a_template_without_default_alone(self, kind, template):
        assert self.text(encoder_for(kind, template, system_prompt="")) == self.text(encoder_for(kind, template))


def test_a_literal_placeholder_in_a_folded_system_prompt_stays_text():
    encoder = encoder_for("sp", GEMMA, system_prompt="Say <image>.")
    ids = encoder.encode_prompt([Turn(role="user", text="<image>\nwhat?")]).tolist()
    assert ids.count(encoder.image_token_id) == IMAGES
    assert "user\nSay <image>.\n\n<image>" in spelled(encoder, ids)


@pytest.mark.parametrize("template", [WITHOUT_END, WITHOUT_PROMPT])
def test_templates_without_end_or_prompt_teach_the_model_to_stop(template):
    encoder = encoder_for("bytes", template)
    turns = talk("one", "1", "two", "2")
    encoded = encoder.encode(turns)
    assert encoded.input_ids[-1] == encoder.tokenizer.eos_token_id
    assert encoded.supervised[-1]
    prompt = encoder.encode_prompt(turns[:3]).tolist()
    assert encoded.input_ids[: len(prompt)].tolist() == prompt

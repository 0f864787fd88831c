"""Labels over many templates and tokenizers: training sees what inference sees, and what stock processors make."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, TooLong
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.utils.errors import ConfigError, DataError
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
from tests.data.sets import shared_encoder, turns

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
    conversation = turns(*texts)
    text = rendered(encoder, conversation).replace("<image>", "<image>" * IMAGES)
    assert encoder.encode_prompt(conversation).tolist() == encoder.tokenizer.encode(text, add_special_tokens=False)


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
    conversation = turns("what is it?", answer, "why?")
    generated = encoder.encode_answer(answer)
    assert encoder.decode_answer([*generated, encoder.tokenizer.eos_token_id]).rstrip() == answer
    prompt = encoder.encode_prompt(conversation[:1]).tolist()
    assert encoder.encode_prompt(conversation)[: len(prompt) + len(generated)].tolist() == prompt + generated


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
    conversation = turns(question, "red", "sure?")
    images = [Image.new("RGB", (8, 8))] * conversation[0].images
    stock = processor(text=rendered(encoder, conversation), images=images, add_special_tokens=False)
    assert encoder.encode_prompt(conversation).tolist() == list(stock["input_ids"][0])


@pytest.mark.parametrize("kind", ["sp", "sp-legacy"])
@pytest.mark.parametrize("template", [VICUNA, VICUNA_WITHOUT_BOS, LLAMA_2, None])
@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_stands_at_the_start_once_where_tokenizer_or_template_wants_it(kind, template, add_bos):
    encoder = encoder_for(kind, template, add_bos=add_bos)
    ids = encoder.encode_prompt(turns("what?")).tolist()
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
        return spelled(encoder, encoder.encode_prompt(turns("what?")).tolist())

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
    conversation = turns("one", "1", "two", "2")
    encoded = encoder.encode(conversation)
    assert encoded.input_ids[-1] == encoder.tokenizer.eos_token_id
    assert encoded.supervised[-1]
    prompt = encoder.encode_prompt(conversation[:3]).tolist()
    assert encoded.input_ids[: len(prompt)].tolist() == prompt


def test_an_answer_that_would_merge_with_the_prompt_is_cut_off_cleanly() -> None:
    """Byte-level vocabularies know several line breaks as one token; the prompt ends with one."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces.train_from_iterator(["\n\n\nyes", "assistant\n\n\n"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<|im_end|>", chat_template=CHATML)
    assert len(tokenizer.encode("\n\n\n", add_special_tokens=False)) == 1
    encoder = ConversationEncoder(tokenizer)
    prompt, encoded = encoder.encode_prompt(turns("ok?")), encoder.encode(turns("ok?", "\n\nyes"))
    assert torch.equal(encoded.input_ids[: len(prompt)], prompt)
    assert tokenizer.decode(encoded.input_ids[encoded.supervised]) == "\n\nyes<|im_end|>"


def test_a_typed_end_of_turn_that_is_no_special_token_cannot_forge_a_turn() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("[/user]", special=False), AddedToken("[think]", special=False)])
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "[/user]<|im_end|>\n")
    forged, harmless = tokenizer.convert_tokens_to_ids(["[/user]", "[think]"])
    ids = ConversationEncoder(tokenizer).encode(turns("hello [/user] [think]", "yes [think]")).input_ids.tolist()
    assert ids.count(forged) == 2  # the template's own
    assert ids.count(harmless) == 2  # ordinary vocabulary of the model


def test_a_special_token_that_text_and_template_spell_together_is_text() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[end]"]})
    tokenizer.chat_template = CHATML.replace("{{ message['content'] }}", "[{{ message['content'] }}]")
    ids = ConversationEncoder(tokenizer).encode_prompt(turns("end")).tolist()
    assert tokenizer.convert_tokens_to_ids("[end]") not in ids
    assert "user\n[end]<|im_end|>" in tokenizer.decode(ids)


def test_without_a_template_the_plain_one_is_used() -> None:
    tokenizer = build_tokenizer("sp", None, add_bos=True)
    encoded = ConversationEncoder(tokenizer).encode(turns("a", "b", "c", "d"))
    text = tokenizer.decode(encoded.input_ids)
    assert text == "<s>user:\na\nassistant:\nb</s>\nuser:\nc\nassistant:\nd</s>"


def test_the_name_of_the_unknown_token_is_text() -> None:
    encoder = shared_encoder("sp-llama2")
    ids = encoder.encode_prompt(turns("what is <unk>?")).tolist()
    assert encoder.tokenizer.unk_token_id not in ids
    assert "what is <unk>?" in encoder.tokenizer.decode(ids)


def test_a_system_prompt_replaces_a_default_and_a_system_turn_of_the_record_wins() -> None:
    encoder = encoder_for("sp", VICUNA, system_prompt="Be brief.")
    text = spelled(encoder, encoder.encode(turns("hi", "hello")).input_ids)
    assert "Be brief. USER: hi" in text
    assert "curious" not in text
    text = spelled(encoder, encoder.encode([Turn(role="system", text="Own."), *turns("hi", "hello")]).input_ids)
    assert "Own. USER: hi" in text
    assert "brief" not in text


@pytest.mark.parametrize(
    "refusal",
    [
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
        CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"),
    ],
    ids=["refused", "left out"],
)
def test_a_template_without_system_turn_gets_it_before_the_question(refusal: str) -> None:
    encoder = encoder_for("bytes", refusal, system_prompt="Be brief.")
    text = encoder.tokenizer.decode(encoder.encode(turns("hi", "hello")).input_ids)
    assert text == "<|im_start|>user\nBe brief.\n\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>"
    own = [Turn(role="system", text="Own."), *turns("hi", "hello", "more", "words")]
    shorter = encoder.encode(own, max_length=len(encoder.encode(own[:3]).input_ids))
    assert shorter.dropped_turns == 2


def test_contents_that_the_template_trims_are_trimmed() -> None:
    encoder = shared_encoder("sp-llama2")
    trimmed, plain = (encoder.encode(turns(*texts)) for texts in (("  hi \n", "\n hello "), ("hi", "hello")))
    assert torch.equal(trimmed.input_ids, plain.input_ids)


@pytest.mark.parametrize("change", ["| upper", "[:3]"])
def test_a_template_that_changes_contents_is_refused(change: str) -> None:
    with pytest.raises(ConfigError, match="Use another template"):
        encoder_for("bytes", CHATML.replace("message['content']", f"(message['content'] {change})"))


def test_a_template_that_refuses_roles_says_which() -> None:
    with pytest.raises(ConfigError, match="refuses the roles user, user"):
        shared_encoder("sp-llama2").encode_prompt([*turns("a"), *turns("b")])


@pytest.mark.parametrize(("conversation", "method"), [(["a"], "encode"), ([], "encode"), (["a", "b"], "encode_prompt")])
def test_conversations_that_end_wrongly_are_refused(conversation: list[str], method: str) -> None:
    with pytest.raises(DataError, match="does not end with"):
        getattr(shared_encoder("bytes-chatml"), method)(turns(*conversation))


KINDS = pytest.mark.parametrize("name", ["bytes-chatml", "sp-legacy-llama2", "sp-vicuna"])


@KINDS
@settings(relaxed, max_examples=25)
@given(st.integers(1, 120))
def test_at_any_limit_whole_pairs_go_from_the_end_with_their_images(name: str, limit: int) -> None:
    encoder = shared_encoder(name)
    conversation = turns("<image>\none?", "dark red", "two <image>", "blue", "three?", "green")
    first = len(encoder.encode(conversation[:2]).input_ids)
    if first > limit:
        with pytest.raises(TooLong, match=f"first question and answer take {first} tokens, data.max_length is {limit}"):
            encoder.encode(conversation, max_length=limit)
        return
    encoded = encoder.encode(conversation, max_length=limit)
    kept = 6 - encoded.dropped_turns
    assert torch.equal(encoded.input_ids, encoder.encode(conversation[:kept]).input_ids)
    assert kept == 6 or len(encoder.encode(conversation[: kept + 2]).input_ids) > limit >= len(encoded.input_ids)
    assert encoded.images == sum(turn.images for turn in conversation[:kept])


@KINDS
def test_a_text_is_cut_within_the_answer_where_the_recipe_says_so(name: str) -> None:
    encoder, talk = shared_encoder(name), turns("red a cat", "red red red red red red red red")
    whole = encoder.encode(talk)
    length = len(whole.input_ids) - 3
    with pytest.raises(TooLong):
        encoder.encode(talk, max_length=length)
    cut = encoder.encode(talk, max_length=length, truncate=True)
    assert cut.input_ids.tolist() == whole.input_ids.tolist()[:length]
    assert cut.supervised.tolist() == whole.supervised.tolist()[:length]
    assert cut.dropped_turns == 2
    assert encoder.encode(talk, max_length=length + 3, truncate=True).dropped_turns == 0
    before = whole.supervised.tolist().index(True)  # nothing to learn would be left
    with pytest.raises(TooLong):
        encoder.encode(talk, max_length=before, truncate=True)
    assert len(encoder.encode(talk, max_length=before, truncate=True, whole=True).input_ids) == before


@KINDS
def test_the_loss_is_on_every_token_but_the_first(name: str) -> None:
    answers, whole = (shared_encoder(name).encode(turns("red a cat", "red"), whole=all_) for all_ in (False, True))
    assert whole.input_ids.tolist() == answers.input_ids.tolist()
    assert whole.supervised.tolist() == [False] + [True] * (len(whole.input_ids) - 1)

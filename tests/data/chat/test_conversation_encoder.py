"""Labels: what is supervised, that prompts are the tokenizer's own, and that nothing typed becomes a special token."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CHATML, make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, Encoded, TooLong
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.utils.errors import ConfigError, DataError
from tests.data.conftest import Setup, turns

SPECIAL = [
    "<|im_end|>",
    "<|im_start|>",
    "</s>",
    "<s>",
    "<unk>",
    "[INST]",
    "<image>",
    "ASSISTANT: ",
    "<|im_start|>user\n",
]
WORDS = ["red", "a cat", "你好，世界", "🙂🏽", "naïve é", "\n", "\n\n", "  ", " ", "\t", ".", "1,024", "'s", "<", "|>"]
contents = st.lists(st.sampled_from(WORDS + SPECIAL), min_size=1, max_size=6).map("".join)
answers = contents.filter(lambda text: text.strip())
free = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Co", "Cn"), exclude_characters="\u2581"), min_size=1, max_size=20
).filter(str.strip)
plain_words = st.lists(st.sampled_from(["red", "a cat", "你好", "🙂", "two\nlines", "1,024", "I'm"]), min_size=1).map(
    " ".join
)
relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def runs(encoded: Encoded) -> list[list[int]]:
    """The supervised stretches."""
    pairs = zip(encoded.supervised.tolist(), encoded.input_ids.tolist(), strict=True)
    return [[token for _, token in group] for flag, group in itertools.groupby(pairs, lambda pair: pair[0]) if flag]


def literal(texts: list[str]) -> list[Turn]:
    """Turns in which every `<image>` is typed text."""
    return [Turn(role="assistant" if index % 2 else "user", text=text, offsets=()) for index, text in enumerate(texts)]


class TestSupervision:
    @relaxed
    @given(st.lists(st.tuples(contents | free, answers | free), min_size=1, max_size=3))
    def test_supervised_tokens_are_the_answers_with_their_end_of_turn(self, setup: Setup, pairs) -> None:
        encoded = setup.encoder().encode(literal([text for pair in pairs for text in pair]))
        assert [setup.decode(run) for run in runs(encoded)] == [setup.answer(answer) for _, answer in pairs]

    @relaxed
    @given(st.lists(contents | free, min_size=1, max_size=4), answers)
    def test_a_prompt_is_the_beginning_of_the_training_sequence(self, setup: Setup, texts, answer) -> None:
        texts = texts if len(texts) % 2 else texts[:-1]
        texts = [text if index % 2 == 0 or text.strip() else "x" for index, text in enumerate(texts)]
        encoder = setup.encoder()
        prompt = encoder.encode_prompt(literal(texts))
        encoded = encoder.encode(literal([*texts, answer]))
        assert torch.equal(encoded.input_ids[: len(prompt)], prompt)
        assert encoded.supervised[len(prompt) :].all()

    def test_the_answer_alone_has_the_ids_of_the_trained_answer(self, setup: Setup) -> None:
        encoder = setup.encoder()
        (run,) = runs(encoder.encode(turns("which colour?", "dark blue")))
        ids = encoder.encode_answer("dark blue")
        assert run[: len(ids)] == ids
        assert setup.decode(ids).strip() == "dark blue"

    def test_an_answer_that_would_merge_with_the_prompt_is_cut_off_cleanly(self) -> None:
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
        assert [tokenizer.decode(run) for run in runs(encoded)] == ["\n\nyes<|im_end|>"]


class TestStockEquality:
    @relaxed
    @given(st.lists(plain_words, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1))
    def test_prompts_are_what_the_tokenizer_makes_of_the_whole_text(self, setup: Setup, texts) -> None:
        assert setup.encoder().encode_prompt(turns(*texts)).tolist() == setup.stock(turns(*texts), prompt=True)

    @relaxed
    @given(st.lists(st.tuples(plain_words, plain_words), min_size=1, max_size=3))
    def test_training_sequences_too_up_to_the_last_end_of_turn(self, setup: Setup, pairs) -> None:
        conversation = turns(*(text for pair in pairs for text in pair))
        ids = setup.encoder().encode(conversation).input_ids.tolist()
        assert setup.stock(conversation)[: len(ids)] == ids

    def test_images_give_the_ids_of_expanded_placeholders(self, setup: Setup) -> None:
        conversation = turns("<image>\nwhat is it?", "a cat", "and this: <image>?", "a dog")
        encoded = setup.encoder().encode(conversation)
        ids = encoded.input_ids.tolist()
        assert setup.stock(conversation)[: len(ids)] == ids
        assert ids.count(setup.tokenizer.convert_tokens_to_ids("<image>")) == 6
        assert encoded.images == 2

    def test_the_beginning_of_sequence_stands_where_the_template_puts_it(self, llama2: Setup, chatml: Setup) -> None:
        ids = llama2.encoder().encode(turns("a", "b", "c", "d")).input_ids.tolist()
        assert ids.count(llama2.tokenizer.bos_token_id) == 2
        assert chatml.tokenizer.bos_token_id is None


class TestTypedSpecialTokens:
    def test_special_text_in_questions_and_answers_stays_text(self, setup: Setup) -> None:
        tokenizer = setup.tokenizer
        clean = setup.encoder().encode(turns("a b", "c d"))
        dirty = setup.encoder().encode(literal(["a <|im_end|></s><s><image> b", "c <|im_start|></s><image> d"]))
        special = set(tokenizer.all_special_ids)
        count = lambda encoded: [token for token in encoded.input_ids.tolist() if token in special]  # noqa: E731
        assert count(dirty) == count(clean)

    def test_a_typed_end_of_turn_that_is_no_special_token_cannot_forge_a_turn(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([AddedToken("[/user]", special=False), AddedToken("[think]", special=False)])
        tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "[/user]<|im_end|>\n")
        forged, harmless = tokenizer.convert_tokens_to_ids(["[/user]", "[think]"])
        ids = ConversationEncoder(tokenizer).encode(turns("hello [/user] [think]", "yes [think]")).input_ids.tolist()
        assert ids.count(forged) == 2  # the template's own
        assert ids.count(harmless) == 2  # ordinary vocabulary of the model

    def test_a_special_token_that_text_and_template_spell_together_is_text(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["[end]"]})
        tokenizer.chat_template = CHATML.replace("{{ message['content'] }}", "[{{ message['content'] }}]")
        ids = ConversationEncoder(tokenizer).encode_prompt(turns("end")).tolist()
        assert tokenizer.convert_tokens_to_ids("[end]") not in ids
        assert "user\n[end]<|im_end|>" in tokenizer.decode(ids)

    def test_the_name_of_the_unknown_token_is_text(self, llama2: Setup) -> None:
        ids = llama2.encoder().encode_prompt(turns("what is <unk>?")).tolist()
        assert llama2.tokenizer.unk_token_id not in ids
        assert "what is <unk>?" in llama2.tokenizer.decode(ids)

    def test_text_around_a_typed_special_token_keeps_its_ids(self, setup: Setup) -> None:
        """Only the typed token itself is read differently."""
        ids = setup.encoder().encode(literal(["what is </s><|im_end|> red", "blue"])).input_ids.tolist()
        text = setup.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert "what is </s><|im_end|> red" in text


class TestSystemPrompts:
    def test_a_default_of_the_template_is_kept_or_replaced(self, vicuna: Setup) -> None:
        conversation = turns("hi", "hello")
        assert "A chat with an assistant." in vicuna.tokenizer.decode(vicuna.encoder().encode(conversation).input_ids)
        text = vicuna.tokenizer.decode(vicuna.encoder(system_prompt="Be brief.").encode(conversation).input_ids)
        assert "Be brief. USER: hi" in text
        assert "A chat" not in text

    def test_a_system_turn_of_the_record_wins(self, llama2: Setup) -> None:
        conversation = [Turn(role="system", text="Own."), *turns("hi", "hello")]
        text = llama2.tokenizer.decode(llama2.encoder(system_prompt="Other.").encode(conversation).input_ids)
        assert "Own." in text
        assert "Other." not in text

    @pytest.mark.parametrize(
        "refusal",
        [
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
            CHATML.replace(
                "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
            ),
        ],
        ids=["refused", "left out"],
    )
    def test_a_template_without_system_turn_gets_it_before_the_question(self, refusal: str) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = refusal
        encoder = ConversationEncoder(tokenizer, system_prompt="Be brief.")
        text = tokenizer.decode(encoder.encode(turns("hi", "hello")).input_ids)
        assert text == "<|im_start|>user\nBe brief.\n\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>"
        own = [Turn(role="system", text="Own."), *turns("hi", "hello", "more", "words")]
        shorter = encoder.encode(own, max_length=len(encoder.encode(own[:3]).input_ids))
        assert shorter.dropped_turns == 2

    def test_an_image_keeps_its_place_behind_a_folded_system_prompt(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('no') if messages[0]['role'] == 'system' }}" + CHATML
        encoder = ConversationEncoder(tokenizer, image_token_id=7, tokens_per_image=2, system_prompt="<image>?")
        question = Turn(role="user", text="<image>\nwhat?", offsets=(0,))
        ids = encoder.encode_prompt([question]).tolist()
        assert ids.count(7) == 2
        assert tokenizer.decode(ids[: ids.index(7)]).endswith("<image>?\n\n")


class TestTemplates:
    def test_contents_that_the_template_trims_are_trimmed(self, llama2: Setup) -> None:
        encoder = llama2.encoder()
        assert torch.equal(
            encoder.encode(turns("  hi \n", "\n hello ")).input_ids, encoder.encode(turns("hi", "hello")).input_ids
        )

    def test_a_thinking_block_belongs_to_the_prompt(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = CHATML.replace(
            "{{ message['content'] }}",
            "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
            "{{ message['content'] }}",
        )
        encoder = ConversationEncoder(tokenizer)
        encoded = encoder.encode(turns("a", "b", "c", "d"))
        assert [tokenizer.decode(run) for run in runs(encoded)] == ["b<|im_end|>", "d<|im_end|>"]
        prompt = encoder.encode_prompt(turns("a", "b", "c"))
        assert tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
        assert torch.equal(encoded.input_ids[: len(prompt)], prompt)

    def test_a_template_that_ends_no_answer_gets_the_end_of_sequence(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        encoded = ConversationEncoder(tokenizer).encode(turns("a", "b", "c", "d"))
        assert [tokenizer.decode(run) for run in runs(encoded)] == ["b<|im_end|>", "d<|im_end|>"]

    def test_without_a_template_the_plain_one_is_used(self, sentencepiece_folder) -> None:
        from transformers import LlamaTokenizer

        tokenizer = LlamaTokenizer.from_pretrained(sentencepiece_folder, add_bos_token=True)
        tokenizer.chat_template = None
        encoded = ConversationEncoder(tokenizer).encode(turns("a", "b", "c", "d"))
        text = tokenizer.decode(encoded.input_ids)
        assert text == "<s>user:\na\nassistant:\nb</s>\nuser:\nc\nassistant:\nd</s>"

    @pytest.mark.parametrize("change", ["| upper", "| tojson", "[:3]", "| replace(' ', '_')"])
    def test_a_template_that_changes_contents_is_refused(self, change: str) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = CHATML.replace("message['content']", f"(message['content'] {change})")
        with pytest.raises(ConfigError, match="Use another template"):
            ConversationEncoder(tokenizer)

    def test_a_template_that_refuses_roles_says_which(self, llama2: Setup) -> None:
        with pytest.raises(ConfigError, match="refuses the roles user, user"):
            llama2.encoder().encode_prompt([*turns("a"), *turns("b")])


class TestTruncation:
    def test_whole_pairs_go_from_the_end(self, setup: Setup) -> None:
        encoder = setup.encoder()
        conversation = turns("<image>\none?", "red", "two?", "blue", "<image> three?", "green")
        whole, two = encoder.encode(conversation), encoder.encode(conversation[:4])
        shorter = encoder.encode(conversation, max_length=len(whole.input_ids) - 1)
        assert torch.equal(shorter.input_ids, two.input_ids)
        assert (shorter.dropped_turns, shorter.images) == (2, 1)
        exact = encoder.encode(conversation, max_length=len(whole.input_ids))
        assert (exact.dropped_turns, exact.images) == (0, 2)

    @relaxed
    @given(st.integers(1, 80))
    def test_at_any_limit_an_answer_is_whole_or_absent(self, setup: Setup, limit: int) -> None:
        conversation = turns("<image>\none?", "dark red", "two <image>", "blue", "three?", "green")
        encoder = setup.encoder()
        try:
            encoded = encoder.encode(conversation, max_length=limit)
        except TooLong:
            assert len(encoder.encode(conversation[:2]).input_ids) > limit
            return
        assert len(encoded.input_ids) <= limit
        kept = [turn.text for turn in conversation[: 6 - encoded.dropped_turns]]
        assert [setup.decode(run) for run in runs(encoded)] == [setup.answer(text) for text in kept[1::2]]
        image = setup.tokenizer.convert_tokens_to_ids("<image>")
        assert encoded.input_ids.tolist().count(image) == 3 * encoded.images == 3 * "".join(kept).count("<image>")

    def test_a_first_pair_that_does_not_fit_is_an_error(self, setup: Setup) -> None:
        with pytest.raises(TooLong, match=r"first question and answer take \d+ tokens, data.max_length is 9"):
            setup.encoder().encode(turns("<image>\nq", "a " * 50), max_length=9)


@pytest.mark.parametrize(("conversation", "method"), [(["a"], "encode"), ([], "encode"), (["a", "b"], "encode_prompt")])
def test_conversations_that_end_wrongly_are_refused(chatml: Setup, conversation: list[str], method: str) -> None:
    with pytest.raises(DataError, match="does not end with"):
        getattr(chatml.encoder(), method)(turns(*conversation))

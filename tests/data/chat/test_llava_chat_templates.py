"""LLaVA's templates by name: exact labels with real tokenizers, and LLaVA's own ids and labels where asked for."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer

from mm_moslora.config.llava_chat_templates import CHAT_TEMPLATES, notes_of, set_chat_template
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.record_faults import Where
from mm_moslora.utils.errors import ConfigError
from tests.data.chat_templates import NAMES, real_tokenizer, tokenizer_copy

GOLDEN = Path(__file__).parents[1] / "golden" / "llava_labels.json"
ENDS = {
    "plain": ("{}\n", ""), "v1": (" {}", ""), "llama_2": (" {} ", ""), "mistral": (" {} ", ""),
    "llama_3": ("{}", "<|eot_id|>"), "chatml": ("{}", "<|im_end|>"), "gemma": ("{}", "<end_of_turn>"),
    "phi3": ("{}", "<|end|>"),
    "alpaca": (" " * 16 + "{}", ""),
}  # fmt: skip
TYPED = ["</s>", "<s>", "<|im_end|>", "<|im_start|>", "<image>", "[/INST]", " ASSISTANT: ", "###", "<|eot_id|>",
         "<end_of_turn>", "<|end|>", "USER:", "<unk>", "<|endoftext|>"]  # fmt: skip
WORDS = ["a red cat", "yes", "1,024", "I'm", "two\nlines", "naïve", "你好", "🙂", " ", "\n", ".", "<", "_"]
LOWER = ["a red cat", "yes", "two dogs", "why not"]


def conversations(name: str, template: str) -> list[list[tuple[str, str]]]:
    """Random conversations of questions and answers, the same in every run."""
    rng = random.Random(f"{name} {template}")
    words = LOWER if name == "open_clip" else WORDS + TYPED

    def text() -> str:
        found = (" " if name == "open_clip" else "").join(rng.choices(words, k=rng.randint(1, 5)))
        return found if found.strip() else text()

    return [[(text(), text()) for _ in range(rng.randint(1, 3))] for _ in range(12)]


@functools.cache
def tokenizer_with(name: str, controls: tuple[str, ...]):
    tokenizer = tokenizer_copy(name)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<image>", *controls]}, replace_extra_special_tokens=False
    )
    return tokenizer


def encoder(name: str, template: str, *, controls: bool) -> ConversationEncoder:
    """An encoder for a real tokenizer; `controls` gives it the template's own tokens, as the models have them.

    Encoders share the tokenizer, so only the last one that was made is of use.
    """
    every = tuple(text for named in CHAT_TEMPLATES.values() for text in named.controls)
    tokenizer = tokenizer_with(name, every if controls else ())
    tokenizer.eos_token = real_tokenizer(name).eos_token
    set_chat_template(tokenizer, template)
    return ConversationEncoder(tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tokens_per_image=2)


def typed(pairs) -> list[Turn]:
    """Questions, the first with a picture, in which `<image>` is text."""
    return [
        turn
        for index, (question, answer) in enumerate(pairs)
        for turn in (Turn.asking(question, images=int(index == 0)), Turn(role="assistant", text=answer))
    ]


def supervised(made: ConversationEncoder, turns: list[Turn]) -> list[str]:
    encoded = made.encode(turns)
    anchor = made.tokenizer.encode("x", add_special_tokens=False)
    lead = len(made.tokenizer.decode(anchor, clean_up_tokenization_spaces=False))
    flags = zip(encoded.supervised.tolist(), encoded.input_ids.tolist(), strict=True)
    runs = [[token for _, token in group] for flag, group in itertools.groupby(flags, lambda pair: pair[0]) if flag]
    return [made.tokenizer.decode(anchor + run, clean_up_tokenization_spaces=False)[lead:] for run in runs]


def expected(made: ConversationEncoder, template: str, answer: str) -> str:
    shape, end = ENDS[template]
    end = end if end in made.tokens.guarded else end + made.tokenizer.eos_token
    return shape.format(answer.strip() if template == "llama_3" else answer) + end


COMBINATIONS = [(name, template, True) for name in NAMES for template in CHAT_TEMPLATES]
COMBINATIONS += [(name, template, False) for name in ("llama", "tekken") for template in CHAT_TEMPLATES
                 if CHAT_TEMPLATES[template].controls]  # fmt: skip


@pytest.mark.parametrize(("name", "template", "controls"), COMBINATIONS)
def test_supervised_tokens_are_the_answers_and_their_ends(name: str, template: str, controls: bool) -> None:
    made = encoder(name, template, controls=controls)
    for pairs in conversations(name, template):
        found = supervised(made, typed(pairs))
        wanted = [expected(made, template, answer) for _, answer in pairs]
        if template == "plain":  # captions follow each other without a question between them
            found, wanted = ["".join(found)], ["".join(wanted)]
        if name == "open_clip" or template == "plain":  # decoders and legacy tokenizers set spaces of their own
            found, wanted = (["".join(text.replace("</w>", "").split()) for text in item] for item in (found, wanted))
        assert found == wanted


@pytest.mark.parametrize("template", list(CHAT_TEMPLATES))
@pytest.mark.parametrize("name", ["llama", "llama-legacy", "tekken", "smollm2"])
def test_a_prompt_is_the_beginning_of_the_training_sequence(name: str, template: str) -> None:
    made = encoder(name, template, controls=True)
    turns = typed([("what?", "a cat"), ("sure?", "yes\nindeed")])
    ids = made.encode(turns).input_ids
    for count in (1, 3):
        prompt = made.encode_prompt(turns[:count])
        assert torch.equal(ids[: len(prompt)], prompt)


def test_captions_are_learnt_without_their_questions() -> None:
    made = encoder("llama", "plain", controls=True)
    turns = [Turn(role="user", text="<image>\nGive a brief description."), Turn(role="assistant", text="a cat")]
    ids = made.encode(turns).input_ids.tolist()
    image = made.image_token_id
    assert made.tokenizer.decode([token for token in ids if token != image]).startswith("<s>")
    assert "brief" not in made.tokenizer.decode(ids)
    assert ids.count(image) == 2
    assert made.encode_prompt(turns[:1]).tolist() == ids[:3]


@pytest.mark.parametrize("template", [name for name in CHAT_TEMPLATES if name != "plain"])
def test_a_system_prompt_replaces_the_default(template: str) -> None:
    made = encoder("llama", template, controls=True)
    turns = [Turn(role="system", text="Rhyme."), *typed([("what?", "a cat")])]
    text = made.tokenizer.decode(made.encode(turns).input_ids)
    assert text.count("Rhyme.") == 1
    default = CHAT_TEMPLATES[template].system
    assert not default or default not in text


def test_an_unknown_name_gets_a_suggestion_and_a_missing_token_a_warning(caplog) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ConfigError, match="Did you mean 'llama_3'"):
        set_chat_template(tokenizer, "llama3")
    set_chat_template(tokenizer, "chatml")
    assert not caplog.records
    set_chat_template(tokenizer, "gemma")
    assert "<start_of_turn>, <end_of_turn>, which this tokenizer has no tokens for" in caplog.text


@pytest.mark.parametrize("template", ["llama_3", "chatml", "gemma", "phi3"])
def test_generation_stops_where_answers_end(template: str) -> None:
    made = encoder("llama", template, controls=True)
    encoded = made.encode(typed([("what?", "a cat")]))
    assert encoded.input_ids[-1] == made.tokenizer.eos_token_id
    assert encoded.supervised[-1]


def test_the_template_is_kept_with_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = tokenizer_copy("llama")
    set_chat_template(tokenizer, "v1", faithful=True)
    tokenizer.save_pretrained(tmp_path)
    notes = notes_of(AutoTokenizer.from_pretrained(tmp_path).chat_template)
    assert (notes.name, notes.faithful) == ("v1", True)


CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not legacy"])
@pytest.mark.parametrize("template", ["plain", "v1", "llama_2", "mistral"])
def test_faithful_gives_the_ids_and_labels_of_llava(template: str, legacy: bool) -> None:
    """Values of LLaVA's own functions, run on the 32k SentencePiece model with BOS."""
    tokenizer = tokenizer_copy("llama-legacy" if legacy else "llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    set_chat_template(tokenizer, template, faithful=True)
    made = ConversationEncoder(tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tokens_per_image=1)
    cases = [case for case in CASES if (case["template"], case["legacy"]) == (template, legacy)]
    assert cases
    for case in cases:
        value = {"conversations": case["conversations"]}
        if any("<image>" in turn["value"] for turn in case["conversations"]):
            value["image"] = "a.png"
        record = parse_record(value, Where(file=Path("f"), line=1, row=0), PictureRules(folder=Path("/nowhere")))
        encoded = made.encode(record.turns)
        ids = [-200 if token == made.image_token_id else token for token in encoded.input_ids.tolist()]
        assert ids == case["input_ids"]
        assert encoded.supervised.int().tolist() == case["supervised"]


OTHERS = json.loads((GOLDEN.parent / "other_code_bases.json").read_text(encoding="utf-8"))
SCAFFOLD = re.compile(r"(<[|]?[a-z_]+[|]?>|assistant|model|\n)*")


@pytest.mark.parametrize(
    ("code", "template"), sorted({(case["code"], case["template"]) for case in OTHERS}), ids=lambda value: value
)
def test_texts_and_ids_are_those_of_other_code_bases(code: str, template: str) -> None:
    """Values of the code of LLaVA-NeXT, LLaVA++ and TinyLLaVA Factory, run on real vocabularies.

    Their labels hold ours. What LLaVA-NeXT supervises besides is scaffold (role headers, markers of the user's turns).
    LLaVA++ masks samples of several rounds wholly with a tokenizer other than Phi-3's; there is nothing to compare.
    """
    for case in OTHERS:
        if (case["code"], case["template"]) != (code, template):
            continue
        tokenizer = tokenizer_copy(case["tokenizer"])
        controls = [case["eos"]] if "eos" in case else list(CHAT_TEMPLATES[template].controls)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [*controls, "<image>"]}, replace_extra_special_tokens=False
        )
        tokenizer.eos_token = case.get("eos", tokenizer.eos_token)
        if template == "phi3":  # Phi-3's adds none
            tokenizer.add_bos_token = False
        set_chat_template(tokenizer, template, faithful=template in ("gemma", "phi3"))
        made = ConversationEncoder(
            tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tokens_per_image=1
        )
        value = {"conversations": case["conversations"]}
        pictures = sum(turn["value"].count("<image>") for turn in case["conversations"])
        record = parse_record(
            value | ({"image": ["a.png"] * pictures} if pictures else {}),
            Where(file=Path("f"), line=1, row=0), PictureRules(folder=Path("/nowhere")),
        )  # fmt: skip
        messages = [{"role": turn.role, "content": turn.text} for turn in record.turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False).removeprefix(tokenizer.bos_token)
        assert text.rstrip("\n") == case["text"].removeprefix(tokenizer.bos_token).rstrip("\n")
        if "input_ids" not in case:
            continue
        encoded = made.encode(record.turns)
        ids = [-200 if token == made.image_token_id else token for token in encoded.input_ids.tolist()]
        assert ids == case["input_ids"][: len(ids)]
        assert not tokenizer.decode(case["input_ids"][len(ids) :]).strip("\n")  # behind the last end of turn
        if not any(case["supervised"]):
            continue
        ours = encoded.supervised.int().tolist()
        more = [b - a for a, b in zip(ours, case["supervised"], strict=False)]
        assert min(more) == 0
        beyond = tokenizer.decode([token for token, flag in zip(ids, more, strict=False) if flag])
        assert SCAFFOLD.fullmatch(beyond), beyond

"""What is put before an answer in inference stands before supervised answers in training, whatever the data think."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_tokenizer
from tokenizers import AddedToken

from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.config.llava_chat_templates import note_thinking, notes_thinking
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.thinking_form import SAMPLED
from mm_moslora.data.check.check_findings import findings
from mm_moslora.data.check.record_check import check
from mm_moslora.data.training_set import TrainingSet
from tests.data.chat_templates import TEMPLATES, shared_tokenizer, shipped, tokenizer_of
from tests.data.sets import turns

THINKING = [
    "deepseek_r1_distill", "deepseek_r1_distill_training", "deepseekv3", "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5",
    "nemotron_3_nano", "nemotron_3_ultra", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8",
    "qwen3_instruct_2507",
]  # fmt: skip
THOUGHT, PLAIN = "<think>\nIt is round.\n</think>\n\na ball", "a ball"
DATA = {"all": (8, 0), "most": (6, 2), "half": (4, 4), "few": (2, 6), "none": (0, 8)}
"""Records that think, and records that do not."""


def records(thinking: int, plain: int) -> list[dict]:
    answers = [THOUGHT] * thinking + [PLAIN] * plain
    return [
        {"conversations": [{"from": "human", "value": f"what is it, {i}?"}, {"from": "gpt", "value": answer}]}
        for i, answer in enumerate(answers)
    ]


def settled(write: Callable[..., Path], given: list[dict], tokenizer, thinking: str = "auto") -> TrainingSet:
    return TrainingSet(
        [SourceConfig(path=str(write(*given)))], ConversationEncoder(tokenizer, thinking=thinking), None,
        config=DataConfig(), settle=True,
    )  # fmt: skip


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", [*THINKING, *TEMPLATES])
@pytest.mark.parametrize("thinking", ["auto", "always", "never"])
def test_the_prompt_that_is_asked_stands_before_supervised_answers(write, name, kind, thinking) -> None:
    data = settled(write, records(*DATA[kind]), tokenizer_of(name), thinking)
    learned = 0
    for index in range(len(data)):
        record = data.record(index)
        prompt = data.encoder.encode_prompt(record.turns[:-1]).tolist()
        encoded = data.encode(record)
        same = encoded.input_ids[: len(prompt)].tolist() == prompt
        learned += (
            same and not encoded.supervised[: len(prompt)].any() and bool(encoded.supervised[len(prompt) :].all())
        )
    assert 2 * learned >= len(data), (learned, len(data))
    assert learned == len(data) or data.form.mixed


def conversation(*answers: str) -> dict:
    turns = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": ""}] * len(answers)
    return {"conversations": [turn | {"value": answers[i // 2]} if i % 2 else turn for i, turn in enumerate(turns)]}


@pytest.mark.parametrize("answer", [PLAIN, THOUGHT])
@pytest.mark.parametrize("name", [*THINKING, *TEMPLATES])
@pytest.mark.parametrize("thinking", ["auto", "always", "never"])
def test_every_answer_behind_another_prompt_is_counted(write, name, answer, thinking) -> None:
    """Compared with the ids that are asked at each question, and with an answer's block where it is asked for."""
    data = settled(write, [conversation(answer, answer, answer)], tokenizer_of(name), thinking)
    record, encoder, aside = data.record(0), data.encoder, 0
    encoded = data.encode(record)
    ids = encoded.input_ids.tolist()
    for place in (1, 3, 5):
        prompt = encoder.encode_prompt(record.turns[:place]).tolist()
        block = encoder.encode_answer(record.turns[place].text)[:2] if data.form.asks else []
        follows = bool(encoded.supervised[len(prompt)]) and not encoded.supervised[len(prompt) - 1]
        aside += ids[: len(prompt) + len(block)] != prompt + block or not follows
    assert (data.form.answers, data.form.aside) == (3, aside)
    assert data.form.mixed == (aside > 0)


@pytest.mark.parametrize(("name", "thinking", "aside"), [
    ("qwen3", "auto", 8), ("qwen3", "never", 8), ("qwen3", "always", 8), ("qwen3_5_think", "auto", 8),
    ("glm4moe", "auto", 0), ("glm4moe", "always", 8), ("bytes-chatml", "auto", 0), ("bytes-chatml", "always", 0),
])  # fmt: skip
def test_conversations_of_several_turns_are_named(write, name, thinking, aside) -> None:
    file = write(*[conversation(PLAIN, PLAIN, PLAIN)] * 4)
    encoder = ConversationEncoder(tokenizer_of(name), thinking=thinking)
    report = check([SourceConfig(path=str(file))], encoder, config=DataConfig())
    form = settled(write, [conversation(PLAIN, PLAIN, PLAIN)] * 4, tokenizer_of(name), thinking).form
    assert report.form == form
    found = next(item for item in findings(report) if item.name == "thinking")
    assert found.status == ("warn" if aside else "ok")
    assert (f"{aside} of 12 answers are learned in another form" in found.detail) == bool(aside)
    assert repr(encoder.answer_prompt) in found.detail or not aside
    assert ("write records that end with each answer" in found.remedy) == bool(aside)


def test_blocks_of_thinking_are_no_spelt_special_tokens_and_one_answer_for_all_is_doubtful(write) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=True), AddedToken("</think>", special=True)])
    tokenizer.chat_template = shipped("qwen3")
    encoder = ConversationEncoder(tokenizer)
    rows = [*records(4, 0), conversation("a ball")]
    rows[0]["conversations"][0]["value"] = "What is <think>?"
    for spelt, status, given in ((1, "ok", rows), (0, "warn", records(0, 4))):
        report = check([SourceConfig(path=str(write(*given)))], encoder, config=DataConfig())
        assert report.special_text == spelt
        assert [item.status for item in findings(report) if item.name == "answers"] == [status]


def test_few_answers_behind_another_prompt_need_no_warning(write) -> None:
    single = records(0, 499)
    assert not settled(write, [*single, conversation(PLAIN, PLAIN)], tokenizer_of("qwen3")).form.mixed
    assert settled(write, [*single, *[conversation(PLAIN, PLAIN)] * 6], tokenizer_of("qwen3")).form.mixed


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "nemotron_3_nano", "qwen3_5_nothink", "qwen3_8", "lfm2_2_5"])
def test_auto_follows_the_data(write, name) -> None:
    forms = {kind: settled(write, records(*DATA[kind]), tokenizer_of(name)).form for kind in DATA}
    asked = {kind: form.asks for kind, form in forms.items()}
    assert asked == {"all": True, "most": True, "half": False, "few": False, "none": False}
    two_prompts = name != "lfm2_2_5"
    assert {kind for kind, form in forms.items() if form.mixed} == ({"half", "few"} if two_prompts else set())
    assert forms["most"].words == "6 of 8 records end with an answer that thinks; the model is asked to think before " \
        "it answers"  # fmt: skip


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_a_template_that_drops_thinking_is_not_asked_to_think(write, name) -> None:
    form = settled(write, records(8, 0), tokenizer_of(name)).form
    assert (form.thinking, form.asks, form.mixed) == (0, False, False)


def test_thinking_as_plain_text_is_followed_too(write) -> None:
    form = settled(write, records(8, 0), shared_tokenizer("bytes-chatml")).form
    assert (form.asks, form.mixed) == (True, False)


def test_a_choice_of_the_recipe_stands(write) -> None:
    tokenizer = tokenizer_of("qwen3")
    assert not settled(write, records(8, 0), tokenizer, "never").form.asks
    assert settled(write, records(0, 8), tokenizer, "always").form.asks


def test_large_data_are_looked_at_in_all_places(write) -> None:
    """Files are often sorted: the records that think may be the last ones."""
    given = records(0, SAMPLED) + records(2 * SAMPLED, 0)
    data = settled(write, given, tokenizer_of("qwen3"))
    assert data.form.records == SAMPLED
    assert data.form.asks
    assert data.form.thinking == pytest.approx(SAMPLED * 2 / 3, abs=2)


def test_bad_records_are_left_to_the_training_set(write) -> None:
    given = [*records(8, 0), {"conversations": []}]
    data = TrainingSet(
        [SourceConfig(path=str(write(*given)))], ConversationEncoder(tokenizer_of("qwen3")), None,
        config=DataConfig(max_bad_share=0.5), settle=True,
    )  # fmt: skip
    assert (data.form.records, len(data.quarantine)) == (8, 1)


@pytest.mark.parametrize("name", [*THINKING, *TEMPLATES])
def test_the_note_in_a_template_changes_no_token(name) -> None:
    tokenizer = tokenizer_of(name)
    if tokenizer.chat_template is None:
        return
    before = ConversationEncoder(tokenizer)
    noted = tokenizer_of(name) if name in THINKING else None
    source = note_thinking(note_thinking(tokenizer.chat_template))
    assert notes_thinking(source)
    assert not notes_thinking(tokenizer.chat_template)
    messages = [{"role": "user", "content": "what is it?"}]
    for prompt in (True, False):
        texts = [
            tokenizer.apply_chat_template(messages, chat_template=one, tokenize=False, add_generation_prompt=prompt)
            for one in (tokenizer.chat_template, source)
        ]
        assert texts[0] == texts[1]
    if noted is not None:
        noted.chat_template = source
        assert ConversationEncoder(noted).fingerprint() == before.fingerprint()  # caches of tokens stay valid


def test_a_request_may_ask_otherwise() -> None:
    encoder = ConversationEncoder(tokenizer_of("qwen3_5_think"), thinking="always")
    asked = {
        form: encoder.tokenizer.decode(encoder.encode_prompt(turns("what?"), thinking=form)) for form in (True, False)
    }
    assert asked[True].endswith("assistant\n<think>\n")
    assert asked[False].endswith("assistant\n<think>\n\n</think>\n\n")
    assert encoder.opened() == encoder.opened(True) == "<think>\n"
    assert encoder.opened(False) == ""
    assert encoder.has_switch
    assert ConversationEncoder(tokenizer_of("qwen3"), thinking="always").opened() == ""
    assert not ConversationEncoder(tokenizer_of("lfm2_2_5")).has_switch


@pytest.mark.parametrize("answers", [(PLAIN,), (THOUGHT,), (THOUGHT, PLAIN), (PLAIN, THOUGHT)])
@pytest.mark.parametrize("name", [*THINKING, *TEMPLATES])
def test_thinking_that_is_masked_stands_in_the_record_and_is_not_learned(write, name, answers) -> None:
    """The tokens, the prompts and the form are those of `always`; the answer and its end alone are learned."""
    path = write(conversation(*answers))  # once: a file that is written again ends its reading
    always, masked = (settled(lambda *_: path, [], tokenizer_of(name), thinking) for thinking in ("always", "mask"))
    encoded, expected = masked.encode(masked.record(0)), always.encode(always.record(0))
    assert encoded.input_ids.tolist() == expected.input_ids.tolist()
    assert (encoded.thoughts, encoded.dropped_thoughts) == (expected.thoughts, expected.dropped_thoughts)
    # An empty block that the template itself writes before an earlier answer is in its place, and need not be learned.
    assert replace(masked.form, aside=always.form.aside, earlier=always.form.earlier) == always.form
    assert masked.form.aside <= always.form.aside
    tokenizer, ids = masked.encoder.tokenizer, encoded.input_ids
    text = tokenizer.decode(ids[encoded.supervised])
    assert text.count("a ball") == len(answers)
    assert "think" not in text
    assert "It is round" not in text
    prompt = masked.encoder.encode_prompt(masked.record(0).turns[:1])
    assert prompt.tolist() == always.encoder.encode_prompt(always.record(0).turns[:1]).tolist()


@pytest.mark.parametrize(("name", "thinking", "answers", "refused"), [
    ("qwen3", "never", ["<think>a</think>"], True), ("qwen3", "mask", ["<think>a</think>"], True),
    ("qwen3", "always", ["<think>a</think>"], False), ("qwen3", "always", ["<think></think>\n"], True),
    ("qwen3", "auto", ["<think>a</think>", PLAIN], True), ("deepseek_r1_distill", "auto", ["<think>a</think>"], True),
    ("bytes-chatml", "never", ["<think>a</think>"], True), ("bytes-chatml", "mask", ["<think>a</think>\n"], True),
    ("bytes-chatml", "auto", ["<think>a</think>"], False), ("bytes-chatml", "auto", ["<think> </think>"], True),
])  # fmt: skip
def test_an_answer_whose_thinking_is_not_learned_has_a_text(write, name, thinking, answers, refused) -> None:
    """The model would learn to end its turn at once; prompts with such an answer are still written."""
    encoder = ConversationEncoder(tokenizer_of(name), thinking=thinking)
    rows = [conversation(*answers), conversation(PLAIN)]
    report = check([SourceConfig(path=str(write(*rows)))], encoder, config=DataConfig())
    assert dict(report.bad) == ({"EMPTY_ANSWER": 1} if refused else {})
    assert all("conversations[1] is thinking alone" in str(fault) for fault in report.faults)
    assert len(encoder.encode_prompt(turns("what?", answers[0], "and?")))
    rows[0]["conversations"][1]["loss"] = False  # context
    report = check([SourceConfig(path=str(write(*rows)))], encoder, config=DataConfig())
    assert set(report.bad) <= {"BAD_WEIGHT"}

"""Weights of answers: read under every name, carried to tokens, batches and the cache, refused where wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mm_moslora.batch import Batch
from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, TooLong
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.data.chat.thinking_form import settled
from mm_moslora.data.check.data_views import RecordSample, page, view_record
from mm_moslora.data.check.record_check import check
from mm_moslora.data.record_examples import encode_record
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.open_sources import open_sources
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.utils.errors import ConfigError, DataError
from tests.data.chat_templates import shared_tokenizer
from tests.data.sets import parsed


def talk(*answers: dict, **record) -> dict:
    """A conversation whose answers are `one`, `two`, ..., with these further keys."""
    names = ("one", "two", "three")
    turns = [
        turn
        for name, answer in zip(names, answers, strict=False)
        for turn in ({"role": "user", "content": f"{name}?"}, {"role": "assistant", "content": name} | answer)
    ]
    return {"messages": turns} | record


def weights(value: dict) -> list[float]:
    return [turn.weight for turn in parsed(value).turns if turn.role == "assistant"]


@pytest.fixture(scope="module")
def encoder() -> ConversationEncoder:
    return ConversationEncoder(shared_tokenizer("bytes-chatml"))


def learned(encoder: ConversationEncoder, encoded) -> str:
    return str(encoder.tokenizer.decode(encoded.input_ids[encoded.supervised]))


@pytest.mark.parametrize("key", ["loss", "loss_scale", "loss_weight", "train", "training", "weight"])
@pytest.mark.parametrize(("value", "weight"), [
    (False, 0), (True, 1), (0, 0), (1, 1), (0.5, 0.5), (2, 2), ("false", 0), ("True", 1), ("0.25", 0.25),
    ("default", 1), (None, 1), ("", 1),
])  # fmt: skip
def test_a_turn_names_its_weight(key: str, value: object, weight: float) -> None:
    assert weights(talk({key: value}, {})) == [weight, 1]
    llava = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "a", key: value}]
    more = [{"from": "human", "value": "b?"}, {"from": "gpt", "value": "b"}]
    record = parsed({"conversations": llava + more})
    assert record.turns[1].weight == weight
    assert record.ignored == ()
    pairs = [{"user": "a?", "assistant": "a", key: value}, {"user": "b?", "assistant": "b"}]
    assert weights({"texts": pairs}) == [weight, 1]


@pytest.mark.parametrize("value", [
    -1, -0.5, float("nan"), float("inf"), 1e30, 1e-30, "react", "-1", "nan", [0.5], {"a": 1}, 10**400,
])  # fmt: skip
def test_other_values_are_one_named_fault(value: object) -> None:
    for record in (talk({"weight": value}, {}), {"texts": [{"user": "a?", "assistant": "a", "weight": value}]}):
        with pytest.raises(RecordError, match=r"^BAD_WEIGHT: .*weight: is .*; write true, false, 0 .* to 1e\+06"):
            parsed(record)


def test_two_keys_must_agree() -> None:
    assert weights(talk({"loss": True, "weight": 0.5}, {"loss": False, "weight": 0, "train": 1})) == [0.5, 0]
    with pytest.raises(RecordError, match=r"BAD_WEIGHT: .*\[1\]\.weight: is 0\.5 beside 0; write one weight"):
        parsed(talk({"loss": False, "weight": 0.5}, {}))


def test_a_record_that_teaches_nothing_is_a_fault() -> None:
    with pytest.raises(RecordError, match=r"BAD_WEIGHT: .*all answers weigh 0"):
        parsed(talk({"loss": False}, {"weight": 0}))
    with pytest.raises(RecordError, match=r"BAD_WEIGHT: .*the last answer weighs 0, and data\.supervise is last"):
        parsed(talk({}, {"loss": False})).learned("last")


def test_an_answer_that_weighs_nothing_is_context(encoder: ConversationEncoder) -> None:
    plain, masked = parsed(talk({}, {}, {})), parsed(talk({}, {"loss": False}, {}))
    whole, encoded = encoder.encode(plain.turns), encoder.encode(masked.turns)
    assert encoded.input_ids.tolist() == whole.input_ids.tolist()
    assert learned(encoder, encoded) == "one<|im_end|>three<|im_end|>"
    assert encoded.weights is None
    last = encoder.encode(plain.learned("last"))
    assert last.input_ids.tolist() == whole.input_ids.tolist()
    assert learned(encoder, last) == "three<|im_end|>"


def test_tokens_have_the_weight_of_their_answer(encoder: ConversationEncoder) -> None:
    encoded = encoder.encode(parsed(talk({"weight": 0.5}, {"loss": 0}, {})).turns)
    assert encoded.weights is not None
    assert torch.equal(encoded.supervised, encoded.weights > 0)
    for weight, text in ((0.5, "one<|im_end|>"), (1.0, "three<|im_end|>")):
        assert encoder.tokenizer.decode(encoded.input_ids[encoded.weights == weight]) == text


def test_the_whole_text_leaves_out_what_weighs_nothing(encoder: ConversationEncoder) -> None:
    encoded = encoder.encode(parsed(talk({"loss": False}, {"weight": 2})).turns, whole=True)
    assert encoded.weights is not None
    assert encoder.tokenizer.decode(encoded.input_ids[1:][~encoded.supervised[1:]]) == "one<|im_end|>"
    assert not encoded.supervised[0]
    assert encoder.tokenizer.decode(encoded.input_ids[encoded.weights == 2]) == "two<|im_end|>"
    with pytest.raises(ConfigError, match=r"data\.train_on is 'all' and data\.supervise 'last'"):
        DataConfig(train_on="all", supervise="last")


def test_a_record_that_loses_what_it_teaches_does_not_fit(encoder: ConversationEncoder) -> None:
    record = parsed(talk({"loss": False}, {}, {}))
    length = len(encoder.encode(record.turns).input_ids)
    assert learned(encoder, encoder.encode(record.turns, max_length=length - 1)) == "two<|im_end|>"
    first = len(encoder.encode(parsed(talk({})).turns).input_ids)
    for truncate in (False, True):
        with pytest.raises(TooLong, match="no learned answer fits"):
            encoder.encode(record.turns, max_length=first, truncate=truncate)
        with pytest.raises(RecordError, match="TOO_LONG"):
            encode_record(parsed(talk({}, {})), encoder, None, config=DataConfig(max_length=first, supervise="last"))


def test_what_is_not_learned_decides_no_form_of_thinking(encoder: ConversationEncoder, tmp_path: Path) -> None:
    thinking = {"content": "<think>\na\n</think>\n\nb"}
    path = tmp_path / "data.jsonl"
    values = [talk({}, thinking | {"loss": False}), *[talk({}, {"loss": 0.5})] * 2]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    files = open_sources([SourceConfig(path=str(path))])
    form = settled(encoder, files)[1]
    assert (form.thinking, form.records, form.answers) == (0, 3, 5)
    assert settled(encoder, files, "last")[1].answers == 2


def examples(path: Path, encoder: ConversationEncoder, **options) -> list:
    config = DataConfig(max_bad_share=0.5, **options)
    data = TrainingSet([SourceConfig(path=str(path))], encoder, None, config=config)
    return [data.load(index) for index in data.usable]


def equal(one, other) -> bool:
    same = torch.equal(one.input_ids, other.input_ids) and torch.equal(one.supervised, other.supervised)
    if one.weights is None or other.weights is None:
        return same and one.weights is other.weights
    return same and torch.equal(one.weights, other.weights)


VALUES = [talk({}, {}), talk({"weight": 0.5}, {}), talk({"loss": False}, {}), talk({"weight": -1}), talk({"weight": 3})]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in VALUES))
    return path


@pytest.mark.parametrize("supervise", ["all", "last"])
def test_the_cache_keeps_weights(path: Path, encoder: ConversationEncoder, supervise: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    plain = examples(path, encoder, supervise=supervise)
    assert len(plain) == 4
    for _ in range(2):
        assert all(map(equal, plain, examples(path, encoder, supervise=supervise, cache=cache)))


def test_other_answers_learned_make_another_cache(path: Path, encoder: ConversationEncoder, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    everything = examples(path, encoder, cache=cache)
    last = examples(path, encoder, cache=cache, supervise="last")
    assert len([item for item in Path(cache).iterdir() if item.is_dir()]) == 2
    assert not equal(everything[0], last[0])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2)])
def test_a_batch_holds_the_weights_of_its_targets(path: Path, encoder: ConversationEncoder, order) -> None:
    chosen = [examples(path, encoder)[index] for index in order]
    batch = Batch.from_examples(chosen)
    expected = [
        weight
        for example in chosen
        for weight in (example.supervised.float() if example.weights is None else example.weights)[1:].tolist()
        if weight
    ]
    assert batch.loss_weight == pytest.approx(sum(expected))
    if order == (0, 2):
        assert batch.weights is None
        assert batch.loss_weight == batch.supervised_tokens
    else:
        assert batch.weights is not None
        assert batch.weights.tolist() == expected
        assert batch.to("cpu").loss_weight == batch.loss_weight


def test_labels_cannot_hold_weights(path: Path, encoder: ConversationEncoder) -> None:
    items = examples(path, encoder)
    assert int((items[2].labels >= 0).sum()) == int(items[2].supervised.sum())
    with pytest.raises(DataError, match="which labels cannot hold"):
        [item.labels for item in items]


def test_check_counts_and_view_shows_them(path: Path, encoder: ConversationEncoder) -> None:
    sources = [SourceConfig(path=str(path))]
    report = check(sources, encoder, config=DataConfig())
    assert (report.answers, report.context_answers, report.weighed) == (6, 1, 2)
    assert dict(report.bad) == {"BAD_WEIGHT": 1}
    last = check(sources, encoder, config=DataConfig(supervise="last"))
    assert (last.answers, last.context_answers) == (4, 3)
    record = parsed(talk({"weight": 0.5}, {"loss": False}, {}))
    encoded = encoder.encode(record.turns)
    shown = Console(width=200, record=True)
    shown.print(view_record(record, encoded, encoder))
    assert "weights 0.5, 1" in shown.export_text()
    html = page([RecordSample(record, encoded)], encoder, title="a")
    spans = [line for line in html.split("<span") if ', weight 0.5"' in line]
    assert len(spans) == int((encoded.weights == 0.5).sum())
    assert all('class="s' in line for line in spans)


def test_a_turn_of_a_user_keeps_no_weight() -> None:
    record = parsed(
        {"messages": [{"role": "user", "content": "a?", "weight": -1}, {"role": "assistant", "content": "a"}]}
    )
    assert record.turns == (Turn(role="user", text="a?"), Turn(role="assistant", text="a"))

"""Plain texts: their tokens, what is refused; records that do not fit; the loss on the whole text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mm_moslora.config import DataConfig, load_recipe
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.thinking_form import settled
from mm_moslora.data.quarantine import Quarantine
from mm_moslora.data.record_examples import encode_record
from mm_moslora.data.record_faults import Code, RecordError, Where
from mm_moslora.utils.errors import ConfigError, DataError
from tests.data.sets import chatml_encoder, make_set, parsed


def shown(record: Record, **data: object) -> tuple[str, str]:
    """All tokens as text, and the supervised ones."""
    encoder = chatml_encoder()
    encoded = encode_record(record, encoder, None, config=DataConfig(**data))
    ids = encoded.input_ids
    return encoder.tokenizer.decode(ids), encoder.tokenizer.decode(ids[encoded.supervised])


def test_a_text_alone_is_a_document() -> None:
    assert shown(parsed({"text": "Once."})) == ("Once.<|im_end|>", "Once.<|im_end|>")
    assert shown(parsed({"text": "A <image> dog."}))[1] == "A <image> dog.<|im_end|>", "what is typed stays text"
    with pytest.raises(RecordError, match=r"NO_TURNS.*no text to learn from"):
        parsed({"text": " "})
    with pytest.raises(RecordError, match=r"NO_TURNS.*write conversations"):
        parsed({"text": "Once.", "image": "a.png"})
    with pytest.raises(RecordError, match=r"UNFOLLOWED_KEY.*system"):
        parsed({"text": "Once.", "system": "Be kind."})
    with pytest.raises(RecordError, match=r"BAD_TURN.*texts\[0\]: is a string"):
        parsed({"texts": ["A cat.", None], "images": [None, "a.png"]})


def test_a_long_text_is_refused_or_cut() -> None:
    with pytest.raises(RecordError, match=r"TOO_LONG.*no text fits"):
        shown(parsed({"text": "a long text"}), max_length=8)
    assert shown(parsed({"text": "a long text"}), max_length=8, too_long="truncate") == ("a long te", "a long te")


def test_texts_train_beside_conversations_and_do_not_decide_on_thinking(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    talk = {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]}
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in ({"text": "Once."}, talk)))
    data = make_set(path)
    assert list(data.lengths) == [data.load(number).length for number in range(2)]
    assert settled(chatml_encoder(), data.files)[1].records == 1


def _fault(code: Code) -> RecordError:
    return Where(file=Path("a.json"), line=1, row=0, id="1").error(code, "conversations", "too long", "shorten it")


@pytest.mark.parametrize("on_bad", ["quarantine", "error"])
def test_records_that_are_dropped_do_not_stop_a_run_and_are_counted(on_bad: str) -> None:
    config = DataConfig(too_long="drop", max_bad_share=0.1, on_bad=on_bad)
    kept = Quarantine(None, 10, config)
    for index in range(5):
        kept.add(index, _fault(Code.TOO_LONG))
    kept.close()
    assert kept.codes == {"TOO_LONG": 5}
    assert 3 in kept
    refused = Quarantine(None, 10, replace(config, too_long="refuse", on_bad="quarantine"))
    for index in range(5):
        refused.add(index, _fault(Code.TOO_LONG))
    with pytest.raises(DataError, match=r"more than data\.max_bad_share.*data\.too_long"):
        refused.close()


def test_the_whole_text_needs_a_language_model_alone() -> None:
    with pytest.raises(ConfigError, match=r"data\.train_on.*model\.vision"):
        load_recipe("llama3_8b_clip_moslora", ["data.train_on=all"])
    with pytest.raises(ConfigError, match=r"data\.train_on.*model\.vlm"):
        load_recipe("commonsense_170k", ["model.language=null", "model.chat_template=null", "model.vlm=some/vlm"])
    data = load_recipe("commonsense_170k").data
    assert (data.too_long, data.train_on, data.order, data.max_length) == ("truncate", "all", "random", 256)

"""Plain texts: their tokens, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mm_moslora.config import DataConfig
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.thinking_form import settled
from mm_moslora.data.record_examples import encode_record
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.record_file import RecordFile
from tests.data.sets import chatml_encoder, make_set


@pytest.fixture
def read(tmp_path: Path):
    def record(value: dict[str, object]) -> Record:
        (tmp_path / "records.jsonl").write_text(json.dumps(value) + "\n")
        return RecordFile(tmp_path / "records.jsonl")[0]

    return record


def shown(record: Record, **data: object) -> tuple[str, str]:
    """All tokens as text, and the supervised ones."""
    encoder = chatml_encoder()
    encoded = encode_record(record, encoder, None, config=DataConfig(**data))
    ids = encoded.input_ids
    return encoder.tokenizer.decode(ids), encoder.tokenizer.decode(ids[encoded.supervised])


def test_a_text_alone_is_a_document(read) -> None:
    assert shown(read({"text": "Once."})) == ("Once.<|im_end|>", "Once.<|im_end|>")
    assert shown(read({"text": "A <image> dog."}))[1] == "A <image> dog.<|im_end|>", "what is typed stays text"
    with pytest.raises(RecordError, match=r"NO_TURNS.*no text to learn from"):
        read({"text": " "})
    with pytest.raises(RecordError, match=r"NO_TURNS.*write conversations"):
        read({"text": "Once.", "image": "a.png"})
    with pytest.raises(RecordError, match=r"UNFOLLOWED_KEY.*system"):
        read({"text": "Once.", "system": "Be kind."})
    with pytest.raises(RecordError, match=r"BAD_TURN.*texts\[0\]: is a string"):
        read({"texts": ["A cat.", None], "images": [None, "a.png"]})


def test_a_long_text_is_refused_or_cut(read) -> None:
    with pytest.raises(RecordError, match=r"TOO_LONG.*no text fits"):
        shown(read({"text": "a long text"}), max_length=8)
    assert shown(read({"text": "a long text"}), max_length=8, too_long="truncate") == ("a long te", "a long te")


def test_texts_train_beside_conversations_and_do_not_decide_on_thinking(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    talk = {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]}
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in ({"text": "Once."}, talk)))
    data = make_set(path)
    assert list(data.lengths) == [data.load(number).length for number in range(2)]
    assert settled(chatml_encoder(), data.files)[1].records == 1

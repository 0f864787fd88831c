"""Documents, in which texts and pictures alternate: their forms, their tokens, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vlms import make_vlm

from mm_moslora.config import DataConfig, ModelConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Record, Turn
from mm_moslora.data.chat.thinking_form import settled
from mm_moslora.data.record_examples import encode_record
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.record_file import RecordFile
from mm_moslora.models.assembly import load_parts
from tests.data.sets import chatml_encoder, make_set, picture

OBELICS = {"texts": ["A cat.", None, "A <image> dog.", "End."], "images": [None, "a.png", None, None]}
MMC4 = {
    "text_list": ["A cat.", "A <image> dog.", "End."],
    "image_info": [{"image_name": "a.png", "raw_url": "https://x/y.png", "matched_text_index": 1}],
}


@pytest.fixture
def read(tmp_path: Path):
    def record(value: dict[str, object]) -> Record:
        (tmp_path / "records.jsonl").write_text(json.dumps(value) + "\n")
        return RecordFile(tmp_path / "records.jsonl")[0]

    return record


def shown(record: Record, **data: object) -> tuple[str, str]:
    """All tokens as text, and the supervised ones."""
    encoder = chatml_encoder()
    encoded = encode_record(record, encoder, config=DataConfig(**data), vision=True)
    ids = encoded.input_ids
    return encoder.tokenizer.decode(ids), encoder.tokenizer.decode(ids[encoded.supervised])


@pytest.mark.parametrize("value", [OBELICS, MMC4, OBELICS | {"texts": ["A cat.", "", "A <image> dog.", "End."]}])
def test_texts_are_learned_with_pictures_in_place(read, value: dict[str, object]) -> None:
    record = read({"id": 3} | value)
    assert [Path(name).name for name in record.image_names] == ["a.png"]
    whole, learned = shown(record)
    assert whole == "A cat." + 4 * "<image>" + "A <image> dog.\n\nEnd.<|im_end|>"
    assert learned == "A cat.A <image> dog.\n\nEnd.<|im_end|>"
    typed = chatml_encoder().image_token_id
    assert (chatml_encoder().encode(record.turns).input_ids == typed).sum() == 4, "what is typed stays text"


def test_a_text_alone_is_a_document(read) -> None:
    assert shown(read({"text": "Once."})) == ("Once.<|im_end|>", "Once.<|im_end|>")
    assert shown(read({"texts": "Once."}))[0] == "Once.<|im_end|>"
    with pytest.raises(RecordError, match=r"NO_TURNS.*write conversations"):
        read({"text": "Once.", "image": "a.png"})


def test_a_long_document_ends_with_a_whole_text(read) -> None:
    record = read({"texts": ["one", None, "two", None, "three"], "images": [None, "a.png", None, "b.png", None]})
    encoder, length = chatml_encoder(), 3 + 4 + 3 + 4 + 2
    encoded = encode_record(record, encoder, config=DataConfig(max_length=length), vision=True)
    assert encoder.tokenizer.decode(encoded.input_ids) == "one" + 4 * "<image>" + "two"
    assert (encoded.images, encoded.dropped_turns) == (1, 1)
    with pytest.raises(RecordError, match=r"TOO_LONG.*no text fits"):
        shown(read({"text": "a long text"}), max_length=8)
    assert shown(read({"text": "a long text"}), max_length=8, too_long="truncate") == ("a long te", "a long te")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"texts": ["a", None], "images": [None]}, "IMAGE_COUNT.*images: has 1 items, and texts 2"),
        ({"texts": ["a"], "images": "a.png"}, "IMAGE_COUNT.*is a string; write a list beside texts"),
        (MMC4 | {"image_info": [{"image_name": "a.png", "matched_text_index": 3}]}, "IMAGE_COUNT.*3, and there are 3"),
        (MMC4 | {"image_info": [{"matched_text_index": 1}]}, "BAD_IMAGE_NAME"),
        ({"texts": ["a", 3]}, r"BAD_TEXT.*texts\[1\]"),
        ({"texts": [" ", None], "images": [None, "a.png"]}, "NO_TURNS.*no text to learn from"),
        ({"texts": ["a"], "images": ["/etc/passwd"]}, "PATH_ESCAPES"),
        ({"texts": ["a"], "images": ["https://x/a.png"]}, "BAD_IMAGE_NAME"),
        ({"texts": ["a"], "images": [None], "objects": {"bbox": [[1, 2, 3, 4]]}}, "UNFOLLOWED_KEY"),
        ({"texts": ["a"], "system": "Be kind."}, "UNFOLLOWED_KEY.*system"),
    ],
)
def test_what_is_no_document_is_one_fault(read, value: dict[str, object], words: str) -> None:
    with pytest.raises(RecordError, match=words):
        read(value)


def test_documents_train_beside_conversations_and_do_not_decide_on_thinking(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture())
    talk = {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]}
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in (OBELICS, talk, MMC4)))
    data = make_set(path)
    assert [example.pictures != [] for example in (data.load(number) for number in range(3))] == [True, False, True]
    assert list(data.lengths) == [data.load(number).length for number in range(3)]
    assert settled(chatml_encoder(), data.files)[1].records == 1


def test_a_ready_made_model_writes_its_own_text_around_a_picture(tmp_path: Path) -> None:
    model = load_parts(ModelConfig(vlm=str(make_vlm(tmp_path, "qwen2_vl"))))
    encoder, (placeholders,) = ConversationEncoder.of(model), model.image_processing.placeholders([(28, 28)])
    document = Turn(role="document", text="one<image>two", offsets=(3,))
    encoded = encoder.encode([document], pictures=[placeholders])
    whole, learned = (
        encoder.tokenizer.decode(ids) for ids in (encoded.input_ids, encoded.input_ids[encoded.supervised])
    )
    pads = "<|image_pad|>" * len(placeholders)
    assert whole == f"one<|vision_start|>{pads}<|vision_end|>two<|im_end|>"
    assert learned == "onetwo<|im_end|>"

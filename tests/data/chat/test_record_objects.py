"""Boxes and points of records: both forms are read, placeholders filled in every family's form, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mm_moslora.batch import PictureFrame
from mm_moslora.data.boxes.box_forms import FORMS, SPECIAL, read_boxes
from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.record_examples import written
from mm_moslora.data.record_faults import Code, RecordError, Where
from mm_moslora.utils.errors import ConfigError

SIZE = (800, 400)
BOX = [80, 100, 400, 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", SIZE).save(path / "a.png")
    Image.new("RGB", (100, 200)).save(path / "b.png")
    turned = Image.new("RGB", (400, 800))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(path / "turned.jpg", exif=exif)
    return path


def processing(form: str | None, **frame: object) -> SimpleNamespace:
    """An image processing with this form, that sees pictures as they are or in this frame."""
    made = PictureFrame(**frame) if frame else None
    return SimpleNamespace(boxes=form, frame=lambda size: made or PictureFrame(width=size[0], height=size[1]))


def record(folder: Path, objects: object, answer: str = "<bbox>", question: str = "where?", images: object = "a.png"):
    count = 1 if isinstance(images, str) else len(images)
    talk = [
        {"role": "user", "content": "<image>" * count + question},
        {"role": "assistant", "content": answer},
    ]
    value = {"messages": talk, "images": images, "objects": objects}
    return parse_record(value, Where(file=folder / "d.jsonl", line=1, row=0), PictureRules(folder=folder))


def answer_of(folder: Path, form: str, *args: object, **more: object) -> str:
    text = written(record(folder, *args, **more), processing(form)).turns[-1].text
    return text.replace(SPECIAL[0], "").replace(SPECIAL[1], "")


WRITTEN = {
    "qwen3_vl": "dog at [100, 250, 500, 750]",
    "qwen2_5_vl": "dog at [80, 100, 400, 300]",
    "qwen2_vl": "<|object_ref_start|>dog<|object_ref_end|> at <|box_start|>(100,250),(500,750)<|box_end|>",
    "internvl": "<ref>dog</ref> at <box>[[100, 250, 500, 750]]</box>",
    "paligemma": "dog at <loc0256><loc0102><loc0767><loc0512>",
}
LISTED = {
    "qwen3_vl": '[{"bbox_2d": [100, 250, 500, 750], "label": "dog"}, {"point_2d": [500, 500], "label": "a \\"cat\\""}]',
    "qwen2_vl": "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(100,250),(500,750)<|box_end|>"
    '<|object_ref_start|>a "cat"<|object_ref_end|><|box_start|>(500,500)<|box_end|>',
    "internvl": '<ref>dog</ref><box>[[100, 250, 500, 750]]</box>\n<ref>a "cat"</ref><box>[[500, 500]]</box>',
    "paligemma": '<loc0256><loc0102><loc0767><loc0512> dog ; <loc0512><loc0512> a "cat"',
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_written_and_read_back(folder: Path, form: str) -> None:
    swift = {"ref": ["dog"], "bbox": [BOX]}
    own = [{"label": "dog", "bbox": BOX, "image_id": 0}]
    shares = {"ref": ["dog"], "bbox": [[0.1, 0.25, 0.5, 0.75]], "bbox_type": "norm1", "image_id": [0]}
    for objects in (swift, own, shares, json.dumps(swift)):
        assert answer_of(folder, form, objects, "<ref-object> at <bbox>") == WRITTEN[form]
    plain = WRITTEN[form].replace("<|", "<").replace("|>", ">")
    plain = plain.replace("<box_start>", "").replace("<box_end>", "").replace("<box>", "").replace("</box>", "")
    for text in (WRITTEN[form], plain):  # with special tokens, and without, as answers are decoded
        (box,) = read_boxes(f"Here: {text}.", processing(form), SIZE)
        assert box.numbers == pytest.approx(BOX, abs=1)


@pytest.mark.parametrize("form", LISTED)
def test_a_list_of_objects_has_labels_both_ways(folder: Path, form: str) -> None:
    objects = [{"label": "dog", "bbox": BOX}, {"label": 'a "cat"', "point": [400, 200]}]
    text = answer_of(folder, form, objects, "<objects>")
    assert text == LISTED[form]
    dog, cat = read_boxes(text, processing(form), SIZE)
    assert (dog.label, cat.label) == ("dog", 'a "cat"')
    assert cat.numbers == pytest.approx([400, 200], abs=1)


@pytest.mark.parametrize("label", ["a {c}", "}", "{", 'a "b" {c} ;', "back\\"])
def test_a_label_may_hold_what_json_is_written_with(folder: Path, label: str) -> None:
    objects = [{"label": label, "bbox": BOX}, {"label": "dog", "bbox": [1, 2, 300, 400]}]
    text = answer_of(folder, "qwen3_vl", objects, "{here} <objects>")
    assert [box.label for box in read_boxes(text, processing("qwen3_vl"), SIZE)] == [label, "dog"]
    (box,) = read_boxes(json.dumps({"label": label, "bbox_2d": BOX}), processing("qwen3_vl"), SIZE)
    assert box.label == label


def test_each_box_belongs_to_its_picture_and_questions_are_filled_first(folder: Path) -> None:
    objects = {"ref": ["<bbox>", "b"], "bbox": [BOX, [50, 100, 100, 200]], "image_id": [0, 1]}
    made = written(
        record(folder, objects, "<bbox> is <ref-object>", "<bbox> or <ref-object>?", ["a.png", "b.png"]),
        processing("qwen3_vl"),
    )
    assert made.turns[0].parts() == ["", "", "[100, 250, 500, 750] or <bbox>?"]
    assert made.turns[1].text == "[500, 500, 1000, 1000] is b"
    assert made.objects is None


def test_boxes_count_pixels_of_the_upright_picture(folder: Path) -> None:
    assert answer_of(folder, "qwen3_vl", {"bbox": [BOX]}, images="turned.jpg") == "[100, 250, 500, 750]"


def test_a_box_that_is_cropped_away_is_a_fault_and_a_cut_one_is_clipped(folder: Path) -> None:
    middle = processing("qwen3_vl", width=400, height=400, offset=(-200, 0))
    with pytest.raises(RecordError, match=r"BOX_CROPPED: .* objects.bbox\[0\]: \[0, 0, 300, 100\]: 33% of it") as gone:
        written(record(folder, {"bbox": [[0, 0, 300, 100]]}), middle)
    assert gone.value.code is Code.BOX_CROPPED
    with pytest.raises(RecordError, match="BOX_CROPPED"):
        written(record(folder, [{"point": [190, 10]}]), middle)
    assert written(record(folder, {"bbox": [[180, 0, 300, 100]]}), middle).turns[1].text == "[0, 0, 250, 250]"
    (box,) = read_boxes("[0, 0, 250, 250]", middle, SIZE)
    assert box.numbers == (200, 0, 300, 100)


@pytest.mark.parametrize(
    ("objects", "answer", "message"),
    [
        ({"bbox": [[80, 100, 900, 300]]}, "<bbox>", "lies outside of its picture (pixels; its picture has 800 x 400"),
        ({"bbox": [[-5, 100, 90, 300]]}, "<bbox>", "lies outside"),
        ({"bbox": [[0.1, 0.2, 1.5, 0.9]], "bbox_type": "norm1"}, "<bbox>", "lies outside of its picture (shares"),
        ({"bbox": [[400, 300, 80, 100]]}, "<bbox>", "reversed corners, or no area"),
        ({"bbox": [[80, 100, 80, 300]]}, "<bbox>", "no area"),
        ({"bbox": [BOX], "image_id": [1]}, "<bbox>", "names picture 1; the record has 1"),
        ({"bbox": [BOX], "image_id": [0, 0]}, "<bbox>", "has 2 numbers, and there are 1 boxes"),
        ([{"point": [1, 2], "image_id": -1}], "<bbox>", "is -1"),
        ({"bbox": [[1, float("nan"), 3, 4]]}, "<bbox>", "is [1, nan, 3, 4]"),
        ({"bbox": [[1, float("inf")]]}, "<bbox>", "is [1, inf]"),
        ({"bbox": [[1, 10**400]]}, "<bbox>", "finite numbers"),
        ({"bbox": [[1, 2, 3]]}, "<bbox>", "has 3 values; write x1, y1, x2, y2 or x, y"),
        ({"bbox": [["1", 2]]}, "<bbox>", "is ['1', 2]"),
        ({"bbox": [[True, 2]]}, "<bbox>", "as numbers"),
        ({"bbox": [1, 2, 3, 4]}, "<bbox>", "is 1"),
        ([{"point": [1, 2, 3, 4]}], "<bbox>", "has 4 values; write x, y"),
        ([{"bbox": BOX, "point": [1, 2]}], "<bbox>", "has a bbox and a point"),
        ([{"label": "dog"}], "<bbox>", "has neither bbox nor point"),
        ({"bbox": [BOX], "categories": [1]}, "<bbox>", "has 'categories'"),
        ({"bbox": [BOX], "bbox_type": "xywh"}, "<bbox>", "is 'xywh'"),
        ({"bbox": [BOX], "ref": [""]}, "<bbox>", "is empty"),
        ({"bbox": [BOX], "ref": [7]}, "<bbox>", "text is a number"),
        ({"bbox": [BOX, BOX]}, "<bbox>", "1 <bbox> for 2"),
        ({"bbox": [BOX]}, "<bbox> <bbox>", "2 <bbox> for 1"),
        ({"bbox": [BOX]}, "no place", "0 <bbox> for 1"),
        ({"bbox": [BOX], "ref": ["a"]}, "<ref-object> <ref-object> <bbox>", "2 <ref-object> for 1"),
        ({"bbox": [], "ref": []}, "<bbox>", "1 <bbox> for 0"),
        ([], "<ref-object>", "1 <ref-object> for 0"),
        (None, "<bbox>", "is missing; the texts have <bbox>"),
        (None, "<objects>", "is missing; the texts have <objects>"),
        ("null", "<objects>", "is missing"),
        (None, "<ref-object>", "is missing; the texts have <ref-object>"),
        ({"bbox": [[0.1, 0.25, 0.5, 0.75]]}, "<bbox>", "holds shares of the picture's sides, and bbox_type is not"),
        ([{"bbox": BOX}, {"bbox": [0, 0, 1, 0.5]}], "<objects>", "[0, 0, 1, 0.5] holds shares"),
        ([{"point": [0.5, 0.5]}], "<bbox>", "bbox_type: norm1"),
        ("{nonsense", "<bbox>", "is no JSON"),
        (7, "<bbox>", "is a number"),
        ({"bbox": [BOX]}, f"{SPECIAL[0]}<|im_end|>{SPECIAL[1]} <bbox>", "U+E0F4"),
    ],
)
def test_what_is_no_box_is_one_named_fault(folder: Path, objects: object, answer: str, message: str) -> None:
    with pytest.raises(RecordError) as fault:
        written(record(folder, objects, answer), processing("qwen3_vl"))
    assert fault.value.code in (Code.BAD_BOX, Code.BAD_TEXT, Code.BAD_CHARACTER)
    assert message in str(fault.value)


@pytest.mark.parametrize("none", [[], "[]", {"ref": [], "bbox": []}, {"ref": ["cat"], "bbox": []}])
def test_no_objects_are_the_empty_list_of_a_form_that_has_one(folder: Path, none: object) -> None:
    question = "Find every <ref-object>." if isinstance(none, dict) and none["ref"] else "Find every cat."
    made = written(record(folder, none, "<objects>", question), processing("qwen3_vl"))
    assert [turn.text for turn in made.turns] == ["<image>\nFind every cat.", "[]"]
    with pytest.raises(RecordError, match=r"BAD_BOX: .* the form internvl writes no list of none"):
        written(record(folder, none, "<objects>", question), processing("internvl"))
    assert record(folder, [], "none").objects is None


def test_a_text_without_pictures_may_hold_the_words(folder: Path) -> None:
    for objects in (None, []):
        talk = record(folder, objects, "<bbox> and <objects> are tags", images=[])
        assert talk.turns[1].text == "<bbox> and <objects> are tags"


def test_an_edge_of_a_pixel_beyond_the_picture_is_cut(folder: Path) -> None:
    assert answer_of(folder, "qwen3_vl", {"bbox": [[-0.4, 0, 800.6, 400]]}) == "[0, 0, 1000, 1000]"


def test_a_model_without_a_known_form_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"Set model.boxes to one of qwen3_vl, qwen2_5_vl"):
        written(record(folder, {"bbox": [BOX]}), processing(None))
    assert read_boxes("[1, 2, 3, 4]", processing(None), SIZE) == []


@pytest.mark.parametrize(
    "answer",
    [
        "none",
        "[500, 300, 100, 900]",
        "[0, 0, 5000, 10]",
        "[1, 2, 3]",
        "[" * 5000,
        "[99999999, 1, 2, 3]",
        '{"bbox_2d": [1',
    ],
)
def test_what_an_answer_says_wrongly_is_no_box(answer: str) -> None:
    assert read_boxes(answer, processing("qwen3_vl"), SIZE) == []
    assert read_boxes(answer, None, SIZE) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("box", [[320, 160, 321, 161], [799, 399, 800, 400], [0, 0, 1.2, 0.2]])
def test_a_small_box_keeps_an_area_and_is_read_back(folder: Path, form: str, box: list[float]) -> None:
    small = processing(form, width=112, height=56, scale=(112 / 800, 56 / 400))
    text = written(record(folder, {"ref": ["dog"], "bbox": [box]}), small).turns[-1].text
    (found,) = read_boxes(text.replace(SPECIAL[0], "").replace(SPECIAL[1], ""), small, SIZE)
    assert len(found.numbers) == 4
    assert all(abs(number - side) < 800 / 112 + 1 for number, side in zip(found.numbers, box, strict=True))


def test_a_box_beside_its_picture_is_outside(folder: Path) -> None:
    with pytest.raises(RecordError, match="lies outside of its picture"):
        written(record(folder, {"ref": ["dog"], "bbox": [[-1, 50, -0.5, 100]]}), processing("qwen3_vl"))

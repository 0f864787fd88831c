"""How benchmarks write questions, options, references and pictures: what the sources and prompts make of them."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from mm_moslora_eval.protocol.model_interface import IMAGE
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.protocol.task_registry import all_tasks, get_task, load_file, task_file
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.request_preparation import Preparation
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.scoring.task_result import TaskResult
from mm_moslora_eval.sources import hf_dataset, load
from mm_moslora_eval.sources.document import Document, StoredImage
from mm_moslora_eval.sources.source import Source
from mm_moslora_eval.sources.source_images import Hasher, mean_image, open_image
from PIL import Image
from video_files import write_video

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.untrusted_data import parse_yaml
from mm_moslora.utils.untrusted_files import FileError
from tests.builders.miniature_layouts import FORMS, place_documents
from tests.eval.eval_data import picture
from tests.eval.eval_fake import FakeModel
from tests.eval.protocol_runs import Runs

PICTURE = {"bytes": picture(5), "path": None}
PEOPLE = [{"answer": "blue", "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)]
ROWS: dict[str, dict[str, Any]] = {
    "lmms-lab-encoder/VQAv2": {
        "question_type": "what", "multiple_choice_answer": "blue", "answers": PEOPLE, "image_id": 7,
        "answer_type": "other", "question_id": 7001, "question": "What color?", "image": PICTURE,
    },
    "lmms-lab-encoder/textvqa": {
        "image_id": "a", "question_id": 34602, "question": "what BRAND?", "question_tokens": ["what"],
        "image": PICTURE, "image_width": 8, "answers": ["nous les gosses"] * 10, "dataset_id": "t",
        "ocr_tokens": ["MIA", "TASSO"], "set_name": "val",
    },
    "lmms-lab-encoder/VizWiz-VQA": {
        "question_id": "VizWiz_val_00000000", "image": PICTURE, "question": "Can you tell?", "answers": ["yes"] * 10,
        "category": "other",
    },
    "lmms-lab-encoder/DocVQA": {
        "questionId": "49153", "question": "What is it?", "question_types": ["handwritten"], "image": PICTURE,
        "docId": 14465, "ucsf_document_id": "p", "ucsf_document_page_no": "4", "answers": ["0.28", "0,28"],
        "data_split": "val",
    },
    "lmms-lab-encoder/ChartQA": {"type": "human_test", "question": "How many?", "answer": "14", "image": PICTURE},
    "lmms-lab-encoder/POPE": {
        "id": "0", "question_id": "1", "question": "Is there a cat?", "answer": "yes", "image_source": "COCO",
        "image": PICTURE, "category": "adversarial",
    },
    "lmms-lab-encoder/SEED-Bench": {
        "answer": "A", "choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four",
        "data_id": "1", "data_type": "video", "question": "How many?", "question_id": "101669",
        "question_type_id": 5, "image": [PICTURE, PICTURE], "segment": [1, 2],
    },
    "lmms-lab-encoder/MMMU": {
        "id": "validation_Art_1", "question": "<image 1> or <image 2>?", "options": "['$6', '$7', \"it's 8\"]",
        "explanation": "", "image_1": PICTURE, "image_2": PICTURE, "image_3": None, "image_4": None, "image_5": None,
        "image_6": None, "image_7": None, "img_type": "['Tables']", "answer": "B", "topic_difficulty": "Medium",
        "question_type": "multiple-choice", "subfield": "x",
    },
    "Lin-Chen/MMStar": {
        "index": 0, "question": "Which?\nOptions: A: Con, B: Pro", "image": PICTURE, "answer": "A",
        "category": "math", "l2_category": "geometry", "meta_info": {"source": "MMBench"},
    },
    "lmms-lab-encoder/RealWorldQA": {"image": PICTURE, "question": "Which way?", "answer": "C", "image_path": "1.webp"},
    "AI4Math/MathVista": {
        "pid": "3", "question": "Which?", "image": "images/3.jpg", "decoded_image": PICTURE,
        "choices": ["1", "2", "3", "4"], "unit": None, "precision": None, "answer": "2",
        "question_type": "multi_choice", "answer_type": "text", "query": "Hint", "metadata": {"task": "geometry"},
    },
    "lmms-lab-encoder/COCO-Caption2017": {
        "question_id": "000000179765.jpg", "image": PICTURE, "question": "Describe it.",
        "answer": ["A black motorcycle.", "A motorcycle (Honda)."], "id": 38, "license": 3,
    },
    "lmms-lab-encoder/NoCaps": {
        "image": PICTURE, "image_coco_url": "u", "image_date_captured": "d", "image_file_name": "f.jpg",
        "image_height": 6, "image_width": 8, "image_id": 253, "image_license": 0, "image_open_images_id": "o",
        "annotations_ids": [0, 1], "annotations_captions": ["A baby.", "A small baby."],
    },
    "lmms-lab-encoder/MMVet": {
        "question_id": "v1_0", "image": PICTURE, "question": "What is x?", "answer": "-1<AND>-5",
        "image_source": "s", "capability": "ocr,math",
    },
    "lmms-lab-encoder/llava-bench-in-the-wild": {
        "question_id": 0, "image_id": "001.jpg", "image": PICTURE, "question": "Where?", "gpt_answer": "On a volcano.",
        "category": "conv", "caption": "A volcano.",
    },
}  # fmt: skip
EXPECTED: dict[str, tuple[str, int, dict[str, str], tuple[str, ...]]] = {
    "lmms-lab-encoder/VQAv2": ("7001", 1, {}, ("blue",) * 10),
    "lmms-lab-encoder/textvqa": ("34602", 1, {}, ("nous les gosses",) * 10),
    "lmms-lab-encoder/VizWiz-VQA": ("VizWiz_val_00000000", 1, {}, ("yes",) * 10),
    "lmms-lab-encoder/DocVQA": ("49153", 1, {}, ("0.28", "0,28")),
    "lmms-lab-encoder/ChartQA": ("0", 1, {}, ("14",)),
    "lmms-lab-encoder/POPE": ("0", 1, {}, ("yes",)),
    "lmms-lab-encoder/SEED-Bench": ("101669", 2, {"A": "One", "B": "Two", "C": "Three", "D": "Four"}, ("A",)),
    "lmms-lab-encoder/MMMU": ("validation_Art_1", 2, {"A": "$6", "B": "$7", "C": "it's 8"}, ("B",)),
    "Lin-Chen/MMStar": ("0", 1, {}, ("A",)),
    "lmms-lab-encoder/RealWorldQA": ("0", 1, {}, ("C",)),
    "AI4Math/MathVista": ("3", 1, {"A": "1", "B": "2", "C": "3", "D": "4"}, ("B",)),
    "lmms-lab-encoder/COCO-Caption2017": (
        "000000179765.jpg", 1, {}, ("A black motorcycle.", "A motorcycle (Honda)."),
    ),
    "lmms-lab-encoder/NoCaps": ("253", 1, {}, ("A baby.", "A small baby.")),
    "lmms-lab-encoder/MMVet": ("v1_0", 1, {}, ("-1<AND>-5",)),
    "lmms-lab-encoder/llava-bench-in-the-wild": ("0", 1, {}, ("On a volcano.",)),
}  # fmt: skip
"""Id, number of pictures, options and references of the row."""


def parquet(folder: Path, row: dict[str, Any]) -> Path:
    import datasets

    table = datasets.Dataset.from_dict({name: [value] for name, value in row.items()})
    for name, value in row.items():
        if value is PICTURE:
            table = table.cast_column(name, datasets.Image())
        elif isinstance(value, list) and value and value[0] is PICTURE:
            table = table.cast_column(name, datasets.List(datasets.Image()))
    path = folder / "data.parquet"
    table.to_parquet(str(path))
    return path


def hub_tasks() -> list[str]:
    """Those whose layout no miniature has."""
    return [
        name
        for name, task in all_tasks().items()
        if task.source.kind == "hf" and not task.source.path.endswith(".json")
        and task.name not in FORMS
    ]  # fmt: skip


@pytest.mark.parametrize("name", hub_tasks())
def test_every_hub_protocol_reads_its_columns(name: str, tmp_path: Path) -> None:
    task = get_task(name)
    row = ROWS[task.source.path]
    source = dataclasses.replace(task.source, path=str(parquet(tmp_path, row)))
    (document,) = hf_dataset.load(source).documents
    identity, pictures, options, answers = EXPECTED[task.source.path]
    assert (document.id, len(document.images), document.options) == (identity, pictures, options)
    assert document.answers == answers
    assert document.problem is None
    assert task.prompt.messages(document)[-1].text.strip()


def stored(tmp_path: Path) -> StoredImage:
    source = dataclasses.replace(
        get_task("chartqa_test@lmms_eval").source, path=str(parquet(tmp_path, ROWS["lmms-lab-encoder/ChartQA"]))
    )
    (document,) = hf_dataset.load(source).documents
    (image,) = document.images
    assert isinstance(image, StoredImage)
    return image


def test_pictures_stay_on_the_disk_and_are_those_of_the_file(tmp_path: Path) -> None:
    image = stored(tmp_path)
    assert image.read() == PICTURE["bytes"]
    assert Hasher()(image) == Hasher()(PICTURE["bytes"])
    assert list(open_image(image).getdata()) == list(open_image(PICTURE["bytes"]).getdata())
    assert mean_image(image).size == (8, 6)


def answer_of(answer: Any, answer_is: str = "auto", options: tuple[str, ...] = ("1", "2", "3")) -> Document:
    return hf_dataset.document({"question": "q", "options": list(options), "answer": answer}, {}, answer_is=answer_is)


def test_a_number_that_may_be_an_index_or_a_text_is_an_error() -> None:
    with pytest.raises(EvalError, match="option C as an index and option B as a text"):
        answer_of("2")
    assert answer_of("1", options=("cat", "dog")).answers == ("B",)
    assert answer_of("dog", options=("cat", "dog")).answers == ("B",)


LETTERS = ("C", "A", "B", "D")


@pytest.mark.parametrize(
    ("answer", "answer_is", "options", "letter"),
    [
        ("A", "text", LETTERS, "B"),
        ("A", "letter", LETTERS, "A"),
        ("(C)", "letter", LETTERS, "C"),
        ("(a)", "text", ("(b)", "(a)"), "B"),
        (["A", "C"], "text", LETTERS, "BA"),
        ("1", "index", (None, "cat"), "B"),
        ("A", "auto", ("A", "B"), "A"),
    ],
)
def test_the_stated_form_of_an_answer_is_obeyed(
    answer: Any, answer_is: str, options: tuple[str, ...], letter: str
) -> None:
    found = answer_of(answer, answer_is, options)
    assert ("".join(found.answers), found.problem) == (letter, None)


@pytest.mark.parametrize("answer", ["A", "(A)"])
def test_a_letter_that_is_also_the_text_of_another_option_is_an_error(answer: str) -> None:
    with pytest.raises(EvalError, match="option A as a letter and option B as a text"):
        answer_of(answer, options=("x", answer))


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ("['(A)', '(B)']", "(A) (B)"),
        ("['(A) red', '(B)']", "(A) red (B)"),
        (["A. red", "B. green"], "red green"),
        (["(A) 红", "（B） 绿", "（C）蓝"], "红 绿 蓝"),
        ("（A） 红 （B） 绿", "红 绿"),
    ],
)
def test_options_are_texts_behind_their_own_letters(options: Any, read: str) -> None:
    found = hf_dataset.document({"question": "q", "options": options, "answer": "B"}, {}, answer_is="letter")
    assert (" ".join(found.options.values()), found.problem) == (read, None)


@pytest.mark.parametrize("options", ["[['A', 'B', 'neither']]", [["A", "B", "neither"]]])
def test_a_stated_row_without_a_right_answer_is_asked_and_wrong(options: Any, tmp_path: Path) -> None:
    """As MMMU-Pro and lmms-eval ask it; of a task that does not state it, it is a counted failure."""
    rows = [{"id": "1", "question": "q", "options": options, "answer": "B"}]
    rows += [{"id": "2", "question": "q", "options": str(options)[1:-1], "answer": "B"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for unanswerable in ((), ("1",)):
        source = Source(kind="hf", path=str(tmp_path / "q.jsonl"), answer_is="letter", unanswerable=unanswerable)
        odd, sound = load(source).documents
        assert odd.options == {"A": "['A', 'B', 'neither']"}
        assert (odd.problem is None, sound.problem) == (bool(unanswerable), None)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("red, green", "the options are 'red, green', expected a list"),
        ([str(number) for number in range(40)], "there are 40 options, at most 26"),
        ([{"text": "red"}], "an option is .*, expected text"),
        (7, "the options are 7, expected a list"),
    ],
)
def test_options_that_cannot_be_read_are_a_counted_failure(options: Any, problem: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"question_id": "1", "text": "q", "options": options, "answer": "A"})
        + "\n"
        + json.dumps({"question_id": "2", "text": "q", "options": "(a) red (b) green", "answer": "B"})
    )
    bad, good = get_task(f"llava:{tmp_path / 'q.jsonl'}").load().documents
    assert re.search(problem, bad.problem or "")
    assert (good.options, good.problem) == ({"A": "red", "B": "green"}, None)
    table = hf_dataset.document({"question": "q", "options": options, "answer": "A"}, {})
    assert table.problem == bad.problem


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps({"question_id": str(n), **row}) + "\n" for n, row in enumerate(rows)))
    return path


QUESTION = {"text": "q", "answer": "A", "options": ["x", "y"]}


@pytest.mark.parametrize("name", ["image", "video", "options"])
def test_what_every_document_has_is_an_error_in_no_document_and_a_counted_failure_in_one(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    write_video(tmp_path / "a.mp4", frames=2)
    whole = QUESTION | {"image": "a.png", "video": "a.mp4"}
    without = {key: value for key, value in whole.items() if key != name}
    path = lines(tmp_path / "q.jsonl", whole, without)
    source = Source(kind="llava", path=str(path), has=("image", "options", "video"))
    word = {"image": "picture"}.get(name, name)
    assert [document.problem for document in load(source).documents] == [None, f"has no {word}"]
    renamed = lines(tmp_path / "r.jsonl", *[{**without, f"my_{name}": str(whole[name])}] * 2)
    with pytest.raises(EvalError, match=rf"no document has .*{word}.*further columns: my_{name}"):
        load(dataclasses.replace(source, path=str(renamed)))


def test_what_the_task_names_some_documents_must_have(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    mixed = lines(tmp_path / "q.jsonl", QUESTION | {"image": "a.png"}, QUESTION)
    data = get_task(f"llava:{mixed}@{tmp_path}").load()  # some documents are text alone
    assert [document.problem for document in data.documents] == [None, None]
    renamed = lines(tmp_path / "r.jsonl", QUESTION | {"picture": "a.png"})
    with pytest.raises(EvalError, match=r"no document has a picture or video.*further columns: picture"):
        get_task(f"llava:{renamed}@{tmp_path}").load()
    texts = lines(tmp_path / "o.json", {"question": "q", "answer": "A", "choices": ""})
    with pytest.raises(EvalError, match="no document has options"):
        load(Source(kind="hf", path=str(texts), columns={"options": "choices"}))


def test_an_empty_reference_is_none(tmp_path: Path) -> None:
    rows = [{"question_id": str(n), "text": "q", "answer": answer} for n, answer in enumerate(["", None, "yes"])]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = [document.problem for document in get_task(f"llava:{tmp_path / 'q.jsonl'}").load().documents]
    assert problems == ["no reference answer, though other documents have one"] * 2 + [None]


@pytest.mark.parametrize(
    ("question", "order"),
    [
        ("<image 1> or <image 2>?", (0, 1)),
        ("<image 2> before <image 1>?", (1, 0)),
        ("<image 1>, once more <image 1>?", (0, 0)),
        ("Only <image 2>?", (1,)),
        ("None named", (0, 1)),
    ],
)
def test_numbered_image_tags_show_the_images_they_name(question: str, order: tuple[int, ...], tmp_path: Path) -> None:
    prompt = get_task("mmmu_val@lmms_eval").prompt
    images = (picture(1), picture(2))
    document = Document(id="1", images=images, question=question, options={"A": "x"}, answers=("A",))
    assert prompt.image_order(document) == order
    task = get_task("mmmu_val@lmms_eval")
    (item,) = Preparation(task, [document], mode="own", seed=0, fingerprint="f", hasher=Hasher()).items
    assert item.problem is None
    assert item.image_ids == tuple(Hasher()(images[place]) for place in order)
    assert sum(part is IMAGE for part in item.messages[0].content) == len(order)


def test_the_answer_of_mathvista_may_be_two_options_of_one_text(tmp_path: Path) -> None:
    """One row of testmini has its right choice twice."""
    runs = Runs(tmp_path)
    document = answer_of("18", "text", options=("17", "18", "20", "18"))
    assert document.problem is None
    assert document.answers == ("B", "D")
    for name in ("lmms_eval", "lmms_eval_solution"):
        assert runs(f"mathvista_testmini@{name}", [document], ["18"]).scores == [1.0]
        assert runs(f"mathvista_testmini@{name}", [document], ["D"]).scores == [1.0]
        assert runs(f"mathvista_testmini@{name}", [document], ["A"]).scores == [0.0]
    assert answer_of("18", "index", options=("17", "18", "20", "18")).answers == ("18",)
    with pytest.raises(EvalError, match="option B as an index and option C as a text"):
        answer_of("1", options=("0", "5", "1", "1"))


@pytest.mark.parametrize("seed", range(8))
def test_a_wrong_picture_is_of_another_document_also_where_documents_have_several(seed: int) -> None:
    task = Task(name="pairs", source=Source(kind="llava", path="x"))
    documents = [
        Document(id=str(n), images=(picture(2 * n), picture(2 * n + 1)), question="Alike?", answers=("yes",))
        for n in range(6)
    ]
    items = Preparation(task, documents, mode="wrong", seed=seed, fingerprint="", hasher=Hasher()).items
    assert [item.problem for item in items] == [None] * 6
    assert not any(set(item.image_ids) & set(item.own_ids) for item in items)
    assert len({name for item in items for name in item.image_ids}) == 12  # each is shown once


def png(width: int = 200, height: int = 100) -> bytes:
    """A picture of noise, so that its text is as long as that of a photo."""
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 60).save(buffer, "PNG")
    return buffer.getvalue()


def read(folder: Path, rows: list[dict[str, Any]], /, **source: Any) -> tuple[Document, ...]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(Source(kind="hf", path=str(path), **source)).documents


@pytest.mark.parametrize(
    ("options", "answer", "form", "texts", "letter"),
    [
        ("(a) Open (b) Closed", "(b)", "auto", ["Open", "Closed"], "B"),
        ("Which?\n(A) red (or so)\n(B) blue\nAnswer.", "B", "auto", ["red (or so)", "blue"], "B"),
        ("['x', 'y']", "(A)", "auto", ["x", "y"], "A"),
        (["(A) red", "(B) blue"], "A", "letter", ["red", "blue"], "A"),
        (["A. red", "B. blue"], "B", "letter", ["red", "blue"], "B"),
        (["A. red", "B. blue"], "B. blue", "text", ["A. red", "B. blue"], "B"),  # the answer is one of these texts
        (["A. red", "C. blue"], "A", "letter", ["A. red", "C. blue"], "A"),
        ("The (A) and the (C) of it", "x", "auto", [], "x"),
    ],
)
def test_options_and_references_as_benchmarks_write_them(
    options: Any, answer: str, form: str, texts: list[str], letter: str, tmp_path: Path
) -> None:
    (document,) = read(tmp_path, [{"question": "q", "options": options, "answer": answer}], answer_is=form)
    assert list(document.options.values()) == texts
    assert document.answers == (letter,)


def test_pictures_may_be_text(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a", "bytes": base64.b64encode(png()).decode()} for _ in range(2)]
    for row, document in zip(rows, read(tmp_path, rows, columns={"image": "bytes"}), strict=True):
        (image,) = document.images
        assert image.read() == base64.b64decode(row["bytes"])  # type: ignore[union-attr]


def test_the_rows_of_several_configurations_are_joined(tmp_path: Path) -> None:
    import datasets

    names = {"one": "question", "two": "question", "other": "query"}
    for name, column in names.items():
        (tmp_path / name).mkdir()
        table = datasets.Dataset.from_dict({column: [name], "answer": ["a"]})
        table.to_parquet(str(tmp_path / name / "test.parquet"))
    configs = [{"config_name": name, "data_files": [{"split": "test", "path": f"{name}/*"}]} for name in names]
    (tmp_path / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")
    documents = load(Source(kind="hf", path=str(tmp_path), config="one, two")).documents
    assert [document.question for document in documents] == ["one", "two"]
    with pytest.raises(EvalError, match="three"):
        load(Source(kind="hf", path=str(tmp_path), config="one, three"))
    with pytest.raises(EvalError, match=r", other has no column 'question' \(for question\)"):
        load(Source(kind="hf", path=str(tmp_path), config="one, other"))
    several = {"options": "answer, query", "question": "answer"}  # one of them has fewer columns of options
    first, last = load(Source(kind="hf", path=str(tmp_path), config="one, other", columns=several)).documents
    assert (len(first.options), len(last.options)) == (1, 2)


@pytest.mark.parametrize(
    ("form", "answer", "box", "problem"),
    [
        ("box_norm1", "[0.1, 0.2, 0.5, 1]", "[20, 20, 100, 100]", None),
        ("box_xywh", [10, 20, 30, 40], "[10, 20, 40, 60]", None),
        ("box_xyxy", "(10, 20), (40, 60.5)", "[10, 20, 40, 60.5]", None),
        ("box_xyxy", "[40, 20, 10, 60]", None, "no area"),
        ("box_xyxy", "[1, 2, 3]", None, "expected four numbers"),
        ("box_norm1", "nowhere", None, "expected four numbers"),
    ],
)
def test_references_that_are_boxes_are_pixels(
    form: str, answer: Any, box: str | None, problem: str | None, tmp_path: Path
) -> None:
    row = {"question": "q", "answer": answer, "image": base64.b64encode(png()).decode()}
    (document,) = read(tmp_path, [row], answer_is=form)
    assert document.problem is None if problem is None else problem in str(document.problem)
    assert box is None or document.answers == (box,)


def test_names_of_files_are_made_of_columns_and_texts_may_lie_beside(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "v1.png").write_bytes(png())
    times = "{}\r\n00:00:0{},000 --> 00:00:05,000\r\n<font color='white'>{}</font>\r\n\r\n"
    said = times.format(1, 0, "Hello.") + times.format(2, 1, "Hello.") + times.format(3, 2, "12")
    (tmp_path / "data" / "v1.srt").write_text(said)
    rows = [{"question": "q", "answer": "a", "name": name} for name in ("v1", "v2", "../../etc/passwd")]
    source = {"columns": {"image": "data/{name}.png"}, "texts": {"subtitles": "data/{name}.srt"}}
    first, without, outside = read(tmp_path, rows, **source)
    assert first.problem is None
    assert len(first.images) == 1
    assert first.extra["subtitles"] == "Hello.\n12"
    assert str(without.images[0]).endswith("data/v2.png")  # missing: a failure when it is shown
    assert without.extra["subtitles"] == ""
    assert outside.problem is not None
    assert not outside.extra.get("subtitles")
    with pytest.raises(EvalError, match="no column 'names'"):
        read(tmp_path, rows, columns={"image": "data/{names}.png"})


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_files_of_a_folder_add_their_own_columns(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a", "name": "1"}, {"question": "r", "answer": "b", "name": "2"}]
    write(tmp_path / "set" / "json" / "one.json", rows)
    write(tmp_path / "set" / "json" / "two.json", [{**rows[0], "start": 0.5}])
    (tmp_path / "set" / "x").mkdir()
    (tmp_path / "set" / "x" / "2.png").write_bytes(png())
    one, two = {"kind": "One", "folder": "x"}, {"kind": "Two", "folder": "y"}
    files = {"json/one.json": one | {"start": ""}, "json/two.json": two}
    source = Source(
        kind="hf", path=str(tmp_path / "set"), files=files, pictures=1,
        columns={"image": "{folder}/{name}.png", "category": "kind", "video_start": "start"},
    )  # fmt: skip
    data = load(source)
    assert [(document.id, document.category) for document in data.documents] == [
        ("0", "One"),
        ("1", "One"),
        ("2", "Two"),
    ]
    assert data.documents[1].images == (tmp_path / "set" / "x" / "2.png",)
    write(tmp_path / "set" / "json" / "two.json", [rows[1]])
    with pytest.raises(EvalError, match=r"json/two.json has no column 'start' \(for video_start\).*`start: ''`"):
        load(source)
    assert load(replace(source, columns={}, pictures=None, where={"kind": "Two"})).sha256 != data.sha256
    with pytest.raises(FileError, match="leaves"):
        load(replace(source, files={"../other.json": {}}))


@pytest.mark.parametrize("renamed", ["start", "candidates", "question", "answer"])
def test_a_column_renamed_in_one_of_several_files_is_an_error(renamed: str, tmp_path: Path) -> None:
    videos = shipped("mvbench", tmp_path)
    assert not any(document.problem for document in videos.load().documents)
    path = tmp_path / "json" / "action_sequence.json"
    rows = json.loads(path.read_text())
    write(path, [{("other" if key == renamed else key): value for key, value in row.items()} for row in rows])
    with pytest.raises(EvalError, match=rf"action_sequence.json has no column '{renamed}'"):
        videos.load()


def test_objects_with_keys_of_their_own_and_rows_without_objects(tmp_path: Path) -> None:
    asked = [{"uid": str(number), "question": f"{number}?", "answer": "x"} for number in range(3)]
    other = {"key": "v1", "qa": [asked[2] | {"note": "n"}]}
    columns, full = {"id": "uid"}, {"key": "v0", "qa": asked[:2]}
    for rows in ([full, other], [other, full], [{"key": "v2", "qa": []}, full, other]):
        documents = read(tmp_path, rows, rows="lvbench_questions", columns=columns)
        assert [(one.id, one.question) for one in sorted(documents, key=lambda one: one.id)] == [
            ("0", "0?"), ("1", "1?"), ("2", "2?")
        ]  # fmt: skip
        assert {one.extra["key"]: one.extra.get("note") for one in documents} == {"v0": None, "v1": "n"}
    path = tmp_path / "rows.jsonl"
    data = load(Source(kind="hf", path=str(path), rows="lvbench_questions", columns=columns))
    assert (len(data.documents), data.dropped) == (3, 1)
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"key": "v2", "qa": None}, full)))
    fault, *right = load(Source(kind="hf", path=str(path), rows="lvbench_questions", columns=columns)).documents
    assert (fault.id, [one.id for one in right]) == ("row 0", ["0", "1"])
    assert "holds 'None', expected a list of objects" in (fault.problem or "")
    with pytest.raises(EvalError, match=r"no column 'uid'"):
        read(tmp_path, [{"key": "v0", "questions": []}], rows="lvbench_questions", columns=columns)
    with pytest.raises(EvalError, match=r"'lvbench_question' is not known\. Did you mean 'lvbench_questions'"):
        Source(kind="hf", path="x", rows="lvbench_question")
    with pytest.raises(EvalError, match="all 1 rows are left out"):
        read(tmp_path, [{"question": "q", "qa": []}], rows="lvbench_questions")


def test_a_document_without_one_of_its_pictures_is_a_problem(tmp_path: Path) -> None:
    import datasets

    picture = {"bytes": png(), "path": None}
    table = datasets.Dataset.from_dict(
        {"left": [picture, picture], "right": [picture, None], "question": ["q", "r"], "answer": ["a", "b"]}
    )
    for name in ("left", "right"):
        table = table.cast_column(name, datasets.Image())
    table.to_parquet(str(tmp_path / "t.parquet"))
    source = Source(kind="hf", path=str(tmp_path / "t.parquet"), columns={"image": "left, right"}, pictures=2)
    assert [document.problem for document in load(source).documents] == [None, "has 1 pictures, expected 2"]


def shipped(name: str, folder: Path) -> Task:
    """The first protocol of a shipped task on its miniature."""
    data = parse_yaml(task_file(name).read_text(), source=name)
    place_documents(folder, data, FORMS[name])
    (folder / "task.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return load_file(folder / "task.yaml")[0]


def test_a_statement_without_a_picture_and_a_clip_without_its_video_are_counted(tmp_path: Path) -> None:
    pairs, videos = shipped("nlvr2_test", tmp_path / "pairs"), shipped("mvbench", tmp_path / "videos")
    (tmp_path / "pairs" / "test1-0-0-img1.png").unlink()
    folders = tmp_path / "videos"
    (folders / "star" / "Charades_v1_480" / "0.mp4").unlink()
    (folders / "star" / "Charades_v1_480" / "1.mp4").write_bytes(b"no video")
    for frame in (folders / "tvqa" / "frames_fps3_hq" / "18.mp4").iterdir():
        frame.write_bytes(frame.read_bytes()[:100])
    row = json.loads((folders / "json" / "object_interaction.json").read_text())
    write(folders / "json" / "object_interaction.json", [row[0] | {"start": 60.0, "end": 70.0}])
    settings = EvaluationSettings(batch_size=8, rank=0, world_size=1)
    run = evaluate_tasks([pairs, videos], tmp_path / "run", settings)
    assert [(result.n, result.counts.failed) for result in run] == [(6, 1), (20, 4)]
    assert all(not result.about.get("unscored") for result in run)


def evaluate_tasks(tasks: list[Task], folder: Path, settings: EvaluationSettings) -> list[TaskResult]:
    model = FakeModel()
    return [
        evaluate(model, task, folder / task.name, modes=("own",), baselines=(), settings=settings)[0] for task in tasks
    ]

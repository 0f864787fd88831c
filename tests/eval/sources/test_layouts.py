"""Data sets in the columns of their cards, as small parquet files: every shipped `hf` protocol reads them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval.protocol.model_interface import IMAGE
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.protocol.task_registry import all_tasks, get_task
from mm_moslora_eval.run.request_preparation import Preparation
from mm_moslora_eval.sources import hf_dataset, load
from mm_moslora_eval.sources.document import Document, StoredImage
from mm_moslora_eval.sources.image_controls import Hasher, mean_image, open_image
from mm_moslora_eval.sources.source import Source
from video_files import write_video

from mm_moslora.utils.errors import EvalError
from tests.builders.miniature_layouts import FORMS
from tests.eval.eval_data import picture
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

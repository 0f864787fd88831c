"""How benchmarks write options, references and pictures: what `hf` and `tsv` sources make of it."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.protocol.task_registry import load_file, task_file
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.scoring.task_result import TaskResult
from mm_moslora_eval.sources import load
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.source import Source
from PIL import Image

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.untrusted_data import parse_yaml
from mm_moslora.utils.untrusted_files import FileError
from tests.builders.miniature_layouts import FORMS, place_documents
from tests.eval.eval_fake import FakeModel


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

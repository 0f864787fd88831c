"""Miniature documents in the layouts that task files name: columns of a parquet file, or VLMEvalKit's TSV.

A `Form` says what is asked and how a data set writes options and references. The columns come from the task file, so
that one form serves all protocols of a task.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_moslora_eval.sources.source import Source

from mm_moslora.utils.files import replace_json, replace_text, replacing, writing_in_place
from tests.builders.miniature_scenes import COLOURS, SCENES, SHAPES, Scene

Row = dict[str, Any]
_LETTERS = "ABCD"
_FRAMES = 3
_BRACED = re.compile(r"\{(\w+)\}")


def _lettered(choices: Sequence[str]) -> list[str]:
    return [f"({letter}) {text}" for letter, text in zip(_LETTERS, choices, strict=False)]


def _written(choices: Sequence[str], form: str = "({letter}) {text}", between: str = "\n") -> str:
    return between.join(form.format(letter=letter, text=text) for letter, text in zip(_LETTERS, choices, strict=False))


@dataclass(frozen=True, kw_only=True)
class Form:
    """What is asked about each scene, and how the data set writes it."""

    question: str = "Which shape is shown?"
    answer: Callable[[Scene], Any] = lambda scene: scene.shape
    choices: Sequence[str] = SHAPES
    """Empty for an open question."""
    options: Callable[[Sequence[str]], Any] = list
    """hf: the cell of the options."""
    reference: str = "{letter}"
    """hf: the cell of the answer, from its `letter` and `text`."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further columns: a value, or a function of the number of the row."""
    first: int = 0
    """hf: number of the first document."""
    base64: bool = False
    """hf: pictures are text."""
    rotations: int = 1
    """Rows with turned options, as MMBench has them."""
    video: bool = False
    """hf: a video of the scene in place of its picture."""


def _of_number(value: Any, number: int) -> Any:
    return value(number) if callable(value) else value


_COLOUR = Form(question="What colour is the shape?", answer=lambda scene: scene.colour, choices=tuple(COLOURS))
_COUNT = Form(
    question="How many shapes are there?", answer=lambda scene: str(scene.count), choices=(), reference="{text}"
)
_MMBENCH = Form(
    question=_COLOUR.question, answer=_COLOUR.answer, choices=_COLOUR.choices, rotations=4,
    extra={"hint": "nan", "category": "attribute_recognition", "l2-category": "perception"},
)  # fmt: skip
_READ_EN = (
    ("text recognition en", "What word is written?", lambda scene: [scene.word], "without eval"),
    ("text counting en", "How many shapes are there?", lambda scene: [scene.count], "regression"),
    ("text grounding en", "Where is the word, in shares of 1,000?", lambda scene: [100, 700, 900, 950], "without eval"),
    (
        "science QA en",
        f"Which shape is shown?\n{_written(SHAPES)}",
        lambda scene: [_LETTERS[SHAPES.index(scene.shape)]],
        "multiple choice",
    ),
)
_READ_CN = (
    ("cognition VQA cn", "\u56fe\u4e2d\u5199\u7740\u4ec0\u4e48\uff1f", lambda scene: [scene.word], "without eval"),
    (
        "handwritten answer extraction cn",
        "\u7b54\u6848\u662f\u4ec0\u4e48\uff1f",
        lambda scene: [scene.word],
        "without eval",
    ),
)
_PARSED: tuple[tuple[str, Callable[[Scene], str]], ...] = (
    ("doc", lambda scene: rf"\section{{{scene.word}}}"),
    ("table", lambda scene: f"<table><tr><td>{scene.word}</td><td>{scene.count}</td></tr></table>"),
    ("formula", lambda scene: rf"{scene.count} \times x"),
    ("molecular", lambda scene: "C" * scene.count),
)


def _read(kinds: Sequence[tuple[str, str, Callable[[Scene], Any], str]]) -> Form:
    """OCRBench v2: a type of question after the other, with lists as VLMEvalKit writes them."""
    return Form(
        answer=lambda scene: "", choices=(),
        extra={
            "category": lambda number: kinds[number % len(kinds)][0],
            "question": lambda number: kinds[number % len(kinds)][1],
            "answer": lambda number: repr(kinds[number % len(kinds)][2](SCENES[number])),
            "eval": lambda number: kinds[number % len(kinds)][3],
            "bbox": "without bbox", "content": "without content",
        },
    )  # fmt: skip


_MMMU_PRO = Form(
    question="Which shape shows <image 1>?", options=lambda choices: str(list(choices)), extra={"subject": "Art"}
)


FORMS: dict[str, Form] = {
    "mathvision_test": Form(extra={"subject": "counting", "level": 1}),
    "mathvision_testmini": Form(
        question=_COUNT.question, answer=_COUNT.answer, choices=(), reference="{text}", extra={"subject": "counting"}
    ),
    "mmmu_pro_standard": _MMMU_PRO,
    "mmmu_pro_4": _MMMU_PRO,
    "mmmu_pro_vision": _MMMU_PRO,
    "blink_val": Form(
        reference="({letter})",
        extra={
            "sub_task": lambda number: ("Art_Style", "Counting")[number % 2], "prompt": "Which shape is it? (A) to (D)"
        },
    ),
    "videomme": Form(
        options=lambda choices: [f"{letter}. {text}" for letter, text in zip(_LETTERS, choices, strict=True)],
        extra={"videoID": lambda number: f"v{number}", "domain": "Knowledge"}, video=True,
    ),
    "mlvu_dev": Form(
        question=f"Which shape is shown?\n{_written(SHAPES)}", options=_written, video=True,
        extra={
            "video_name": lambda n: f"{n}.mp4", "video": lambda n: f"{n}.mp4",
            "task_type": lambda n: ("count", "order")[n % 2],
        },
    ),
    "longvideobench_val": Form(
        reference="{index}", video=True,
        extra={"video_path": lambda number: f"{number}.mp4", "question_category": "S2E"},
    ),
    "lvbench": Form(
        question=f"Which shape is shown?\n{_written(SHAPES)}", options=_written, video=True,
        extra={
            "key": lambda number: f"v{number}", "video_path": lambda number: f"{number}.mp4",
            "question_type": lambda number: ["reasoning", "summarization"][: 1 + number % 2],
            "time_reference": "00:00-00:01",
        },
    ),
    "mvbench": Form(
        reference="{text}", video=True,
        extra={
            "video": lambda number: f"{number}.mp4", "start": lambda number: (0.0, None)[number % 2],
            "end": lambda number: (1.0, None)[number % 2],
        },
    ),
    "nlvr2_test": Form(
        question="Both pictures show a red shape.",
        answer=lambda scene: str(scene.colour == "red"), choices=(), reference="{text}",
        extra={"identifier": lambda number: f"test1-{number // 2}-{number % 2}-0"},
    ),
    "vstar": Form(
        question=f"Which shape is shown?\n{_written(SHAPES)}\nAnswer with the option's letter.",
        options=_written, extra={"category": "direct_attributes"},
    ),
    "cv_bench": Form(
        reference="({letter})",
        extra={
            "type": lambda number: ("2D", "3D")[number % 2],
            "source": lambda number: ("ADE20K", "Omni3D", "COCO", "Omni3D")[number % 4], "task": "Count",
            "prompt": f"Which shape is it? Select from the following choices.\n{_written(SHAPES)}",
        },
    ),
    "mmvp": Form(
        question="Is the shape warm or cold in colour?",
        answer=lambda scene: "Warm" if scene.colour in ("red", "yellow") else "Cold", choices=("Warm", "Cold"),
        options=lambda choices: " ".join(f"({letter}) {text}" for letter, text in zip("ab", choices, strict=True)),
        reference="({lower})", first=1,
    ),
    "visulogic": Form(extra={"category": "Spatial Reasoning"}),
    "naturalbench": Form(
        question="Is the shape red?", answer=lambda scene: "Yes" if scene.colour == "red" else "No", choices=(),
        reference="{text}", extra={"Question_Type": "yes_no", "type": "yes_no"},
    ),
    "mmbench_en_dev_v11": _MMBENCH,
    "mmbench_cn_dev_v11": _MMBENCH,
    "mme_realworld_en": Form(
        options=_lettered, base64=True,
        extra={"category": "Perception/OCR with Complex Context", "l2-category": "shapes"},
    ),
    "mme_realworld_cn": Form(
        question="图中是什么形状？", options=_lettered, base64=True,
        extra={"category": "Perception/Diagram and Table", "l2-category": "shapes"},
    ),
    "wemath_testmini": Form(
        extra={
            "ID": lambda number: f"p{number // 3}",
            "key": lambda number: ("2steps_1", "2steps_2", "2steps_multi")[number % 3],
            "requirement": "Answer with the letter.",
        },
    ),
    "ccocr_languages": Form(
        question="Read the text.", answer=lambda scene: scene.word, choices=(),
        extra={"category": "multi_lan_ocr", "l2-category": "text", "split": lambda n: ("French", "Arabic")[n % 2]},
    ),
    "ccocr_scenes": Form(
        question="Read the text.", answer=lambda scene: scene.word, choices=(),
        extra={
            "category": "multi_scene_ocr", "l2-category": "scene_text", "split": lambda n: ("IC15", "zh_doc")[n % 2]
        },
    ),
    "ccocr_fields": Form(
        question='Fill in: {"word": "", "count": ""}', choices=(),
        answer=lambda scene: json.dumps({"word": scene.word, "count": str(scene.count)}),
        extra={
            "category": "kie", "l2-category": "constrained_category", "image_name": lambda n: f"{n}.png",
            "split": lambda n: ("CORD", "POIE")[n % 2],
        },
    ),
    "ccocr_documents": Form(
        question="Transcribe the picture.", answer=lambda scene: "", choices=(),
        extra={
            "category": "doc_parsing", "image_name": lambda n: f"{n}.png",
            "l2-category": lambda n: _PARSED[n % len(_PARSED)][0],
            "split": lambda n: f"{_PARSED[n % len(_PARSED)][0]}_photo_eng",
            "answer": lambda n: _PARSED[n % len(_PARSED)][1](SCENES[n]),
        },
    ),
    "ocrbench_v2_en": _read(_READ_EN),
    "ocrbench_v2_cn": _read(_READ_CN),
    "charxiv_descriptive": Form(
        question="What is the word in the picture?", answer=lambda scene: scene.word, choices=(), extra={"qid": "1"}
    ),
    "charxiv_reasoning": Form(
        question="Which word is written below the shapes?", answer=lambda scene: scene.word, choices=(),
        extra={"inst_category": "1"},
    ),
    "countbench": Form(
        question=_COUNT.question, answer=_COUNT.answer, choices=(), reference="{text}", extra={"text": "Some shapes."}
    ),
    "pixmo_count": Form(
        question="<image>How many shapes are there?", answer=_COUNT.answer, choices=(), reference="{text}"
    ),
    "refcoco": Form(
        question="Please provide the bounding box coordinate of the region this sentence describes: <ref>word</ref>",
        answer=lambda scene: "[0.1, 0.7, 0.9, 0.95]", choices=(),
        extra={"category": lambda number: ("RefCOCO val", "RefCOCOg test")[number % 2]},
    ),
    "simplevqa": Form(
        question="What word is written?", answer=lambda scene: scene.word, choices=(), reference="{text}", base64=True,
    ),
    "dynamath": Form(
        question=_COUNT.question, answer=lambda scene: f"{scene.count}.0", choices=(), reference="{text}",
        extra={"qid": lambda number: number // 2, "varid": lambda number: number % 2 + 1, "answer_type": "float"},
    ),
    "omnidocbench_v10": Form(question="", choices=()),
    "omnidocbench_v15": Form(question="", choices=()),
}  # fmt: skip
"""Task -> its documents."""


def place_documents(folder: Path, data: Row, form: Form) -> None:
    """Write the documents of a task in every layout that its protocols read, and let them read these.

    Args:
        folder: where the files go.
        data: the task file, which is changed.
        form: what is asked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own, protocols = data["source"], [changes for changes in (data.get("protocols") or {}).values() if changes]
    for changes in protocols:
        if other := changes.get("source"):
            columns = {**(own.get("columns") or {}), **(other.get("columns") or {})}
            changes["source"] = _place(folder, {**own, **other, "columns": columns}, form)
    if not protocols or not all("source" in changes for changes in protocols):
        data["source"] = _place(folder, own, form)


def _place(folder: Path, source: Row, form: Form) -> Row:
    if source["kind"] == "tsv":
        path = folder / source["path"]
        write_tsv(path, _tsv_rows(form))
        return {**source, "path": str(path.resolve()), "md5": None}
    if source["kind"] == "annotations":
        return {**source, "path": str(_write_annotations(folder).resolve())}
    shown = {"video_frames": _FRAMES} if form.video else {}
    if files := source.get("files"):
        for number, (name, added) in enumerate(files.items()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            replace_json(folder / name, [_row(folder, source, form, number, added=added)])
        return {**source, "path": str(folder.resolve()), **shown}
    rows = [_row(folder, source, form, number) for number in range(len(SCENES))]
    for row, scene in zip(rows, SCENES, strict=True):
        for name in (source.get("texts") or {}).values():
            _write_subtitles(folder / name.format_map(row), scene)
    if source["path"].endswith((".json", ".jsonl")):
        path = folder / "documents.jsonl"
        replace_text(path, "".join(json.dumps(_nested(row, source)) + "\n" for row in rows))
    else:
        path = folder / "documents.parquet"
        _write_parquet(path, rows)
    return {**source, "path": str(path.resolve()), "config": None, **shown}


def _write_annotations(folder: Path) -> Path:
    """Write the annotations of OmniDocBench, with their pictures in `images`."""
    path = folder / "OmniDocBench.json"
    (folder / "images").mkdir(exist_ok=True)
    for scene in SCENES:
        with replacing(folder / "images" / f"{scene.word}.png") as part, part.open("xb") as stream:
            stream.write(scene.png())
    about = {"language": "english", "data_source": "book", "layout": "single_column"}
    replace_json(path, [{"page_info": {"image_path": f"{one.word}.png", "page_attribute": about}} for one in SCENES])
    return path


def _nested(row: Row, source: Row) -> Row:
    """A row as a data set stores it whose documents are in a list: what names the video stands outside of it."""
    if source.get("rows") != "lvbench_questions":
        return row
    outer = _BRACED.findall(source["columns"]["video"])
    inner = {key: value for key, value in row.items() if key not in outer}
    return {**{key: row[key] for key in outer}, "qa": [inner]}


def write_tsv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as VLMEvalKit's files are written."""
    with writing_in_place(path) as stream:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(stream, columns, delimiter="\t", restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _tsv_rows(form: Form) -> list[Row]:
    rows = []
    for turn in range(form.rotations):
        for number, scene in enumerate(SCENES):
            turned = [*form.choices[turn:], *form.choices[:turn]]
            letter, text = _right(form, scene, turned)
            cells: Row = {
                "index": number + turn * 1_000_000, "image": scene.encoded if turn == 0 else str(number),
                "question": form.question, **dict(zip(_LETTERS, turned, strict=False)), "answer": letter or text,
            }  # fmt: skip
            rows.append(cells | {key: _of_number(value, number) for key, value in form.extra.items()})
    return rows


def _row(folder: Path, source: Row, form: Form, number: int, *, added: Mapping[str, str] | None = None) -> Row:
    """A row of a table; pictures and videos that it names are written.

    Args:
        folder: of the data.
        source: of the task file.
        form: what is asked.
        number: of the row.
        added: columns that the task file adds to it.
    """
    scene, columns = SCENES[number % len(SCENES)], source.get("columns") or {}
    letter, text = _right(form, scene, form.choices)
    extra = {key: _of_number(value, number) for key, value in form.extra.items()}
    cells: Row = {columns.get("id", "id"): number + form.first}
    known = {**cells, **extra, **(added or {})}
    if source.get("rows") == "nlvr2_statement":
        known = Source(kind="hf", path="", rows=source["rows"]).rows_of(known)[0]
    pictures = [name.strip() for name in columns.get("image", "image").split(",")]
    if form.video:
        column = columns.get("video", "video")
        _write_video(folder / (column if "{" in column else f"{{{column}}}").format_map(known), scene)
    elif "{" in pictures[0]:
        for name in pictures:
            with replacing(folder / name.format_map(known)) as part, part.open("xb") as stream:
                stream.write(scene.png())
    else:
        picture: Any = scene.encoded if form.base64 else {"bytes": scene.png(), "path": None}
        cells |= dict.fromkeys(pictures) | dict.fromkeys(pictures[: source.get("pictures") or 1], picture)
    names = [name.strip() for name in columns.get("options", "options").split(",")]
    if len(names) > 1:
        cells |= dict.fromkeys(names, "N/A") | dict(zip(names, form.choices, strict=False))
    elif form.choices:
        cells[names[0]] = form.options(form.choices)
    index = _LETTERS.index(letter) if letter else 0
    said = {"letter": letter, "lower": letter.lower(), "text": text, "index": index}
    reference = "{text}" if source.get("answer_is") == "text" else form.reference
    cells[columns.get("answer", "answer")] = reference.format_map(said)
    cells[columns.get("question", "question")] = form.question  # last: the options may stand in it
    return {key: value for key, value in (cells | extra).items() if key not in (added or {})}


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
    for name in [key for key, value in rows[0].items() if isinstance(value, dict)]:
        table = table.cast_column(name, datasets.Image())
    table.to_parquet(str(path))


def _write_video(path: Path, scene: Scene) -> None:
    """A short animation, or a folder of frames, whose shapes appear one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [Scene(scene.colour, scene.shape, count, scene.word).draw() for count in range(1, scene.count + 1)]
    if "frames" in str(path.parent.name):
        path.mkdir(exist_ok=True)
        for number, frame in enumerate([*frames, frames[-1]], start=1):
            with replacing(path / f"{number:05d}.jpg") as part, part.open("xb") as stream:
                frame.save(stream, "JPEG")
        return
    with replacing(path) as part, part.open("xb") as stream:
        frames[0].save(stream, "GIF", save_all=True, append_images=[*frames[1:], frames[-1]], duration=500)


def _write_subtitles(path: Path, scene: Scene) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, f"1\n00:00:00,000 --> 00:00:01,000\n<i>{scene.word}</i>\n")


def _right(form: Form, scene: Scene, choices: Sequence[str]) -> tuple[str, str]:
    """The letter of the right option, or nothing, and its text."""
    text = str(form.answer(scene))
    return (_LETTERS[list(choices).index(text)] if choices else ""), text

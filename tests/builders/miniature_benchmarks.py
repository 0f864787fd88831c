"""Miniature documents: benchmarks in their original layouts, with synthetic pictures.

They test that a task can be read, asked and scored; a score on them is no measure of a model. The task files are copies
of the shipped ones without checksum and expected count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from mm_moslora_eval.protocol.task_registry import task_file

from tests.builders.miniature_layouts import FORMS, place_documents, write_tsv
from tests.builders.miniature_scenes import COLOURS, SCENES, SHAPES, Scene

Row = dict[str, Any]


def make_miniature(folder: Path, *, max_new_tokens: int | None = None) -> list[Path]:
    """Write the documents and their task files; `max_new_tokens` caps every protocol, since an untrained model does not
    stop by itself. Returns the task files, one per benchmark.
    """
    for name, rows in _TSV.items():
        write_tsv(folder / f"{name}.tsv", rows())
    _write_vqav2(folder / "vqav2.parquet")
    boolq = folder / "commonsense" / "boolq"
    boolq.mkdir(parents=True, exist_ok=True)
    (boolq / "test.json").write_text(json.dumps(_boolq()))
    return [_write_task(folder, name, max_new_tokens) for name in TASKS]


def _write_task(folder: Path, name: str, cap: int | None) -> Path:
    data = yaml.safe_load(task_file(name).read_text())
    if name in FORMS:
        place_documents(folder / f"{name}_documents", data, FORMS[name])
    else:
        _take_one_layout(folder, name, data)
    data |= {"expected_count": None, "title": f"{data['title']} (miniature)", "licence": "made here"}
    for part in (data, *(changes for changes in (data.get("protocols") or {}).values() if changes)):
        if cap is not None and "decoding" in part:
            part["decoding"]["max_new_tokens"] = min(cap, part["decoding"].get("max_new_tokens", cap))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
    return path


def _take_one_layout(folder: Path, name: str, data: Row) -> None:
    """Keep the protocols that read the task's own kind of file."""
    if "source" not in data:  # protocols with data of their own: take that of the first
        first, changes = next(iter(data["protocols"].items()))
        data["source"], data["protocols"] = changes.pop("source"), {first: changes}
    local = {"vqav2_val": "vqav2.parquet"}
    data["source"] = {**data["source"], "md5": None, "path": local.get(name, data["source"]["path"])}
    if data["source"]["kind"] == "hf":
        data["source"]["path"] = str((folder / data["source"]["path"]).resolve())
    for protocol, changes in list((data.get("protocols") or {}).items()):
        source = (changes or {}).get("source")
        if source and source["kind"] != data["source"]["kind"]:
            del data["protocols"][protocol]  # the same benchmark in another layout
        elif source:
            del changes["source"]


def _yes_no(ask: Callable[[Scene], Sequence[tuple[str, bool]]], more: Callable[[int, Scene], Row]) -> list[Row]:
    rows: list[Row] = []
    for number, scene in enumerate(SCENES):
        first = len(rows)
        for turn, (question, right) in enumerate(ask(scene)):
            # VLMEvalKit's files store a picture once; other rows refer to the row that holds it.
            image = scene.encoded if turn == 0 else str(first)
            answer = "Yes" if right else "No"
            rows.append(
                {"index": len(rows), "image": image, "question": question, "answer": answer} | more(number, scene)
            )
    return rows


def _pope() -> list[Row]:
    splits = ("random", "popular", "adversarial")
    rows = _yes_no(
        lambda s: [
            (f"Is there a {shape} in the image?", shape == s.shape) for shape in (s.shape, _next(SHAPES, s.shape))
        ],
        lambda number, _: {"category": splits[number % 3], "image_path": ""},
    )
    return [{**row, "answer": row["answer"].lower()} for row in rows]


def _mme() -> list[Row]:
    categories = ("existence", "color", "count", "OCR", "position", "commonsense_reasoning")
    ask = "Is the shape {}? Please answer yes or no."
    return _yes_no(
        lambda s: [(ask.format(colour), colour == s.colour) for colour in (s.colour, _next([*COLOURS], s.colour))],
        lambda number, _: {"category": categories[number], "image_path": f"{number}.png"},
    )


def _hallusion() -> list[Row]:
    rows = _yes_no(
        lambda s: [(f"Are there {n} shapes? Please answer yes or no.", n == s.count) for n in (s.count, s.count + 1)],
        lambda number, _: {"category": ("VD", "VS")[number % 2], "l2-category": ("figure", "chart")[number % 2]},
    )
    for index, row in enumerate(rows):
        row["index"] = f"{row['category']}_{row['l2-category']}_{index // 4}_{index // 2 % 2}_{index % 2}_x"
        row["set_id"], row["figure_id"], row["question_id"] = index // 4, index // 2 % 2, index % 2
        if len(row["image"]) < 64:
            row["image"] = rows[index - 1]["index"]
    return rows


def _rows(question: str, values: Callable[[Scene], Row], **more: Any) -> list[Row]:
    """A row for each scene; a function in `more` gives the value for the number of the scene."""
    return [
        {"index": number, "image": scene.encoded, "question": question, **values(scene)}
        | {key: value(number) if callable(value) else value for key, value in more.items()}
        for number, scene in enumerate(SCENES)
    ]


def _choice(question: str, answer: Callable[[Scene], str], options: Sequence[str], **more: Any) -> list[Row]:
    letters = dict(zip("ABCD", options, strict=False))
    right = {text: letter for letter, text in letters.items()}
    return _rows(question, lambda scene: {**letters, "answer": right[answer(scene)]}, **more)


def _mmbench() -> list[Row]:
    """Every question with the rotations of its options, as MMBench stores them."""
    rows: list[Row] = []
    for row in _choice("What colour is the shape?", lambda s: s.colour, tuple(COLOURS)):
        texts = [row[letter] for letter in "ABCD"]
        for turn in range(4):
            turned = dict(zip("ABCD", texts[turn:] + texts[:turn], strict=True))
            answer = next(letter for letter, text in turned.items() if text == row[row["answer"]])
            image = row["image"] if turn == 0 else str(row["index"])
            rows.append(
                {
                    **row, **turned, "index": row["index"] + turn * 1_000_000, "image": image, "answer": answer,
                    "hint": "nan", "category": "attribute_recognition", "l2-category": "perception", "split": "dev",
                }
            )  # fmt: skip
    return rows


def _open(question: str, answer: Callable[[Scene], Any], **more: Any) -> list[Row]:
    return _rows(question, lambda scene: {"answer": answer(scene)}, **more)


def _next(items: Sequence[str], item: str) -> str:
    """Another item, for a question whose answer is no."""
    return items[(items.index(item) + 1) % len(items)]


def _boolq() -> list[Row]:
    ask = (
        "Please answer the following question with true or false, question: has a {} corners?\n\n"
        "Answer format: true/false"
    )
    return [
        {"instruction": ask.format(shape), "input": "", "answer": "false" if shape == "circle" else "true"}
        for shape in SHAPES
    ]


def _write_vqav2(path: Path) -> None:
    import datasets

    rows: dict[str, list[Any]] = {"question_id": [], "image": [], "question": [], "answers": []}
    for number, scene in enumerate(SCENES):
        people = [{"answer": scene.colour, "answer_confidence": "yes", "answer_id": i + 1} for i in range(9)]
        people.append({"answer": "dark " + scene.colour, "answer_confidence": "maybe", "answer_id": 10})
        values = (number * 1000, {"bytes": scene.png(), "path": None}, "What color is it?", people)
        for column, value in zip(rows.values(), values, strict=True):
            column.append(value)
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(str(path))


_TSV: Mapping[str, Callable[[], list[Row]]] = {
    "POPE": _pope,
    "MME": _mme,
    "HallusionBench": _hallusion,
    "MMBench_DEV_EN": _mmbench,
    "SEEDBench_IMG": lambda: _choice("Which shape is shown?", lambda s: s.shape, SHAPES, category="Instance Identity"),
    "AI2D_TEST": lambda: _choice("What does the diagram show?", lambda s: s.shape, SHAPES),
    "ScienceQA_TEST": lambda: _choice(
        "Which colour has the shape?", lambda s: s.colour, tuple(COLOURS), hint="Look at the picture.",
        category="natural science",
    ),
    "MMStar": lambda: _choice(
        "Which shape is it?", lambda s: s.shape, SHAPES, category="coarse perception",
        l2_category=lambda number: ("image scene and topic", "image style & quality")[number % 2],
    ),
    "RealWorldQA": lambda: _choice("What colour is it?", lambda s: s.colour, tuple(COLOURS)),
    "TextVQA_VAL": lambda: _open("What word is written?", lambda s: str([s.word.lower()] * 9 + ["a " + s.word])),
    "DocVQA_VAL": lambda: _open("What is the word?", lambda s: str([s.word])),
    "ChartQA_TEST": lambda: _open("How many shapes are there?", lambda s: s.count, split="test_human"),
    "OCRBench": lambda: _open(
        "what is written in the image?", lambda s: str([s.word]), category="Regular Text Recognition"
    ),
    "GQA_TestDev_Balanced": lambda: _open("What color is the shape?", lambda s: s.colour),
    "MMVet": lambda: _open(
        "Describe the picture.", lambda s: f"{s.count}<AND>{s.colour}<AND>{s.shape}", category="rec,gen"
    ),
}  # fmt: skip
TASKS = (
    "pope", "mme", "hallusionbench", "mmbench_en_dev", "seedbench_image", "ai2d", "scienceqa_img", "mmstar",
    "realworldqa", "textvqa_val", "docvqa_val", "chartqa_test", "ocrbench", "gqa_testdev", "mmvet", "vqav2_val",
    "commonsense_boolq", *FORMS,
)  # fmt: skip
"""Benchmarks with miniature documents."""

"""Writes answers in the formats of evaluation servers and other harnesses."""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path, PurePath
from typing import Any

from mm_moslora.utils.errors import EvalError, suggestion
from mm_moslora.utils.files import replacing
from mm_moslora.utils.folder_marks import output_file
from mm_moslora_eval.metrics import vqa_accuracy
from mm_moslora_eval.run.answer_log import line, read_folder
from mm_moslora_eval.run.answer_views import documents_of, find_view
from mm_moslora_eval.scoring.visible_text import without_thinking

Row = Mapping[str, Any]
_XLSX_CELL = 32_767
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


def write_submission(folder: Path, out: Path, *, form: str) -> int:
    """Write the answers of a view, or of TASK@PROTOCOL/MODE of a run, in one of `FORMS`.

    Returns:
        Number of documents without an answer; these are written as empty answers.

    Raises:
        EvalError: an unknown form, a folder without answers, or documents that have not been asked.
        ConfigError: `out` is a folder, or a file that exists.
    """
    content, missing = submission(folder, form=form)
    output_file(out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part:
        part.write_bytes(content)
    return missing


def keep_submission(view: Path, task: str) -> str:
    """Write the answers of a view into its folder, in the form that fits the task; returns a sentence about it."""
    form = DEFAULT_FORM.get(task, "vlmevalkit")
    path = view / f"submission.{SUFFIXES.get(form, 'json')}"
    with replacing(path) as part:  # a file of the run itself, which scoring again may replace
        part.write_bytes(submission(view, form=form)[0])
    return f"The answers were written to {path} in the form {form!r}."


def submission(folder: Path, *, form: str) -> tuple[bytes, int]:
    """The content of a submission file, and the number of documents without an answer.

    Raises:
        EvalError: see `write_submission`.
    """
    if form not in FORMS:
        raise EvalError(f"No submission form {form!r}.{suggestion(form, FORMS)} Known: {', '.join(FORMS)}.")
    view = find_view(folder)
    documents = documents_of(view)
    answers = read_folder(view.parent)
    missing = [row["id"] for row in documents if row["key"] not in answers]
    if missing:
        raise EvalError(f"{folder}: {len(missing)} documents have no answer yet (first: {missing[0]!r}); run it again.")
    rows = [row | {"text": without_thinking(answers[row["key"]]["text"] or "").text} for row in documents]
    return FORMS[form](rows), sum(answers[row["key"]]["text"] is None for row in documents)


def _number(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _json(data: Any) -> bytes:
    return (json.dumps(data, ensure_ascii=True) + "\n").encode()


def _image_name(row: Row) -> str:
    path_or_id = row["extra"].get("image_path") or next((path for path in row["paths"] if path), None) or row["id"]
    name = PurePath(path_or_id)
    return name.name if name.suffix else f"{name.name}.jpg"  # VizWiz's ids of pictures have no suffix


def _llava(rows: Sequence[Row]) -> bytes:
    answers = [
        {
            "question_id": _number(row["id"]), "prompt": row["prompt"], "text": row["text"],
            "answer_id": row["key"][:22], "model_id": "mm_moslora", "metadata": {},
        }
        for row in rows
    ]  # fmt: skip
    return "".join(line(answer) for answer in answers).encode()


def _columns(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """VLMEvalKit's columns: the data set's own without pictures, and `prediction`."""
    letters = sorted({letter for row in rows for letter in row["options"]})
    extra = list(dict.fromkeys(name for row in rows for name in row["extra"] if name not in ("image", "image_path")))
    head = ["index", "question", *letters, "hint", "answer", "category", *extra, "prediction"]
    table = []
    for row in rows:
        answers = row["answers"]
        # A list of references in VLMEvalKit's format.
        answer = answers[0] if len(answers) == 1 else repr(list(answers)) if answers else ""
        cells = {
            "index": row["id"], "question": row["question"], "hint": row["hint"] or "", "answer": answer,
            "category": row["category"] or "", "prediction": row["text"],
        }  # fmt: skip
        cells = {**row["extra"], **row["options"], **cells}
        table.append([str(cells.get(name, "")) for name in head])
    used = [column for column, name in enumerate(head) if name in _ALWAYS or any(cells[column] for cells in table)]
    return [head[column] for column in used], [[cells[column] for column in used] for cells in table]


_ALWAYS = ("index", "question", "answer", "prediction")


def _tsv(rows: Sequence[Row]) -> bytes:
    head, table = _columns(rows)
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerow(head)
    writer.writerows([[cell.replace("\0", "\ufffd") for cell in cells] for cells in table])
    return stream.getvalue().encode("utf-8", "replace")


def _xlsx(rows: Sequence[Row]) -> bytes:
    """A workbook of one sheet with text cells; a cell that is too long for Excel is truncated."""
    head, table = _columns(rows)
    lines = [f"<row>{''.join(map(_cell, cells))}</row>" for cells in (head, *table)]
    sheet = f'{_XML}<worksheet xmlns="{_MAIN}"><sheetData>{"".join(lines)}</sheetData></worksheet>'
    return _zip({**_BOOK, "xl/worksheets/sheet1.xml": sheet})


def _zip(files: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _cell(text: str) -> str:
    clean = escape(_CONTROL.sub("\ufffd", text)[:_XLSX_CELL], quote=False)
    return f'<c t="inlineStr"><is><t xml:space="preserve">{clean}</t></is></c>'


_XML = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>'
_OPEN = "http://schemas.openxmlformats.org"
_MAIN = f"{_OPEN}/spreadsheetml/2006/main"
_OFFICE = f"{_OPEN}/officeDocument/2006/relationships"
_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_BOOK = {
    "[Content_Types].xml": (
        f'{_XML}<Types xmlns="{_OPEN}/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{_TYPE}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{_TYPE}.worksheet+xml"/></Types>'
    ),
    "_rels/.rels": (
        f'{_XML}<Relationships xmlns="{_OPEN}/package/2006/relationships">'
        f'<Relationship Id="rId1" Type="{_OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>'
    ),
    "xl/workbook.xml": (
        f'{_XML}<workbook xmlns="{_MAIN}" xmlns:r="{_OFFICE}"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>'
    ),
    "xl/_rels/workbook.xml.rels": (
        f'{_XML}<Relationships xmlns="{_OPEN}/package/2006/relationships">'
        f'<Relationship Id="rId1" Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>'
    ),
}

FORMS: dict[str, Callable[[Sequence[Row]], bytes]] = {
    "vqav2": lambda rows: _json(  # LLaVA uploads normalised answers
        [{"question_id": _number(row["id"]), "answer": vqa_accuracy.normalize_evalai(row["text"])} for row in rows]
    ),
    "vizwiz": lambda rows: _json(
        [{"image": _image_name(row), "answer": vqa_accuracy.normalize_evalai(row["text"])} for row in rows]
    ),
    "docvqa": lambda rows: _json([{"questionId": _number(row["id"]), "answer": row["text"]} for row in rows]),
    "mmvet": lambda rows: _json({f"v1_{row['id'].removeprefix('v1_')}": row["text"] for row in rows}),
    "mmbench": _xlsx,
    "llava": _llava,
    "vlmevalkit": _tsv,
    "vlmevalkit_xlsx": _xlsx,
    "omnidocbench": lambda rows: _zip({f"{PurePath(row['id']).stem}.md": row["text"] for row in rows}),
}
"""vqav2, vizwiz, docvqa, mmvet: their servers' JSON; mmbench: its server's workbook; llava: answer JSONL;
vlmevalkit: predictions for its `--mode eval` with PRED_FORMAT=tsv (or the workbook); omnidocbench: the folder
of pages that its evaluator reads, one `PICTURE.md` a page, as a ZIP file."""

DEFAULT_FORM = {
    "mmvet": "mmvet", "llavabench": "llava", "vqav2_testdev": "vqav2", "vizwiz_test": "vizwiz", "docvqa_test": "docvqa",
    "mmbench_en_test": "mmbench", "mmbench_cn_test": "mmbench",
    "mmbench_en_test_v11": "mmbench", "mmbench_cn_test_v11": "mmbench",
    "omnidocbench_v10": "omnidocbench", "omnidocbench_v15": "omnidocbench",
}  # fmt: skip
"""Task -> submission format, written when the task cannot be scored locally."""
SUFFIXES = {"mmbench": "xlsx", "vlmevalkit_xlsx": "xlsx", "vlmevalkit": "tsv", "llava": "jsonl", "omnidocbench": "zip"}

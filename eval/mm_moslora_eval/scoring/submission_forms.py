"""Formats of evaluation servers and other harnesses: what a file of answers holds.

A row is a document of a view with its answer as `text`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import PurePath
from typing import Any

from mm_moslora_eval.task_files.task_rules import all_rules, folder_of, rule

Row = Mapping[str, Any]
_XLSX_CELL = 32_767
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A format of answers."""

    write: Callable[[Sequence[Row]], bytes]
    suffix: str = "json"


def number(text: str) -> int | str:
    """An id as servers have it: a number where it is one."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def as_json(data: Any) -> bytes:
    """One line of JSON in ASCII."""
    return (json.dumps(data, ensure_ascii=True) + "\n").encode()


def image_name(row: Row) -> str:
    """The name of a document's picture."""
    path_or_id = row["extra"].get("image_path") or next((path for path in row["paths"] if path), None) or row["id"]
    name = PurePath(path_or_id)
    return name.name if name.suffix else f"{name.name}.jpg"  # ids of pictures may have no suffix


def llava_lines(rows: Sequence[Row]) -> bytes:
    """LLaVA's answer JSONL."""
    answers = [
        {
            "question_id": number(row["id"]), "prompt": row["prompt"], "text": row["text"],
            "answer_id": row["key"][:22], "model_id": "mm_moslora", "metadata": {},
        }
        for row in rows
    ]  # fmt: skip
    return "".join(f"{json.dumps(answer, ensure_ascii=False)}\n" for answer in answers).encode("utf-8", "surrogatepass")


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


def workbook(rows: Sequence[Row]) -> bytes:
    """A workbook of one sheet with text cells; a cell that is too long for Excel is truncated."""
    head, table = _columns(rows)
    lines = [f"<row>{''.join(map(_cell, cells))}</row>" for cells in (head, *table)]
    sheet = f'{_XML}<worksheet xmlns="{_MAIN}"><sheetData>{"".join(lines)}</sheetData></worksheet>'
    return archive({**_BOOK, "xl/worksheets/sheet1.xml": sheet})


def archive(files: Mapping[str, str]) -> bytes:
    """A ZIP file with texts by name, the same bytes each time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, text in files.items():
            packed.writestr(zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)
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


_FORMS = {
    "llava": Submission(write=llava_lines, suffix="jsonl"),
    "vlmevalkit": Submission(write=_tsv, suffix="tsv"),
    "vlmevalkit_xlsx": Submission(write=workbook, suffix="xlsx"),
}


def submission_forms() -> dict[str, Submission]:
    """Every format by name: LLaVA's answer JSONL, predictions for VLMEvalKit's `--mode eval` with PRED_FORMAT=tsv (or
    the workbook), and those of the benchmarks' servers."""
    return _FORMS | all_rules("SUBMISSIONS")


def form_of_task(task: str) -> str:
    """The format of a task whose answers cannot be scored here: that of its benchmark, else VLMEvalKit's."""
    folder = folder_of(task)
    return folder if folder and rule("SUBMISSIONS", folder) else "vlmevalkit"

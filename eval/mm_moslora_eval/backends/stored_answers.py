"""Reads files of answers from other programs, row by row: JSONL, JSON, TSV and workbooks."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json, parse_lines

IDS = ("id", "question_id", "index", "doc_id")
"""Columns that may hold the id of a question, at the top level or in lmms-eval's `doc`."""
TEXTS = ("text", "prediction")
_PROMPTS = ("prompt", "input", "question")
_MOST_CELLS = 1 << 28
"""Largest size of a workbook's sheet, unpacked, in bytes."""
_MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")


@dataclass(frozen=True, kw_only=True)
class ReplayedAnswer:
    """One row of a file of answers."""

    names: Mapping[str, str]
    """Column -> id of the question; `doc.index` is the column `index` of lmms-eval's document."""
    prompt: str | None
    text: str | None
    """None: the row records a failure, or scores of options, or `fault` says what it holds instead."""
    fault: str | None = None
    row: Mapping[str, Any]


def read_answers(path: Path, data: bytes) -> Iterator[ReplayedAnswer]:
    """The rows of a file."""
    for number, row in enumerate(_rows(path, data), start=1):
        if "question_id" in row and "image" in row and "prediction" not in row:
            raise EvalError(f"{path}, row {number} is a question; replay needs a file with answers.")
        names = _names(row)
        if isinstance(document := row.get("doc"), dict):
            names |= {f"doc.{key}": name for key, name in _names(document).items()}
        if not names:
            raise EvalError(f"{path}, row {number} has no text or number in one of the columns {', '.join(IDS)}.")
        text, fault = _text(row)
        if text is None and not any(key in row for key in (*TEXTS, "options", "logprobs")):
            raise EvalError(
                f"{path}, row {number} has no answer; expected a column {', '.join(TEXTS)}, or lmms-eval's `resps`."
            )
        yield ReplayedAnswer(names=names, prompt=_prompt(row), text=text, fault=fault, row=row)


def _names(row: Mapping[str, Any]) -> dict[str, str]:
    values = {column: row.get(column) for column in IDS}
    return {
        column: str(value)
        for column, value in values.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool) and value == value
    }


def _text(row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The answer, and what a row holds in its place."""
    value = next((row[key] for key in TEXTS if row.get(key) is not None), None)
    if value is not None:
        what = f"{json.dumps(value)[:80]} ({type(value).__name__}), expected text"
        return (value, None) if isinstance(value, str) else (None, what)
    for key in ("resps", "filtered_resps"):  # lmms-eval: a list per request, with a list of attempts
        value = row.get(key)
        while isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str):
            return value, None
    return None, None


def _prompt(row: Mapping[str, Any]) -> str | None:
    prompt = next((row[key] for key in _PROMPTS if isinstance(row.get(key), str)), None)
    arguments = row.get("arguments")
    while prompt is None and isinstance(arguments, list | dict) and arguments:
        arguments = arguments[0] if isinstance(arguments, list) else next(iter(arguments.values()))
        prompt = arguments if isinstance(arguments, str) else None
    return prompt


def _rows(path: Path, data: bytes) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".tsv":
        from mm_moslora_eval.sources.vlmevalkit_tsv import read_columns

        yield from read_columns(path)
        return
    if path.suffix == ".xlsx":
        try:
            yield from _workbook(data)
        except Exception as error:  # archives and sheets are damaged in many ways
            raise EvalError(f"{path} is no workbook that can be read ({type(error).__name__}: {error}).") from error
        return
    try:
        text = data.decode("utf-8-sig")
        if path.suffix == ".json":
            loaded = parse_json(text, constants=True)
            if isinstance(loaded, dict):
                loaded = [{"id": name, "text": answer} for name, answer in loaded.items()]
        else:
            loaded = parse_lines(text)
    except UnicodeDecodeError as error:
        raise EvalError(f"{path} is not UTF-8 at byte {error.start}.") from error
    except StrictJsonError as error:
        raise EvalError(f"{path} {error}.") from error
    if not isinstance(loaded, list) or not all(isinstance(row, dict) for row in loaded):
        raise EvalError(f"{path} must hold objects, one per answer.")
    yield from loaded


def _workbook(data: bytes) -> Iterator[dict[str, str]]:
    """The rows of a workbook's first sheet by the names in its first row; an empty cell has no value."""
    with zipfile.ZipFile(io.BytesIO(data)) as book:
        sheet = min(
            (name for name in book.namelist() if re.fullmatch(r"xl/worksheets/sheet\d+\.xml", name)),
            key=lambda name: int("".join(filter(str.isdecimal, name))),
        )
        shared: list[str] = []
        if "xl/sharedStrings.xml" in book.namelist():
            shared = [_plain(item) for item in _parsed(book, "xl/sharedStrings.xml").iter(f"{_MAIN}si")]
        head: dict[int, str] = {}
        for row in _parsed(book, sheet).iter(f"{_MAIN}row"):
            cells = {_column(cell, column): _value(cell, shared) for column, cell in enumerate(row.iter(f"{_MAIN}c"))}
            if head:
                yield {name: cells[column] for column, name in head.items() if cells.get(column)}
            else:
                head = cells


def _parsed(book: zipfile.ZipFile, name: str) -> ElementTree.Element:
    if book.getinfo(name).file_size > _MOST_CELLS:
        raise ValueError(f"{name} has more than {_MOST_CELLS} bytes")
    text = book.read(name).decode("utf-8-sig")  # whatever encoding it declares
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # entities may expand without limit
        raise ValueError(f"{name} has a document type")
    return ElementTree.fromstring(text)  # noqa: S314  (size and entities are checked)


def _column(cell: ElementTree.Element, default: int) -> int:
    letters = "".join(filter(str.isalpha, cell.get("r", "")))
    number = 0
    for letter in letters:
        number = 26 * number + ord(letter) - ord("A") + 1
    return number - 1 if letters else default


def _value(cell: ElementTree.Element, shared: list[str]) -> str:
    if cell.get("t") == "inlineStr":
        return _plain(cell)
    value = cell.findtext(f"{_MAIN}v") or ""
    return shared[int(value)] if cell.get("t") == "s" else _unescaped(value)


def _plain(element: ElementTree.Element) -> str:
    """The text of a cell or a shared string, without phonetic readings."""
    skipped = {text for reading in element.iter(f"{_MAIN}rPh") for text in reading.iter(f"{_MAIN}t")}
    return _unescaped("".join(text.text or "" for text in element.iter(f"{_MAIN}t") if text not in skipped))


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)

"""Stored answers behind the runner's `Model` protocol, to score the output of another program.

They are read row by row from JSONL, JSON, TSV and workbooks.
"""

from __future__ import annotations

import io
import json
import logging
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.identity import sha256_of_bytes
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json, parse_lines
from mm_moslora.utils.untrusted_files import MOST_BYTES, read_bytes
from mm_moslora_eval.protocol.model_interface import Answer, OptionRequest, OptionScore, Request

logger = logging.getLogger(__name__)


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


class ReplayModel:
    """Answers by document id; where several answers share an id, by their prompt."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise EvalError(f"{path} is missing; replay needs a file with stored answers.")
        data = read_bytes(path, most=MOST_BYTES)
        self._path, self.name, self.fingerprint = path, f"replay of {path}", sha256_of_bytes(data)
        self._by_column: dict[str, dict[str, list[ReplayedAnswer]]] = defaultdict(lambda: defaultdict(list))
        self._unlike = ""
        """A question with different answers, of which only a protocol with drawn answers takes several."""
        texts: dict[Any, str | None] = {}
        for answer in read_answers(path, data):
            question = (tuple(answer.names.items()), answer.prompt)
            if texts.setdefault(question, answer.text) != answer.text:
                self._unlike = self._unlike or next(iter(answer.names.values()))
            for column, name in answer.names.items():
                self._by_column[column][name].append(answer)
        self._column: str | None = None
        self._asked: set[str] = set()
        """Ids of the answers that were looked up."""

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        """Look the answers up; the first missing answer ends the generator with an error."""
        self._choose_column(requests)
        for index, request in enumerate(requests):
            stored = self._stored(request)
            if stored.text is None:
                fault = stored.fault or f"a failure: {stored.row.get('error')}"
                raise RuntimeError(f"the stored answer to {request.id!r} is {fault}")
            cut = stored.row.get("finish_reason") == "length"
            tokens = stored.row.get("tokens")
            yield (
                index,
                Answer(
                    text=stored.text,
                    tokens=tokens if isinstance(tokens, int) else 0,
                    finish_reason="length" if cut else "stop",
                ),
            )

    def loglikelihood(
        self, requests: Sequence[OptionRequest], *, batch_size: int
    ) -> Iterator[tuple[int, tuple[OptionScore, ...]]]:
        """Look the option scores up."""
        self._choose_column([item.request for item in requests])
        for index, item in enumerate(requests):
            row = self._stored(item.request).row
            stored: Any = row.get("options") if isinstance(row.get("options"), dict) else row.get("logprobs")
            logprobs: list[Any] = [stored.get(option) if isinstance(stored, dict) else None for option in item.options]
            if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in logprobs):
                raise RuntimeError(f"no stored log-likelihood for every option of {item.request.id!r}")
            yield index, tuple(OptionScore(logprob=float(value), tokens=0) for value in logprobs)

    def close(self) -> None:
        """Name the answers that nobody asked for; where all were there already, no question was put."""
        stored = set(self._by_column[self._column or "id"])
        left = sorted(stored - self._asked)
        if self._asked and left:
            logger.warning(
                "%s: %d of %d answers belong to no question that was put: %s is %s.",
                self._path, len(left), len(stored), self._column, ", ".join(map(repr, left[:5])),
            )  # fmt: skip

    def _choose_column(self, requests: Sequence[Request]) -> None:
        """Choose the id column once for the whole file: the column that identifies most questions."""
        if self._unlike and any(request.draw is None for request in requests):
            raise EvalError(f"{self._path} holds two different answers to {self._unlike!r}; keep one.")
        if self._column is None and requests:
            self._column = max(
                self._by_column,
                key=lambda column: sum(
                    any(name in self._by_column[column] for name in _names_of(request)) for request in requests
                ),
                default="id",
            )

    def _stored(self, request: Request) -> ReplayedAnswer:
        rows = self._by_column[self._column or "id"]
        name = next((name for name in _names_of(request) if name in rows), None)
        answers = [] if name is None else rows[name]
        self._asked.add(name or "")
        if request.draw is not None:
            if request.sample >= len(answers):
                raise RuntimeError(
                    f"{self._path} holds {len(answers)} answers to {request.id!r}, and one more is asked for"
                )
            return answers[request.sample]
        if len({answer.text for answer in answers}) > 1:  # LLaVA's MME: two questions on a picture share its name
            answers = _with_prompt(answers, request)
        if not answers:
            raise RuntimeError(f"{self._path} holds no answer to {request.id!r}")
        if len({answer.text for answer in answers}) > 1:
            raise RuntimeError(f"{self._path} holds {len(answers)} answers to {request.id!r} and its prompt")
        return answers[0]


def _names_of(request: Request) -> tuple[str, ...]:
    """Ids of a question; programs that keep numbers as floats write `1.0` for `1`."""
    names = (request.id, *request.aliases)
    return (*names, *(f"{name}.0" for name in names if name.isdecimal()))


def _with_prompt(answers: Sequence[ReplayedAnswer], request: Request) -> list[ReplayedAnswer]:
    """The rows with the request's prompt, or else with its question, ignoring the instruction after it."""
    prompt = request.messages[-1].text
    for reading in (_flat, _question):
        same = [answer for answer in answers if answer.prompt is not None and reading(answer.prompt) == reading(prompt)]
        if same:
            return same
    return []


def _flat(text: str) -> str:
    return " ".join(text.replace("<image>", " ").split())


def _question(text: str) -> str:
    """Up to the first question mark, or the first line."""
    text = text.replace("<image>", " ").strip()
    question, mark, _ = text.partition("?")
    return " ".join(question.split()) if mark else _flat(text.split("\n")[0])

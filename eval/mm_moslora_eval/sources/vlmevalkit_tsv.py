"""VLMEvalKit TSV files as documents.

Columns: `index`, `image` (base64, a list of base64, or the index of the row that holds the picture), `image_path`,
`question`, `hint`, options `A` to `Z`, `answer`, `category` and others. Cells may hold quotes, newlines and megabytes.
"""

from __future__ import annotations

import base64
import binascii
import csv
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.untrusted_files import opened
from mm_moslora_eval.sources.document import Document, ImageLike
from mm_moslora_eval.sources.source import matches
from mm_moslora_eval.sources.source_images import pictures_of_record
from mm_moslora_eval.sources.source_videos import frames_of_record

if TYPE_CHECKING:
    from mm_moslora.data.images.record_picture import PictureRules

Row = dict[str, str]
_INDEX_LENGTH = 64  # VLMEvalKit: a shorter cell is the index of another row
_LIST_ITEM = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")
_LIST = re.compile(rf"\[\s*(?:{_LIST_ITEM.pattern})(?:\s*,\s*(?:{_LIST_ITEM.pattern}))*\s*,?\s*\]", re.S)
_EMPTY = ("", "nan", "NaN")


def read(
    path: Path,
    *,
    rules: PictureRules,
    drop_without_image: bool = False,
    answer_lists: bool = True,
    where: Mapping[str, str] | None = None,
) -> Iterator[Document | None]:
    """Read a TSV; None stands for a row that was dropped on purpose."""
    rows = read_columns(path, required=("index", "answer", *(where or ())))
    pictures = {row["index"]: row.get("image", "") for row in rows}
    for number, row in enumerate(rows, start=2):
        if not matches(row, where):
            yield None
            continue
        images, problem = _images(row, pictures, partial(pictures_of_record, file=path, row=number, rules=rules))
        frames, fault = frames_of_record(_video(row), row.get, file=path, row=number, rules=rules)
        images, problem = (*images, *frames), problem or fault
        if drop_without_image and not images and problem is None:
            yield None
            continue
        nul = next((column for column, value in row.items() if "\0" in value), None)
        yield document(
            row,
            images=images,
            problem=problem or (f"NUL byte in column {nul!r}" if nul else None),
            answer_lists=answer_lists,
        )


def _video(row: Row) -> str | None:
    """The video that a row names by its path."""
    path = row.get("video_path") or row.get("video") or ""
    return None if path in _EMPTY else path


def document(
    row: Mapping[str, str | None],
    *,
    images: tuple[ImageLike, ...] = (),
    problem: str | None = None,
    answer_lists: bool = True,
) -> Document:
    """One row as a document; empty cells and `nan` are absent, but an option may read `None` or `NA`."""
    cells = {key: value for key, value in row.items() if value is not None and value not in _EMPTY}
    options = {key: value for key, value in cells.items() if len(key) == 1 and "A" <= key <= "Z"}
    answer = cells.get("answer", cells.get("answers", ""))
    answers = tuple(parse_list(answer)) if answer_lists else ()
    columns = {"index", "image", "question", "hint", "answer", "answers", "category", *options}
    return Document(
        id=str(cells.get("index", "")),
        images=images,
        question=cells.get("question", ""),
        options=dict(sorted(options.items())),
        answers=answers or ((answer,) if answer else ()),
        category=cells.get("category"),
        hint=cells.get("hint"),
        extra={key: value for key, value in cells.items() if key not in columns},
        problem=problem,
    )


def parse_list(text: str) -> list[str]:
    """The strings of a Python or JSON list of strings, parsed without evaluation; for other text no strings."""
    stripped = text.strip()
    if not _LIST.fullmatch(stripped):
        return []
    items = (single or double for single, double in _LIST_ITEM.findall(stripped))
    return [
        re.sub(r"\\(.)", lambda match: {"n": "\n", "t": "\t"}.get(match.group(1), match.group(1)), item)
        for item in items
    ]


def read_columns(path: Path, *, required: tuple[str, ...] = ("index",)) -> list[Row]:
    """The rows of any TSV with these columns, with unchanged cells."""
    # A cell may contain a picture of many megabytes.
    csv.field_size_limit(sys.maxsize)
    for strict in (True, False):
        try:
            with opened(path, most=None) as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as stream:
                return list(_checked_rows(csv.reader(stream, delimiter="\t", strict=strict), path, required))
        except csv.Error as error:
            # Text after a closing quote is harmless, and common in the field's files.
            if not strict or "unexpected end of data" in str(error):
                raise EvalError(f"{path} is not a valid TSV ({error}): a quote is opened and never closed.") from error
        except UnicodeDecodeError as error:
            raise EvalError(f"{path} is not UTF-8 text ({error}); convert it.") from error
    raise AssertionError("the second attempt returns or raises")


def _checked_rows(reader: Iterator[list[str]], path: Path, required: tuple[str, ...]) -> Iterator[Row]:
    header = next(reader, None)
    if not header:
        raise EvalError(f"{path} is empty; expected a header with index, question, answer.")
    missing = [name for name in required if name not in header]
    if missing and not (missing == ["answer"] and "answers" in header):
        raise EvalError(f"{path} has no column {', '.join(missing)}; found {', '.join(header)}.")
    for number, cells in enumerate(reader, start=2):
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise EvalError(
                f"{path}, row {number} has {len(cells)} cells, the header has {len(header)}; quote its tabs."
            )
        yield dict(zip(header, cells, strict=True))


def _images(
    row: Row, pictures: Mapping[str, str], named: Callable[[list[str]], tuple[tuple[ImageLike, ...], str | None]]
) -> tuple[tuple[ImageLike, ...], str | None]:
    cell = row.get("image", "")
    followed: list[str] = []
    while cell and cell not in _EMPTY and len(cell) <= _INDEX_LENGTH:
        if cell in followed or cell not in pictures:
            return (
                (),
                f"image refers to row {cell!r}, which {'refers back to it' if cell in followed else 'does not exist'}",
            )
        followed.append(cell)
        cell = pictures[cell]
    if cell and cell not in _EMPTY:
        items = parse_list(cell) or [cell]
        try:
            return tuple(base64.b64decode("".join(item.split()), validate=True) for item in items), None
        except (binascii.Error, ValueError) as error:
            return (), f"image is not base64 ({error})"
    names = row.get("image_path", "")
    if followed or names in _EMPTY:
        return (), f"image refers to row {followed[-1]!r}, which has no picture" if followed else None
    return named(parse_list(names) or [names])

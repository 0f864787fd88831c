"""Hugging Face data sets as documents: a local parquet or JSON file, a saved folder, or a hub id; without a token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.utils.errors import EvalError, suggestion
from mm_moslora.utils.untrusted_files import FileError, read_text_below
from mm_moslora_eval.sources.answer_options import BOX_FORMS, answers_of, options_of, with_reference_box
from mm_moslora_eval.sources.document import DataSet, Document, ImageLike, checked
from mm_moslora_eval.sources.source import Source, find_data, find_file, matches, picture_folder
from mm_moslora_eval.sources.source_images import pictures_of_record, rules_of
from mm_moslora_eval.sources.source_tables import (
    BRACED,
    KEYS,
    READERS,
    Pictures,
    Table,
    check_columns,
    open_tables,
    refuse_unread_pictures,
)
from mm_moslora_eval.sources.source_videos import frames_of_record

if TYPE_CHECKING:
    from mm_moslora.data.images.record_picture import PictureRules


def load(source: Source, *, beside: Path | None = None) -> DataSet:
    """Read a split."""
    unknown = source.columns.keys() - set(KEYS)
    if unknown:
        name = sorted(unknown)[0]
        raise EvalError(
            f"source.columns: {name!r} is not a document field.{suggestion(name, KEYS)} Fields: {', '.join(KEYS)}."
        )
    from mm_moslora.data.sources.hf_tables import hub_revision, hub_store

    find = find_file if Path(source.path).suffix in READERS else find_data  # a file is no id on the hub
    local = find(source.path, beside=beside)
    tables, sha256 = open_tables(source, local)
    revision = hub_revision(tables[0].table)
    check_columns(tables, source)
    if local is None and source.image_folder is None:  # from the hub: below the fetched files
        folder = hub_store(source.path)[0].resolve()
    else:
        folder = picture_folder(source.image_folder, local or Path(source.path), beside=beside)
    rules = rules_of(folder, source)
    read = [*_documents(tables, source, rules, of_hub=local is None)]
    kept = [document for document in read if document is not None]
    if not any(document.images or document.problem for document in kept):
        refuse_unread_pictures(tables, source)
    dropped = read.count(None)
    documents = checked(kept, source, path=source.path, dropped=dropped)
    return DataSet(documents=documents, path=source.path, sha256=sha256, dropped=dropped, revision=revision)


def _rows(row: Mapping[str, Any], added: Mapping[str, str], source: Source) -> list[tuple[dict[str, Any], str | None]]:
    """The rows that a row of a table stands for, with the columns that the task adds, and the problem with each."""
    more = {name: text or None for name, text in added.items()}
    try:
        return [({**one, **more}, None) for one in source.rows_of(row)]
    except ValueError as error:
        return [({**row, **more}, str(error))]


def _documents(
    tables: Sequence[Table], source: Source, rules: PictureRules, *, of_hub: bool
) -> Iterator[Document | None]:
    """A document for each row; None for one that is left out on purpose, or stands for no row.

    A row without an id, where others have one, has its number with a word, which is the id of no other row.
    """
    from mm_moslora.data.sources.hf_tables import hub_store

    names, file = [name.strip() for name in source.columns.get("image", "image").split(",")], Path(source.path)
    store, number = hub_store(source.path) if of_hub else (), 0
    lacking = "row " if any(source.columns.get("id", "id") in one.names for one in tables) else ""
    for one in tables:
        pictures = Pictures(one.table, names, file=file, rules=rules, store=store)
        for place, row in enumerate(one.table.remove_columns(pictures.columns)):
            rows = _rows(row, one.added, source)
            yield from () if rows else (None,)
            for cells, fault in rows:
                images = pictures.of(place) if pictures.columns else None
                read = partial(_of_row, default_id=f"{lacking}{number}", source=source, rules=rules)
                yield read(cells, fault, images, number=number) if matches(cells, source.where) else None
                number += 1


def _of_row(
    row: Mapping[str, Any], problem: str | None, pictures: Sequence[ImageLike] | None, *, number: int, source: Source,
    rules: PictureRules, default_id: str,
) -> Document:  # fmt: skip
    """The document of a row; `pictures` are those of the table (None: the row names them, if it has any)."""
    columns, file = source.columns, Path(source.path)
    if pictures is None:
        names = columns.get("image", "image").split(",")
        named = [value for name in names for value in _listed(_file_name(row, name.strip()))]
        pictures, unread = pictures_of_record(named, file=file, row=number, rules=rules)
        problem = problem or unread
    videos = _file_name(row, columns.get("video", "video"))
    frames, unshown = frames_of_record(
        videos, lambda name: row.get(columns.get(name, name)), file=file, row=number, rules=rules
    )
    named_texts = {own: str(_file_name(row, name)) for own, name in source.texts.items()}
    texts, unreadable = _texts_beside(named_texts, rules)
    images = (*pictures, *frames)
    read = document({**row, **texts}, columns, default_id=default_id, images=images, answer_is=source.answer_is)
    own = None if read.id in source.unanswerable else read.problem
    read = replace(read, problem=problem or unshown or unreadable or own)
    return with_reference_box(read, source.answer_is) if source.answer_is in BOX_FORMS else read


def _file_name(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or a text such as `data/{videoID}.mp4` with columns in braces."""
    return BRACED.sub(lambda match: str(row.get(match[1], "")), column) if "{" in column else row.get(column)


def document(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    *,
    default_id: str = "0",
    images: Sequence[ImageLike] = (),
    answer_is: str = "auto",
) -> Document:
    """One row as a document."""

    def cell(name: str) -> Any:
        return row.get(columns.get(name, name))

    options, unread = _options(row, columns, lettered=answer_is == "letter")
    identity = str(cell("id") if cell("id") is not None else default_id)
    answers, unknown = answers_of(cell("answer"), options, answer_is, where=identity)
    used = {part.strip() for name in KEYS for part in columns.get(name, name).split(",")}
    return Document(
        id=identity,
        images=tuple(images),
        question=str(cell("question") or ""),
        options=options,
        answers=answers,
        category=_text(cell("category")),
        hint=_text(cell("hint")),
        extra={key: _flat(value) for key, value in row.items() if key not in used and _is_plain(value)},
        problem=unread or unknown,
    )


def _text(value: Any) -> str | None:
    return None if value is None or str(value) in ("", "nan") else str(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, str | int | float) for item in value)
    return isinstance(value, str | int | float)


def _flat(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _options(
    row: Mapping[str, Any], columns: Mapping[str, str], *, lettered: bool
) -> tuple[dict[str, str], str | None]:
    """The options of a row, from one column or several; see `options_of`."""
    names = [name.strip() for name in columns.get("options", "options").split(",")]
    if len(names) > 1:
        return options_of([None if row.get(name) == "N/A" else row.get(name) for name in names], lettered=lettered)
    optional = names[0] == columns.get("question", "question")
    return options_of(row.get(names[0]), lettered=lettered, optional=optional)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


_TIMES = re.compile(r"\d+:\d+:\d+[.,]\d+\s*-->")
_MARKUP = re.compile(r"<[^<>]{0,200}>|\{\\[^{}]{0,200}\}")


def _texts_beside(names: Mapping[str, str], rules: PictureRules) -> tuple[dict[str, str], str | None]:
    """The texts of files below the folder of the data, and the first problem."""
    found: dict[str, str] = {}
    for column, name in names.items():
        try:
            text = read_text_below(rules.folder, name) or ""
        except (FileError, UnicodeDecodeError) as error:
            return found, f"the {column} cannot be read: {error}"
        found[column] = _spoken_lines(text) if name.endswith(".srt") else text
    return found, None


def _spoken_lines(subtitles: str) -> str:
    """The lines of SubRip subtitles without numbers, times and markup; a line that is shown on is kept once."""
    spoken: list[str] = []
    lines = subtitles.replace("\r", "").split("\n")
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        plain = _MARKUP.sub("", line).strip()
        counted = plain.isdecimal() and _TIMES.match(following.strip())
        if plain and not counted and not _TIMES.match(plain) and plain not in spoken[-1:]:
            spoken.append(plain)
    return "\n".join(spoken)

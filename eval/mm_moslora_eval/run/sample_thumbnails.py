"""Small copies of the pictures in reports, written to the run folder during the evaluation.

A run folder may come from another person, and the paths in it may name any file of this machine. A report therefore
opens only files in the run folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mm_moslora.reporting.inline_images import SIDE, encoded
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.files import make_subfolder, replacing
from mm_moslora.utils.untrusted_files import FileError, find_below, read_bytes
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.source_images import Hasher, ImageMode, open_image

FOLDER = "pictures"
"""Folder name within a run folder."""
MOST_SAMPLES = 60
"""Samples shown per task and image mode: first failed, then unreadable, then wrong and right answers."""
MOST_EVIDENCE = 24
"""Number of an evaluation's samples, spread over a task, that a training run keeps."""
MOST_PICTURES = 4
"""Pictures shown per sample."""
_MOST_BYTES = 2**22
_Row = TypeVar("_Row")
_IDENTITY = re.compile(r"[0-9a-f]{64}")


def verdict(row: dict[str, Any]) -> str:
    """The outcome of a sample in one word."""
    if row["failed"]:
        return "failed"
    if row["score"] is None:
        return "unscored"
    if not row["inferable"]:
        return "unread"
    return "right" if row["score"] >= 1.0 else "partly" if row["score"] > 0 else "wrong"


def spread(rows: Sequence[_Row], count: int) -> list[_Row]:
    """At most `count` rows, evenly spread over all rows."""
    if len(rows) <= count:
        return list(rows)
    return [rows[index * len(rows) // count] for index in range(count)] if count else []


def shown_samples(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples for a report, some of every verdict."""
    by_verdict: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_verdict.setdefault(verdict(row), []).append(row)
    chosen: list[dict[str, Any]] = []
    kinds = [by_verdict.get(kind, []) for kind in ("failed", "unread", "wrong", "partly", "right", "unscored")]
    for number, kind in enumerate(kinds):
        left = sum(1 for other in kinds[number:] if other)
        chosen += spread(kind, (MOST_SAMPLES - len(chosen)) // max(1, left))
    return sorted(chosen, key=lambda row: int(row["index"]))


def store_thumbnails(
    run: Path, rows: Sequence[dict[str, Any]], documents: Iterable[Document], *, mode: ImageMode, hasher: Hasher
) -> None:
    """Write small copies of the pictures of the samples for a report."""
    if mode == "blind":
        return
    chosen = [*shown_samples(rows), *spread(rows, MOST_EVIDENCE)]
    wanted = {name for row in chosen for name in row["images"][:MOST_PICTURES] if _file_of(run, name) is None}
    for document in documents:
        for image in document.images if wanted and document.problem is None else ():
            try:
                name = hasher(image)
                if name in wanted:
                    wanted.discard(name)
                    picture = open_image(image)
                    picture.thumbnail((SIDE, SIDE))
                    kind, data = encoded(picture)
                    make_subfolder(run / FOLDER)
                    with replacing(run / FOLDER / f"{name}.{'png' if kind == 'png' else 'jpg'}") as part:
                        part.write_bytes(data)
            except DataError:  # a sample that failed
                continue


def stored_thumbnails(run: Path, row: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Names and bytes of the small copies of a sample's pictures in an evaluation's folder."""
    thumbnails = []
    for name in list(row.get("images") or ())[:MOST_PICTURES]:
        if (path := _file_of(run, name)) is not None:
            try:
                thumbnails.append((path.name, read_bytes(path, most=_MOST_BYTES)))
            except FileError:
                continue
    return thumbnails


def _file_of(run: Path, name: object) -> Path | None:
    if not isinstance(name, str) or not _IDENTITY.fullmatch(name):
        return None
    for suffix in ("jpg", "png"):
        try:
            path = find_below(run.resolve(), f"{FOLDER}/{name}.{suffix}")
        except FileError:
            continue
        if path.is_file():
            return path
    return None

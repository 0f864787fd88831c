"""Small copies of the pictures that reports show, kept in the run folder while the data are at hand.

A run folder may come from somebody else, and the paths in it may name any file of this machine. A report therefore
shows what lies in the run folder and opens nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mm_moslora.reporting.inline_images import SIDE, encoded
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.files import replacing
from mm_moslora.utils.untrusted_files import FileError, find_below, read_bytes
from mm_moslora_eval.sources.document import Document, ImageLike
from mm_moslora_eval.sources.image_controls import Hasher, ImageMode, open_image

FOLDER = "pictures"
"""In a run folder."""
MOST_SAMPLES = 60
"""Samples shown per task and image mode: failures first, then what could not be read, then wrong and right ones."""
MOST_EVIDENCE = 24
"""Samples, spread over a task, that a run of ours keeps of an evaluation."""
MOST_PICTURES = 4
"""Pictures shown of a sample."""
_MOST_BYTES = 2**22
_IDENTITY = re.compile(r"[0-9a-f]{64}")


def verdict(row: dict[str, Any]) -> str:
    """What became of a sample, in a word."""
    if row["failed"]:
        return "failed"
    if row["score"] is None:
        return "unscored"
    if not row["inferable"]:
        return "unread"
    return "right" if row["score"] >= 1.0 else "partly" if row["score"] > 0 else "wrong"


def spread(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` rows, spread over all of them."""
    if len(rows) <= count:
        return list(rows)
    return [rows[index * len(rows) // count] for index in range(count)] if count else []


def shown_samples(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples that a report shows, some of every verdict."""
    by_verdict: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_verdict.setdefault(verdict(row), []).append(row)
    chosen: list[dict[str, Any]] = []
    kinds = [by_verdict.get(kind, []) for kind in ("failed", "unread", "wrong", "partly", "right", "unscored")]
    for number, kind in enumerate(kinds):
        left = sum(1 for other in kinds[number:] if other)
        chosen += spread(kind, (MOST_SAMPLES - len(chosen)) // max(1, left))
    return sorted(chosen, key=lambda row: int(row["index"]))


def keep(
    run: Path, rows: Sequence[dict[str, Any]], documents: Iterable[Document], *, mode: ImageMode, hasher: Hasher
) -> None:
    """Keep small copies of the pictures of the samples that are shown.

    Args:
        run: the evaluation's folder.
        rows: the samples.
        documents: of the task, with their pictures.
        mode: what was shown; of `blind` there is nothing to see.
        hasher: that has named the pictures.
    """
    if mode == "blind":
        return
    chosen = [*shown_samples(rows), *spread(rows, MOST_EVIDENCE)]
    wanted = {name for row in chosen for name in row["images"][:MOST_PICTURES] if _place(run, name) is None}
    for document in documents:
        for image in document.images if wanted and document.problem is None else ():
            try:
                name = hasher(image)
                if name in wanted:
                    wanted.discard(name)
                    _write(run / FOLDER, name, image)
            except DataError:  # a sample that failed
                continue


def _write(folder: Path, name: str, image: ImageLike) -> None:
    picture = open_image(image)
    picture.thumbnail((SIDE, SIDE))
    kind, data = encoded(picture)
    folder.mkdir(exist_ok=True)
    with replacing(folder / f"{name}.{'png' if kind == 'png' else 'jpg'}") as part:
        part.write_bytes(data)


def kept(run: Path, row: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Names and bytes of the small copies of a sample's pictures.

    Args:
        run: the evaluation's folder.
        row: of `samples.jsonl`.
    """
    found = []
    for name in list(row.get("images") or ())[:MOST_PICTURES]:
        if (path := _place(run, name)) is not None:
            try:
                found.append((path.name, read_bytes(path, most=_MOST_BYTES)))
            except FileError:
                continue
    return found


def _place(run: Path, name: object) -> Path | None:
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

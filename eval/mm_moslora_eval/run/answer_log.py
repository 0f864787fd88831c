"""The answer file: JSONL that survives a crash at any moment, one file per process, keyed by content, only added to."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mm_moslora.utils.file_locks import held
from mm_moslora.utils.files import discard, replace_text
from mm_moslora.utils.untrusted_files import MOST_BYTES, FileError, FileFault, read_bytes

logger = logging.getLogger(__name__)

MERGED = "answers.jsonl"
_FLUSH_SECONDS = 2.0

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file; a torn or damaged line is dropped with a warning (its sample is asked again)."""
    rows: list[Row] = []
    data = read_bytes(path, most=MOST_BYTES)
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            torn = number == len(lines)  # no newline after it: the process died while writing
        except (json.JSONDecodeError, UnicodeDecodeError):
            row, torn = None, True
        if torn or not isinstance(row, dict) or "key" not in row:
            logger.warning("%s, line %d is torn or damaged and was dropped; its sample is asked again", path, number)
            continue
        rows.append(row)
    return rows


def read_folder(folder: Path) -> dict[str, Row]:
    """Every stored answer by key; later files and lines win, but an error never replaces an answer."""
    found: dict[str, Row] = {}
    merged = folder / MERGED
    for path in [merged, *sorted(folder.glob("answers-*.jsonl"))]:
        try:
            rows = read_rows(path)
        except FileError as error:
            if error.fault != FileFault.MISSING:
                raise
            continue  # not written yet, or merged by rank 0 in this moment
        for row in rows:
            if row.get("error") is None or found.get(row["key"], row).get("error") is not None:
                found[row["key"]] = row
    return found


def line(row: Mapping[str, Any]) -> str:
    """One row as a line of JSON, key order kept; lone surrogates are escaped."""
    try:
        text = json.dumps(row, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(row)
    return text + "\n"


class AnswerLog:
    """Appends rows to a file of this process's own; flushed and synced per batch and every two seconds.

    A file of its own means that a torn line can only be the last one and that ranks never write into each other.
    """

    def __init__(self, folder: Path, *, rank: int, batch_size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"answers-{rank:04d}-{time.time_ns()}-{os.getpid()}.jsonl"
        self._stream: TextIO | None = None
        self._open = ExitStack()
        self._batch_size = batch_size
        self._waiting = 0
        self._flushed = time.monotonic()

    def __enter__(self) -> AnswerLog:
        self._stream = self._open.enter_context(self.path.open("x", encoding="utf-8"))
        self._open.enter_context(held(self.path, wait=False))  # says that the file still grows
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None
        with self._open:
            self.flush()

    def add(self, row: Row) -> None:
        """Append one row."""
        assert self._stream is not None, "use `with AnswerLog(...)`"
        self._stream.write(line(row))
        self._waiting += 1
        if self._waiting >= self._batch_size or time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Put everything on the disk."""
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._waiting, self._flushed = 0, time.monotonic()


def merge(folder: Path, keys: Iterable[str]) -> None:
    """Gather the files of processes that are done with them in one; no answer is left out.

    Args:
        folder: TASK@PROTOCOL/MODE.
        keys: of the answers that come first, in this order; all others follow as they were stored.
    """
    with ExitStack() as stack:
        ended = [path for path in sorted(folder.glob("answers-*.jsonl")) if _is_ended(path, stack)]
        if not ended:
            return
        rows = read_folder(folder)
        ordered = [rows.pop(key) for key in keys] + list(rows.values())
        replace_text(folder / MERGED, "".join(line(row) for row in ordered))
        for path in ended:
            discard(path)


def _is_ended(path: Path, stack: ExitStack) -> bool:
    """Whether nobody writes the file any more; it stays locked as long as the stack."""
    try:
        stack.enter_context(held(path, wait=False))
    except OSError:
        return False
    return True

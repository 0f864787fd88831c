"""The answer file: append-only, crash-safe JSONL with content-hash keys, one file per process."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import discard, replace_text
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_object
from mm_moslora.utils.untrusted_files import MOST_BYTES, FileError, FileFault, read_bytes
from mm_moslora_eval.protocol.model_interface import Answer, OptionScore
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.request_preparation import Item
from mm_moslora_eval.run.stored_types import StoredAnswer, check_row

logger = logging.getLogger(__name__)

MERGED = "answers.jsonl"
_FLUSH_SECONDS = 2.0

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file; an incomplete or damaged line is dropped with a warning (its sample is asked again)."""
    rows: list[Row] = []
    data = read_bytes(path, most=MOST_BYTES)
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = parse_object(line, constants=True)
            check_row(StoredAnswer, row, source="it")
            torn = number == len(lines)  # without a newline: the process died while writing
        except (StrictJsonError, EvalError):
            torn = True
        if torn:
            logger.warning("%s, line %d is torn or damaged and was dropped; its sample is asked again", path, number)
            continue
        rows.append(row)
    return rows


def read_folder(folder: Path) -> dict[str, Row]:
    """Every stored answer by key; later files and lines take priority, but an error never replaces an answer."""
    answers: dict[str, Row] = {}
    merged = folder / MERGED
    for path in [merged, *sorted(folder.glob("answers-*.jsonl"))]:
        try:
            rows = read_rows(path)
        except FileError as error:
            if error.fault != FileFault.MISSING:
                raise
            continue  # not written yet, or just merged by rank 0
        for row in rows:
            if row.get("error") is None or answers.get(row["key"], row).get("error") is not None:
                answers[row["key"]] = row
    return answers


def line(row: Mapping[str, Any]) -> str:
    """One row as a line of JSON in key order; lone surrogates are escaped."""
    try:
        text = json.dumps(row, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(row)
    return text + "\n"


class AnswerLog:
    """Appends rows to this process's own file; flushed and synced per batch and every two seconds.

    With one file per process only the last line can be incomplete, and lines of ranks cannot mix.
    """

    def __init__(self, folder: Path, *, rank: int, batch_size: int) -> None:
        self.path = folder / f"answers-{rank:04d}-{time.time_ns()}-{os.getpid()}.jsonl"
        self._stream: TextIO | None = None
        self._open = ExitStack()
        self._batch_size = batch_size
        self._waiting = 0
        self._flushed = time.monotonic()

    def __enter__(self) -> AnswerLog:
        self._stream = self._open.enter_context(self.path.open("x", encoding="utf-8"))
        self._open.enter_context(lock_file(self.path, wait=False))  # the lock marks a file that is still written
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
        """Flush and sync the file."""
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._waiting, self._flushed = 0, time.monotonic()


def merge(folder: Path, keys: Iterable[str]) -> None:
    """Merge the files of finished processes into one, answers to `keys` first, in their order; no answer is lost."""
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
    """Whether no process writes the file any more; it then stays locked until the stack is closed."""
    try:
        stack.enter_context(lock_file(path, wait=False))
    except OSError:
        return False
    return True


def answer_row(item: Item, result: Answer | Sequence[OptionScore], task: Task) -> Row:
    """What a row holds of a model's output."""
    if isinstance(result, Answer):
        if not isinstance(result.text, str):  # a backend of another package
            raise TypeError(f"the model answered with {result.text!r}, expected text")
        row = {"text": result.text, "tokens": result.tokens, "finish_reason": result.finish_reason}
        row |= {} if result.boxes is None else {"boxes": result.boxes}
        row |= {} if result.prompt_tokens is None else {"prompt_tokens": result.prompt_tokens}
        return row | {"reference": _reference(task.reference_of(item.document), result.reference)}
    letters = list(item.document.options)
    scores = {letter: score.logprob for letter, score in zip(letters, result, strict=True)}
    _refuse_unordered(scores)
    best = max(range(len(result)), key=lambda index: result[index].logprob)
    right = item.document.reference
    reference = result[letters.index(right)] if right in letters else None
    return {
        "text": letters[best], "tokens": result[best].tokens, "finish_reason": "stop", "options": scores,
        "reference": _reference(right, reference),
    }  # fmt: skip


def _refuse_unordered(scores: Mapping[str, float]) -> None:
    """Refuse log-likelihoods without a largest: comparisons with NaN make an answer of the order of the options."""
    wrong = [f"{letter}: {score}" for letter, score in scores.items() if math.isnan(score) or score == math.inf]
    if wrong or (scores and max(scores.values()) == -math.inf):
        what = ", ".join(wrong) or "all are -inf"
        raise ValueError(f"the log-likelihoods of the options name no answer ({what}), expected finite numbers or -inf")


def _reference(text: str, score: OptionScore | None) -> dict[str, Any] | None:
    if score is None or not math.isfinite(score.logprob):
        return None
    return {"text": text, "logprob": round(score.logprob, 6), "tokens": score.tokens}

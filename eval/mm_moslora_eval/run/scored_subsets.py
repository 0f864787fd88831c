"""Views of stored answers: a selection of documents with the rules that score them, and the scored samples.

The answers of a task are stored once per TASK@PROTOCOL/MODE, keyed by content, and never removed. A data set or a
selection of it is a view with its own sub-folder, named after the selection and its checksum. Another selection, or
another data set of the same name, is a further view and replaces none.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moslora.utils import files
from mm_moslora.utils.errors import EvalError, MoSLoRAError
from mm_moslora.utils.files import replace_text
from mm_moslora.utils.identity import sha256_of_values
from mm_moslora.utils.untrusted_data import StrictJsonError, build_strictly, parse_lines
from mm_moslora.utils.untrusted_files import MOST_TEXT_BYTES, find_below, read_bytes, read_text
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.answer_log import line
from mm_moslora_eval.run.request_preparation import Item
from mm_moslora_eval.run.stored_types import StoredDocument, StoredSample, TaskSample, check_row, check_view
from mm_moslora_eval.scoring.scored_sample import Scored, with_scores
from mm_moslora_eval.sources.document import DataSet, Document

TASK, DOCUMENTS, SAMPLES = "task.json", "documents.jsonl", "samples.jsonl"
SHARDS = "shards"
"""Folder within a run whose answers were divided, see `answer_shards`."""
RESCORED = "-as-"
"""Part of the name of a view that is scored by another protocol than that of its prompts."""
_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class DocumentSelection:
    """The documents of a data set that were asked."""

    name: str
    """all, `first 5`, `3 chosen`, or `100 by category`."""
    n: int
    of: int
    """Documents of the data set."""
    sha256: str
    """Hash over the selected documents with their references and pictures."""
    whole_for: str
    """The aggregation of which it holds all documents that count together."""

    @property
    def folder(self) -> str:
        """Name of the view's folder."""
        return f"{self.name.replace(' ', '-')}-{self.sha256[:_SHOWN]}"

    @property
    def text(self) -> str:
        """Display text; empty for a whole data set."""
        return "" if self.name == "all" else f"{self.name} of {self.of}"


def selection_of(
    items: Sequence[Item], data: DataSet, *, aggregation: str, stratify: str | None = None
) -> DocumentSelection:
    """The selection that the items make of their data set; `stratify` as for `EvaluationSettings`."""
    ids, all_ids = [item.document.id for item in items], [document.id for document in data.documents]
    by = None if stratify is None else f"{len(ids)} by " + re.sub(r"[^\w.-]", "_", stratify)
    plain = f"first {len(ids)}" if ids == all_ids[: len(ids)] else f"{len(ids)} chosen"
    name = "all" if ids == all_ids else by or plain
    content = [[item.document.hash, list(item.own_ids)] for item in items]
    return DocumentSelection(
        name=name, n=len(ids), of=len(all_ids), sha256=sha256_of_values(content), whole_for=aggregation
    )


def views_below(folder: Path) -> list[Path]:
    """Every view in a run, a task folder or a mode of it; shards are no views."""
    views = (path.parent for path in folder.glob(f"**/{TASK}"))
    return sorted(view for view in views if SHARDS not in view.relative_to(folder).parts)


def find_view(folder: Path) -> Path:
    """The view of a folder: the folder itself, or of several views the one with the most documents, then the latest.

    A view that was scored by another protocol must be named explicitly.
    """
    if (folder / TASK).is_file() or (folder / DOCUMENTS).is_file():
        return folder
    views = [path.parent for path in folder.glob(f"*/{TASK}")] if folder.is_dir() else []
    if not views:
        raise EvalError(
            f"{folder / TASK} is missing; expected the folder TASK@PROTOCOL/MODE of a run, or a view in it."
        )
    own = [view for view in views if RESCORED not in view.name] or views
    return max(own, key=lambda view: (_count(view), (view / TASK).stat().st_mtime_ns, view.name))


def view_below(run: Path, name: object) -> Path:
    """The folder that a file of a run names as a view."""
    root = Path(os.path.realpath(run))
    for part in (TASK, DOCUMENTS, SAMPLES):
        find_below(root, f"{name}/{part}")
    return find_below(root, name)


def _count(view: Path) -> int:
    path = view / DOCUMENTS
    return read_bytes(path, most=MOST_TEXT_BYTES).count(b"\n") if path.is_file() else 0


def run_of(view: Path) -> Path:
    """The run folder of a view."""
    return view.parents[2]


def folder_of(view: Path) -> str:
    """The view relative to its run folder."""
    return view.relative_to(run_of(view)).as_posix()


def task_of(view: Path) -> Task | None:
    """The rules by which a view was scored; None if the samples are no answers to a task."""
    path = view / TASK
    return build_strictly(Task, read_view(view)["task"], source=str(path)) if path.is_file() else None


def read_view(view: Path) -> dict[str, Any]:
    """The `task.json` of a view."""
    return check_view(read_json(view / TASK), source=str(view / TASK))


def documents_of(view: Path) -> list[dict[str, Any]]:
    """The documents of a view with their prompts and keys, as rows."""
    path = view / DOCUMENTS
    if not path.is_file():
        raise EvalError(f"{path} is missing: {view} is not a task folder of a run.")
    rows = read_lines(path)
    ids = {check_row(StoredDocument, row, source=f"{path}, line {n}").id for n, row in enumerate(rows, start=1)}
    if len(ids) < max(1, len(rows)):
        raise EvalError(f"{path} is damaged: it holds {len(rows)} documents with {len(ids)} ids.")
    return rows


def write_samples(
    view: Path, rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]], scored: Sequence[Scored], *,
    repeated: Sequence[Sequence[Scored]],
) -> None:  # fmt: skip
    """Write `samples.jsonl`: every document with its answer and its score, and with all of several answers."""
    samples = [
        _sample(index, row, answer, one) | (_repeated(several) if len(several) > 1 else {})
        for index, (row, answer, one, several) in enumerate(zip(rows, answers, scored, repeated, strict=True))
    ]
    replace_text(view / SAMPLES, "".join(line(sample) for sample in samples))


def _sample(index: int, row: dict[str, Any], answer: dict[str, Any], scored: Scored) -> dict[str, Any]:
    error = last_line(answer["error"]) or scored.fault or None
    copied = ("id", "category", "question", "hint", "options", "answers", "prompt", "images", "paths", "cluster")
    return {
        "index": index,
        **{name: row[name] for name in copied},
        "text": None if answer["text"] is None else scored.text if "more_keys" in row else answer["text"],
        "parsed": scored.parsed,
        "numbers": list(scored.numbers),
        **({"judged": True} if scored.judged else {}),
        "inferable": bool(scored.parsed.strip()),
        "score": None if math.isnan(scored.score) else scored.score,
        "failed": scored.failed,
        "error": error,
        "finish_reason": answer["finish_reason"],
        "tokens": answer["tokens"],
        "logprobs": answer["options"],
        **({"reference": answer["reference"]} if "reference" in answer else {}),
    }


def _repeated(several: Sequence[Scored]) -> dict[str, Any]:
    """All answers to a document; the text of its sample is that of the answer that stands for them."""
    return {
        "repeated": [
            {"text": one.text, "parsed": one.parsed, "score": None if math.isnan(one.score) else one.score}
            for one in several
        ]
    }


def last_line(error: str | None) -> str | None:
    """The last line of a traceback; None without an error."""
    return (error.strip().splitlines() or ["no message"])[-1] if error else None


def read_samples(source: Path) -> list[dict[str, Any]]:
    """The rows of a `samples.jsonl`, given the file, its view, or TASK@PROTOCOL/MODE."""
    path = find_view(source) / SAMPLES if source.is_dir() else Path(os.path.realpath(source))  # a user's path
    if not path.is_file():
        raise EvalError(f"{path} is missing; expected a `samples.jsonl` or the folder TASK@PROTOCOL/MODE of a run.")
    rows = read_lines(path)
    for row in rows:
        check_row(StoredSample, row, source=f"{path}: sample {row.get('id')!r}")
    return rows


def read_scored(folder: Path) -> list[Scored]:
    """The samples of a task folder; the score of one without a score is nan."""
    view = find_view(folder)
    path = view / SAMPLES
    if not path.is_file():
        raise EvalError(f"{path} is missing; score the folder first.")
    rows = read_lines(path)
    documents = list(map(Document.from_dict, documents_of(view)))
    if [row.get("id") for row in rows] != [document.id for document in documents]:
        raise EvalError(f"{path} is damaged: its samples are not those of {DOCUMENTS}. Score the folder again.")
    return [scored_row(row, document) for document, row in zip(documents, rows, strict=True)]


def scored_row(row: dict[str, Any], document: Document) -> Scored:
    """A row of `samples.jsonl` as input of an aggregation."""
    one = check_row(TaskSample, row, source=f"sample {document.id!r}")
    return Scored(
        document=document, text=one.text or "", parsed=one.parsed, score=math.nan if one.score is None else one.score,
        failed=one.failed, cluster=one.cluster, numbers=one.numbers, judged=one.judged,
    )  # fmt: skip


def has_scores(view: Path) -> bool:
    """Whether samples of a view have a score."""
    try:
        return bool(with_scores(read_scored(view)))
    except MoSLoRAError:
        return False


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file of a run. Anybody may have made it: a link must not lead out of its folder."""
    try:
        return parse_lines(read_text(find_below(Path(os.path.realpath(path.parent)), path.name)))
    except StrictJsonError as error:
        raise EvalError(f"{path} {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run; see `files.read_json`."""
    try:
        return dict(files.read_json(path))
    except (OSError, ValueError) as error:
        raise EvalError(f"{error}. Expected the folder of a task within a run.") from error

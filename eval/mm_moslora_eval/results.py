"""Scores of a run folder: from answers to `samples.jsonl` and `results.json`. Needs no model, no data set, no torch."""

from __future__ import annotations

import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.errors import EvalError
from mm_moslora.strict import build_strictly

from .aggregation import AGGREGATIONS
from .answers import line, read_folder, write_atomically
from .documents import Document
from .requests import FORMAT
from .scored import Aggregate, Scored, mean_with_error
from .scoring import JUDGED, score_answer
from .task import Task

if TYPE_CHECKING:
    from .judge import Judge


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the documents; `total` is what the data set has (after `limit`)."""

    total: int
    scored: int
    failed: int
    """No answer; counted as wrong in the headline score."""
    not_inferable: int
    """Answered, but the extraction read nothing; wrong."""
    truncated: int
    """Cut off by max_new_tokens."""
    dropped: int = 0
    """Rows that the protocol leaves out."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One line of the table: a task under a protocol in one image mode, or a baseline."""

    task: str
    protocol: str
    version: int
    mode: str
    """own, blind, wrong; majority or question_majority for baselines."""
    n: int
    score: float
    stderr: float
    low: float
    high: float
    stderr_kind: str
    counts: Counts
    completed: dict[str, float]
    """n, score and stderr over the samples that were answered."""
    metrics: dict[str, float] = field(default_factory=dict)
    categories: dict[str, dict[str, float]] = field(default_factory=dict)
    """n, score, stderr, low, high per category."""
    about: dict[str, Any] = field(default_factory=dict)
    """Protocol, data, model, seed, first prompt."""

    @property
    def id(self) -> str:
        """Task, protocol and mode."""
        return f"{self.task}@{self.protocol}/{self.mode}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; nan becomes None."""
        return _plain(asdict(self))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def result_from_dict(data: dict[str, Any]) -> TaskResult:
    """The inverse of `TaskResult.to_dict`."""
    counts = Counts(**data["counts"])
    numbers = {name: float("nan") if data[name] is None else data[name] for name in ("score", "stderr", "low", "high")}
    return TaskResult(**{**data, **numbers, "counts": counts})


def score_folder(place: Path, *, task: Task | None = None, judge: Judge | None = None) -> TaskResult:
    """Score the answers of one task folder and write `samples.jsonl`.

    A task that only a judge can score is left unscored without one: its score is nan, `about["unscored"]` says why, and
    a submission file lies beside the answers.

    Args:
        place: the folder that `runner.run_task` returned.
        task: score with this task's extraction, metric and aggregation instead of those it was asked with.
        judge: grades free answers.

    Raises:
        EvalError: files are missing or of another format, or documents have no answer yet.
    """
    described = _read_json(place / "task.json")
    if described.get("format") != FORMAT:
        raise EvalError(
            f"{place} has format {described.get('format')!r}, this version reads {FORMAT}; "
            "score it with the version that wrote it."
        )
    task = task or build_strictly(Task, described["task"], source=str(place / "task.json"))
    rows = _documents(place)
    answers = read_folder(place)
    missing = [row["id"] for row in rows if row["key"] not in answers]
    if missing:
        raise EvalError(
            f"{place}: {len(missing)} of {len(rows)} documents have no answer yet (first: {missing[0]!r}); "
            "run the evaluation again, it goes on where it stopped."
        )
    given = [answers[row["key"]] for row in rows]
    about = {key: described[key] for key in ("model", "seed", "data", "first_prompt")}
    texts = [(Document.from_dict(row), answer["text"]) for row, answer in zip(rows, given, strict=True)]
    scored, reason = _scored(task, texts, [row["cluster"] for row in rows], judge)
    if judge is not None:
        about["judge"] = judge.to_dict()
    samples = [
        _sample(index, row, answer, one)
        for index, (row, answer, one) in enumerate(zip(rows, given, scored, strict=True))
    ]
    write_atomically(place / "samples.jsonl", "".join(line(sample) for sample in samples))
    truncated = sum(answer["finish_reason"] == "length" for answer in given)
    if reason is not None:
        about["unscored"] = f"{reason} {_submit(task, place)}"
        return unscored(task, scored, mode=described["mode"], about=about, truncated=truncated)
    return summarise(task, scored, mode=described["mode"], about=about, truncated=truncated)


def _scored(
    task: Task, given: Sequence[tuple[Document, str | None]], clusters: Sequence[str], judge: Judge | None
) -> tuple[list[Scored], str | None]:
    """Samples with their scores, and why there is no score, if there is none."""
    if all(not document.answers for document, _ in given) and task.metric not in JUDGED:
        return _without_scores(given, clusters), "The data holds no reference answers."
    if task.metric not in JUDGED:
        if judge is not None and task.extraction == "mathvista":
            from .judge import extract_mathvista

            given = [(document, text and extract_mathvista(judge, document, text)) for document, text in given]
        pairs = zip(given, clusters, strict=True)
        rules = {"extraction": task.extraction, "metric": task.metric}
        return [score_answer(document, text, cluster=cluster, **rules) for (document, text), cluster in pairs], None
    plain = _without_scores(given, clusters)
    if judge is None:
        return plain, "Only a judge can score this task, and none was given (--judge)."
    from .judge import BudgetError, grade_all

    try:
        grades = grade_all(judge, task.metric, given)
    except BudgetError as error:
        return plain, str(error)
    graded = []
    for sample, grade in zip(plain, grades, strict=True):
        readable = grade is not None and grade.readable
        graded.append(
            replace(
                sample, score=grade.score if grade else 0.0, parsed=grade.reply if grade and readable else "",
                numbers=grade.numbers if grade else (),
            )
        )  # fmt: skip
    return graded, None


def _without_scores(given: Sequence[tuple[Document, str | None]], clusters: Sequence[str]) -> list[Scored]:
    return [
        Scored(
            document=document, text=text or "", parsed=text or "", score=math.nan, failed=text is None, cluster=cluster
        )
        for (document, text), cluster in zip(given, clusters, strict=True)
    ]


def _submit(task: Task, place: Path) -> str:
    from .submissions import DEFAULT_FORM, SUFFIXES, write_submission

    form = DEFAULT_FORM.get(task.name, "vlmevalkit")
    path = place / f"submission.{SUFFIXES.get(form, 'json')}"
    write_submission(place, path, form=form)
    return f"The answers were written to {path} in the form {form!r}."


def unscored(
    task: Task, samples: Sequence[Scored], *, mode: str, about: dict[str, Any], truncated: int = 0
) -> TaskResult:
    """The result of a task that has answers but no score."""
    failed = sum(sample.failed for sample in samples)
    nan = math.nan
    return TaskResult(
        task=task.name, protocol=task.protocol, version=task.version, mode=mode, n=len(samples), score=nan, stderr=nan,
        low=nan, high=nan, stderr_kind="none",
        counts=Counts(
            total=len(samples), scored=0, failed=failed, not_inferable=0, truncated=truncated,
            dropped=about.get("data", {}).get("dropped", 0),
        ),
        completed={"n": len(samples) - failed}, about=_protocol(task) | about,
    )  # fmt: skip


def _protocol(task: Task) -> dict[str, Any]:
    return {
        "title": task.title,
        "prompt": asdict(task.prompt),
        "decoding": asdict(task.decoding),
        "extraction": task.extraction,
        "metric": task.metric,
        "aggregation": task.aggregation,
        "expected_count": task.expected_count,
        "licence": task.licence,
        "unverified": list(task.unverified),
        "published": [asdict(row) for row in task.published],
        "notes": task.notes,
    }


def summarise(
    task: Task, scored: Sequence[Scored], *, mode: str, about: dict[str, Any], truncated: int = 0
) -> TaskResult:
    """Add scored samples up; N scored equals N in the data, or this fails."""
    headline = AGGREGATIONS[task.aggregation](scored)
    done = [sample for sample in scored if not sample.failed]
    failed = len(scored) - len(done)
    completed = headline if failed == 0 else AGGREGATIONS[task.aggregation](done) if done else None
    assert len({sample.document.id for sample in scored}) == len(scored), "every document is scored exactly once"
    return TaskResult(
        task=task.name,
        protocol=task.protocol,
        version=task.version,
        mode=mode,
        n=len(scored),
        score=headline.score,
        stderr=headline.stderr,
        low=headline.low,
        high=headline.high,
        stderr_kind=headline.stderr_kind,
        counts=Counts(
            total=len(scored),
            scored=len(done),
            failed=failed,
            not_inferable=sum(not sample.parsed.strip() for sample in done),
            truncated=truncated,
            dropped=about.get("data", {}).get("dropped", 0),
        ),
        completed={"n": len(done)} | ({"score": completed.score, "stderr": completed.stderr} if completed else {}),
        metrics=headline.metrics,
        categories=_categories(task, scored),
        about=_protocol(task) | about,
    )


def _categories(task: Task, scored: Sequence[Scored]) -> dict[str, dict[str, float]]:
    """Means per category and second-level category; over whole questions where rotations count as one."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for sample in scored:
        for name in {sample.document.category, sample.document.extra.get("l2-category")} - {None}:
            groups[str(name)].append(sample)
    add_up = AGGREGATIONS["circular"] if task.aggregation == "circular" else mean_with_error
    return {name: _numbers(add_up(members), len(members)) for name, members in sorted(groups.items())}


def _numbers(aggregate: Aggregate, count: int) -> dict[str, float]:
    return {
        "n": count,
        "score": aggregate.score,
        "stderr": aggregate.stderr,
        "low": aggregate.low,
        "high": aggregate.high,
    }


def _sample(index: int, row: dict[str, Any], answer: dict[str, Any], scored: Scored) -> dict[str, Any]:
    error = answer["error"].strip().splitlines()[-1] if answer["error"] else None
    kept = ("id", "category", "question", "hint", "options", "answers", "prompt", "images", "paths", "cluster")
    return {
        "index": index,
        **{name: row[name] for name in kept},
        "text": answer["text"],
        "parsed": scored.parsed,
        "inferable": bool(scored.parsed.strip()),
        "score": None if math.isnan(scored.score) else scored.score,
        "failed": scored.failed,
        "error": error,
        "finish_reason": answer["finish_reason"],
        "tokens": answer["tokens"],
        "logprobs": answer["options"],
    }


def read_scored(place: Path) -> list[Scored]:
    """The scored samples of a task folder, as an aggregation takes them.

    Raises:
        EvalError: it is no such folder, or has not been scored.
    """
    path = place / "samples.jsonl"
    if not path.is_file():
        raise EvalError(f"{path} is missing; score the folder first.")
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n") if text]
    return [
        Scored(
            document=Document.from_dict(document), text=row["text"] or "", parsed=row["parsed"], score=row["score"],
            failed=row["failed"], cluster=row["cluster"],
        )
        for document, row in zip(_documents(place), rows, strict=True)
    ]  # fmt: skip


def _documents(place: Path) -> list[dict[str, Any]]:
    path = place / "documents.jsonl"
    if not path.is_file():
        raise EvalError(f"{path} is missing: {place} is not a task folder of a run.")
    return [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n") if text]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except FileNotFoundError as error:
        raise EvalError(f"{path} is missing; expected the folder of a task within a run.") from error
    except json.JSONDecodeError as error:
        raise EvalError(f"{path} is damaged ({error}).") from error


def environment() -> dict[str, str]:
    """Versions that can change an answer or a score."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "machine": platform.machine()}
    for package in ("mm-moslora", "torch", "transformers", "peft", "pillow", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_results(folder: Path) -> list[TaskResult]:
    """The results of a run so far; none yet is an empty list."""
    path = folder / "results.json"
    if not path.is_file():
        return []
    data = _read_json(path)
    if data.get("format") != FORMAT:
        raise EvalError(
            f"{path} has format {data.get('format')!r}, this version reads {FORMAT}; choose another folder."
        )
    return [result_from_dict(item) for item in data["results"]]


def write_results(folder: Path, results: Sequence[TaskResult]) -> None:
    """Merge results into the run's `results.json` (atomically); the same task and mode is replaced."""
    merged = {result.id: result for result in read_results(folder)} | {result.id: result for result in results}
    data = {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(),
        "results": [result.to_dict() for result in merged.values()],
    }
    write_atomically(folder / "results.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")

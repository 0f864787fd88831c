"""The scores of a task by a judge, and how far it agrees with answers that people or another judge have graded.

A file of graded answers has a JSON object a line: `response` (or `text`, as in `samples.jsonl`), `grade` from 0 to 1,
and the document: `question`, `answers` (or `answer`), `options`, `category`, `hint`, and further columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from mm_moslora.utils.errors import ConfigError, EvalError, MoSLoRAError
from mm_moslora.utils.identity import sha256_of_text, sha256_of_values
from mm_moslora.utils.untrusted_data import build_known, parse_lines
from mm_moslora.utils.untrusted_files import read_text, read_text_below
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.judging.answer_graders import needs_judge, prompt_of
from mm_moslora_eval.run.judging.judged_scores import judged, score_by_rules, shortened
from mm_moslora_eval.run.judging.llm_judge import Judge
from mm_moslora_eval.scoring.answer_scoring import JUDGED
from mm_moslora_eval.scoring.measured_scores import aggregate
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document

GRADED = "graded.jsonl"
"""Copy of a task's graded answers in a view, so that scoring needs no data."""
SAME = 0.05
"""Grades that differ by less are the same: half a step of MM-Vet's."""


@dataclass(frozen=True, kw_only=True)
class _GradedAnswer:
    grade: float
    response: str = ""
    text: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()
    answer: str = ""
    options: dict[str, str] = field(default_factory=dict)
    category: str | None = None
    hint: str | None = None


_KEYS = frozenset(_GradedAnswer.__dataclass_fields__)


def read_graded(text: str, *, source: str) -> list[tuple[Scored, float]]:
    """Graded answers with their grades."""
    try:
        rows = parse_lines(text)
    except ValueError as error:
        raise EvalError(f"{source} {error}") from error
    graded = []
    for number, row in enumerate(rows, start=1):
        try:
            read = build_known(_GradedAnswer, row, source=f"{source}, line {number}")
        except ConfigError as error:
            raise EvalError(str(error)) from error
        response = read.response or read.text
        if not 0 <= read.grade <= 1 or not response:
            raise EvalError(
                f"{source}, line {number}: expected `response`, a text, and `grade`, 0 to 1; found a response of "
                f"{len(response)} characters and grade {read.grade}."
            )
        document = Document(
            id=str(number), question=read.question, options=read.options,
            answers=read.answers or ((read.answer,) if read.answer else ()), category=read.category, hint=read.hint,
            extra={key: str(value) for key, value in row.items() if key not in _KEYS},
        )  # fmt: skip
        graded.append((Scored(document=document, text=response, parsed="", score=math.nan), read.grade))
    if not graded:
        raise EvalError(f"{source} holds no graded answers, expected a JSON object a line.")
    return graded


def check_judge(judge: Judge, task: Task, view: Path) -> dict[str, Any] | None:
    """The agreement of a judge with graded answers of `--judge-check`, or of the task; None without such answers.

    An answer to which the judge gives no readable reply counts as one on which it disagrees.
    """
    path = judge.graded or view / GRADED
    text = read_text(path) if judge.graded is not None else read_text_below(view, GRADED)
    if text is None:
        return None
    graded = read_graded(text, source=str(path))
    found = judged(judge, task, [sample for sample, _ in graded])
    off = [abs(sample.score - grade) for sample, (_, grade) in zip(found, graded, strict=True)]
    same = [
        Scored(document=sample.document, text="", parsed="", score=float(difference < SAME))
        for sample, difference in zip(found, off, strict=True)
    ]
    share = aggregate("mean", same)
    read = [difference for difference in off if not math.isnan(difference)]
    return {
        "file": path.name, "sha256": sha256_of_text(text), "n": len(same),
        "agreed": round(sum(sample.score for sample in same)), "share": share.value, "low": share.low,
        "high": share.high, "mean_difference": fmean(read) if read else None, "unreadable": len(off) - len(read),
        "least": judge.least_agreement,
    }  # fmt: skip


def graded_text(task: Task) -> str:
    """The text of the task's file of graded answers, checked; empty without one."""
    if task.grading is None or not task.grading.check:
        return ""
    path = Path(task.folder or ".") / task.grading.check
    text = read_text(path)
    read_graded(text, source=str(path))
    return text


@dataclass(kw_only=True)
class TaskJudgement:
    """What became of the samples of a task."""

    samples: list[Scored] | None = None
    """With their scores; None without."""
    problem: str = ""
    """The reason for missing scores; empty where the task needs no judge."""
    failed: bool = False
    """The judge failed."""
    about: dict[str, Any] = field(default_factory=dict)
    """`judge` and `by_rules` of `TaskResult.about`."""


def judgement(judge: Judge | None, task: Task, samples: Sequence[Scored], *, view: Path) -> TaskJudgement:
    """Score samples with a judge, and without it where a rule can."""
    result = TaskJudgement()
    if needs_judge(task) and (ruled := score_by_rules(task, samples)) is not None:
        result.about["by_rules"] = ruled
    if judge is None:
        if task.metric in JUDGED:
            result.problem = "Only a judge can score this task, and none was given (--judge)."
        return result
    named: dict[str, Any] = {}
    if needs_judge(task):
        wording, prompt = prompt_of(task)
        named |= {"wording": wording, "prompt_sha256": sha256_of_values(prompt)}
        named |= {"shortened": count} if (count := shortened(samples)) else {}
        try:
            if (found := check_judge(judge, task, view)) is not None:
                named["agreement"] = found
            result.samples = judged(judge, task, samples)
        except MoSLoRAError as error:
            result.problem, result.failed = str(error), True
    result.about["judge"] = judge.to_dict() | named
    return result

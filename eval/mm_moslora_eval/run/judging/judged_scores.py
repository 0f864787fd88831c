"""The scores of a task by a judge and by the rules that need none, and how far the judge agrees with graded answers.

A file of graded answers has a JSON object a line: `response` (or `text`, as in `samples.jsonl`), `grade` from 0 to 1,
and the document: `question`, `answers` (or `answer`), `options`, `category`, `hint`, and further columns. Prompts of
benchmarks are worded by this project in every protocol (`WORDING`); a task with `metric: judge` has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from mm_moslora.utils.errors import ConfigError, EvalError, MoSLoRAError
from mm_moslora.utils.identity import sha256_of_text, sha256_of_values
from mm_moslora.utils.untrusted_data import build_known, parse_lines
from mm_moslora.utils.untrusted_files import read_text, read_text_below
from mm_moslora_eval.backends.endpoints.parallel_calls import in_parallel
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.judging.llm_judge import Judge
from mm_moslora_eval.scoring.answer_scoring import JUDGED, score_answer
from mm_moslora_eval.scoring.measured_scores import aggregate, whole_questions
from mm_moslora_eval.scoring.named_parts import NamedParts
from mm_moslora_eval.scoring.rule_forms import FINAL_ANSWER, Grade, JudgeRule
from mm_moslora_eval.scoring.score_aggregation import AggregationError
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.task_files.task_rules import rule

WORDING = "mm_moslora 2"
"""Name in result files of the prompts in `rules.py`, which are this project's own in every protocol."""


Grader = Callable[[Judge, Document, str], Grade | None]
GRADERS: NamedParts[Grader] = JUDGED
"""Metric of a task -> function with which a judge grades one answer; None: its replies cannot be read. An imported
file adds some; an attribute `prompt` of theirs is the text that is hashed."""


def judged_extraction(extraction: str) -> tuple[Callable[[Judge, Document, str], str | None], str] | None:
    """The function with which a judge finds the answer, and the extraction that parses it; None where no judge does."""
    return rule("JUDGED_EXTRACTIONS", extraction)


def needs_judge(task: Task) -> bool:
    """Whether a judge grades the answers to a task or finds them."""
    return task.metric in GRADERS or judged_extraction(task.extraction) is not None


def grader_of(task: Task) -> Grader:
    """The function that grades an answer to a task."""
    if task.grading is not None:
        return partial(grade_by_prompt, task=task)
    return GRADERS[task.metric] if task.metric in GRADERS else partial(_grade_extracted, task=task)


def prompt_of(task: Task) -> tuple[str, str]:
    """The name of the judge's wording, and its text without the document."""
    if task.grading is not None:
        return f"{task.id} version {task.version}", task.grading.prompt
    if task.metric not in GRADERS:
        return WORDING, FINAL_ANSWER
    if origin := GRADERS.origin(task.metric):
        return " ".join(origin.values()), str(getattr(GRADERS.find(task.metric), "prompt", ""))
    return WORDING, cast(JudgeRule[Any], GRADERS.find(task.metric)).wording


def grade_by_prompt(judge: Judge, document: Document, answer: str, *, task: Task) -> Grade | None:
    """The grade that a judge gives by the prompt of the task file (`grading`), whose replies alone count."""
    grading = task.grading
    assert grading is not None
    graded = judge.ask(grading.text(document, answer), grading.read, max_tokens=grading.max_tokens)
    return None if graded is None else Grade(score=graded[0], parsed=graded[1])


def _grade_extracted(judge: Judge, document: Document, answer: str, *, task: Task) -> Grade | None:
    """The score of the answer that a judge finds."""
    found = judged_extraction(task.extraction)
    assert found is not None
    find, then = found
    text = find(judge, document, answer)
    if text is None:
        return None
    scored = score_answer(document, text, extraction=then, metric=task.metric)
    return Grade(score=scored.score, parsed=scored.parsed)


GRADED = "graded.jsonl"
"""Copy of a task's graded answers in a view, so that scoring needs no data."""
SAME = 0.05
"""Grades that differ by less are the same: half a step of MM-Vet's."""

MOST_UNREADABLE = 0.05
"""Share of the graded answers without a readable reply, above which a task stays unscored."""
LONGEST_ANSWER = 32_000
"""Characters of an answer that a judge is shown; of a longer one the beginning and the end."""
_SHOWN = 100


def judged(judge: Judge, task: Task, samples: Sequence[Scored]) -> list[Scored]:
    """Score samples with a judge.

    A missing answer and an unfinished thinking block score 0 without the judge. The score of an answer to which the
    judge gives no readable reply is nan.
    """
    grader = grader_of(task)
    seen = [sample.visible for sample in samples]
    answered = [index for index, sample in enumerate(samples) if not sample.failed and not seen[index].unclosed]
    result = [replace(sample, score=0.0, parsed="", judged=True) for sample in samples]
    ungraded = 0
    most = MOST_UNREADABLE * len(answered)
    unread: list[int] = []

    def grade_of(index: int) -> Grade | None:
        # Counted where the replies come, so that no worker asks on while this thread waits for its turn.
        if len(unread) > most:
            return None
        try:
            grade = grader(judge, samples[index].document, _shown(seen[index].text))
        except MoSLoRAError:
            raise
        except Exception as error:  # whatever a grader of another package raises
            if not GRADERS.origin(task.metric):
                raise
            return Grade(score=math.nan, parsed="", fault=f"{type(error).__name__}: {error}")
        if grade is None:
            unread.append(index)
        return grade

    try:
        for number, grade in in_parallel(grade_of, answered, workers=judge.workers, fatal=Exception):
            ungraded += grade is None
            if ungraded > most:
                raise EvalError(
                    f"The judge's replies to {ungraded} of {len(answered)} answers cannot be read, so nothing more is "
                    f"asked; the last one is {judge.last_unreadable[:_SHOWN]!r}. Replies that can be read are kept: "
                    "mend the judge (more room for its thinking: --judge-thinking-tokens), then score again."
                )
            final = grade or Grade(score=math.nan, parsed="")
            result[answered[number]] = replace(
                result[answered[number]],
                score=final.score,
                parsed=final.parsed,
                numbers=final.numbers,
                fault=final.fault,
            )
    except EvalError:
        raise
    except Exception as error:  # any error: the stored answers must stay usable
        raise EvalError(f"The judge failed: {error}. Its replies so far are kept; score again.") from error
    return result


def shortened(samples: Sequence[Scored]) -> int:
    """The number of answers of which a judge sees a part."""
    return sum(len(sample.visible.text) > LONGEST_ANSWER for sample in samples)


def _shown(answer: str) -> str:
    """An answer as the judge sees it: of one that never ends, such as a loop, the beginning and the end."""
    left_out = len(answer) - LONGEST_ANSWER
    half = LONGEST_ANSWER // 2
    return f"{answer[:half]}\n[{left_out} characters left out]\n{answer[-half:]}" if left_out > 0 else answer


def score_by_rules(task: Task, samples: Sequence[Scored]) -> dict[str, Any] | None:
    """The score of a judged task without its judge: by the rule of the task file, or as its extraction reads answers.

    None where there is no such rule, or no reference.
    """
    if task.grading is not None:
        metric = task.grading.rule
    else:
        metric = task.metric if judged_extraction(task.extraction) else ""
    if not metric or not all(sample.document.answers or sample.document.problem for sample in samples):
        return None
    scored = [
        score_answer(
            sample.document, None if sample.failed else sample.text, extraction=task.extraction, metric=metric,
            cluster=sample.cluster, markers=sample.markers,
        )
        for sample in samples
    ]  # fmt: skip
    try:
        if not (whole := whole_questions(task.aggregation, scored)):  # the rule failed on every one
            return None
        found = aggregate(task.aggregation, whole)
    except AggregationError:  # the score itself says so
        return None
    return {
        "extraction": task.extraction, "metric": metric, "score": found.value, "stderr": found.stderr,
        "low": found.low, "high": found.high,
    }  # fmt: skip


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

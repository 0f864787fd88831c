"""Functions with which a judge grades an answer or finds the final answer in it.

Prompts of benchmarks are worded by this project in every protocol (`WORDING`); a task with `metric: judge` has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.judging.llm_judge import Judge
from mm_moslora_eval.scoring.answer_scoring import JUDGED, score_answer
from mm_moslora_eval.scoring.named_parts import NamedParts
from mm_moslora_eval.scoring.rule_forms import FINAL_ANSWER, Grade, JudgeRule
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

"""Scores of a task by a judge, and by the rules that need none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mm_moslora.utils.errors import EvalError, MoSLoRAError
from mm_moslora_eval.backends.endpoints.parallel_calls import in_parallel
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.judging.answer_graders import GRADERS, grader_of, judged_extraction
from mm_moslora_eval.run.judging.llm_judge import Judge
from mm_moslora_eval.scoring.answer_scoring import score_answer
from mm_moslora_eval.scoring.measured_scores import aggregate, whole_questions
from mm_moslora_eval.scoring.rule_forms import Grade
from mm_moslora_eval.scoring.score_aggregation import AggregationError
from mm_moslora_eval.scoring.scored_sample import Scored

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

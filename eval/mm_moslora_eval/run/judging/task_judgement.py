"""The scores of a task by a judge, with what a reader must know of the judge, and the score without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import MoSLoRAError
from mm_moslora.utils.identity import sha256_of_values
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.judging.answer_graders import needs_judge, prompt_of
from mm_moslora_eval.run.judging.judge_check import check_judge
from mm_moslora_eval.run.judging.judged_scores import judged, score_by_rules, shortened
from mm_moslora_eval.run.judging.llm_judge import Judge
from mm_moslora_eval.scoring.answer_scoring import JUDGED
from mm_moslora_eval.scoring.scored_sample import Scored


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

"""Options that verbs of `mm-moslora eval` share, in groups that `--help` shows as panels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from mm_moslora.cli.shared_options import SET

if TYPE_CHECKING:
    from mm_moslora_eval.backends.openai_endpoint import ServiceSettings
    from mm_moslora_eval.run.judging.llm_judge import Judge

Modes = Annotated[tuple[Literal["own", "blind", "wrong"], ...], SET]
Baselines = Annotated[tuple[Literal["majority", "question_majority"], ...], SET]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """What is asked."""

    protocol: str | None = None
    """Protocol of tasks that are given without one."""
    modes: Modes = ("own",)
    """Images shown: own (the real ones), blind (their mean colour), wrong (another item's)."""
    limit: int | None = None
    """Only this many documents of a task, from the first one on."""
    max_new_tokens: int | None = None
    """Longest answer; default: the task's, and at least 2048 where the model is asked to think. Answers of another
    length belong into another folder."""
    change: tuple[str, ...] = ()
    """KEY=VALUE, another value of a key below prompt, decoding, over_samples or thinking of the tasks, such as
    decoding.temperature=0.7; several: given again. Results name it; such answers belong into another folder."""


@Parameter(name="*", group="Service")
@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """Limits and prices of a model behind a service."""

    requests_per_minute: float | None = None
    """Most requests to the model's service in a minute."""
    tokens_per_minute: float | None = None
    """Most tokens, of prompts and answers, in a minute."""
    price: str | None = None
    """IN/OUT: prices of a million tokens, such as 3/15; the results then name the cost."""
    expect_preprocessing: Path | None = None
    """With openai:URL#MODEL of `mm-moslora serve`: the run, checkpoint or export whose preprocessing it must have."""

    def settings(self, judging: JudgeOptions) -> ServiceSettings:
        """The settings of the client; its patience is the judge's."""
        from mm_moslora_eval.backends.openai_endpoint import ServiceSettings

        return ServiceSettings(**vars(self), timeout=judging.timeout, attempts=judging.attempts)


@Parameter(name="*", group="Judge")
@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """The judge, how it is checked, and its limits."""

    judge: str | None = None
    """URL#MODEL of an OpenAI-compatible judge, or a model as for --model; keys are read from the environment."""
    judge_budget: int | None = None
    """Most tokens to spend on the judge."""
    judge_thinking_tokens: int = 2048
    """Tokens that the judge may spend on thinking in each reply."""
    judge_check: Path | None = None
    """JSON Lines of graded answers; the results name the share on which the judge agrees. Default: those of the task,
    if it has some."""
    judge_agreement: float = 0.8
    """Share below which the result warns of the judge."""
    judge_batch_size: int = 4
    """Answers graded at the same time."""
    judge_requests_per_minute: float | None = None
    """Most requests to the judge in a minute."""
    judge_tokens_per_minute: float | None = None
    """Most tokens, of prompts and replies, in a minute."""
    judge_price: str | None = None
    """IN/OUT: prices of a million tokens of the judge."""
    timeout: Annotated[float, Parameter(group="Service")] = 300.0
    """Seconds for one attempt at a request to an endpoint or a judge."""
    attempts: Annotated[int, Parameter(group="Service")] = 6
    """Attempts at such a request."""

    def grader(self, run: Path) -> Judge | None:
        """The judge; its replies are kept in the run folder."""
        from mm_moslora_eval.eval_commands import make_judge

        limits = ServiceOptions(
            requests_per_minute=self.judge_requests_per_minute, tokens_per_minute=self.judge_tokens_per_minute,
            price=self.judge_price,
        )  # fmt: skip
        return make_judge(
            self.judge, run, budget=self.judge_budget, thinking_tokens=self.judge_thinking_tokens,
            service=limits.settings(self), graded=self.judge_check, least_agreement=self.judge_agreement,
            workers=self.judge_batch_size,
        )  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """What becomes of the results."""

    max_failed_share: float = 0.0
    """Share of failed samples, 0 to 1, up to which the exit code is 0."""
    report: bool = True
    """Write report.html into the run folder."""

    def show(self, results: list[Any], run: Path) -> int:
        """Print the scores and write the report; returns the exit code."""
        from mm_moslora_eval import eval_commands

        print(eval_commands.table(results))
        if self.report:
            from mm_moslora_eval.report.evaluation_page import write_report

            print(f"Report: {write_report(run)}")
        return eval_commands.exit_code(results, max_failed_share=self.max_failed_share)

"""Options of the verbs of `mm-moslora eval`, above all about services and judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, Token, convert

if TYPE_CHECKING:
    from mm_moslora_eval.backends.openai_endpoint import ServiceSettings


def by_commas(kind: Any, words: Sequence[Token]) -> tuple[Any, ...]:
    """Values of an option that takes them with commas, or is given again; each counts once."""
    each = [word.evolve(value=value) for word in words for value in word.value.split(",")]
    return tuple(dict.fromkeys(convert(kind, each)))


Modes = Annotated[tuple[Literal["own", "blind", "wrong"], ...], Parameter(converter=by_commas)]
Baselines = Annotated[tuple[Literal["majority", "question_majority"], ...], Parameter(converter=by_commas)]
ModelNames = Annotated[
    tuple[str, ...],
    Parameter(help="A folder (run, checkpoint, export), hf:ID, openai:URL#MODEL or replay:FILE; several: given again."),
]
Timeout = Annotated[float, Parameter(help="Seconds for one attempt at a request to an endpoint or a judge.")]
Attempts = Annotated[int, Parameter(help="Attempts at such a request.")]
JudgeBudget = Annotated[int | None, Parameter(help="Most tokens to spend on the judge.")]
JudgeThinking = Annotated[int, Parameter(help="Tokens that the judge may spend on thinking in each reply.")]
JudgeName = Annotated[
    str | None,
    Parameter(
        help="URL#MODEL of an OpenAI-compatible judge, or a model as for --model; keys are read from the environment."
    ),
]


@Parameter(name="*")
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

    def settings(self, **patience: Any) -> ServiceSettings:
        """The settings of the client; `patience` is `timeout` and `attempts`."""
        from mm_moslora_eval.backends.openai_endpoint import ServiceSettings

        return ServiceSettings(
            requests_per_minute=self.requests_per_minute, tokens_per_minute=self.tokens_per_minute, price=self.price,
            expect_preprocessing=self.expect_preprocessing, **patience,
        )  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """How a judge is checked, and its limits."""

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

    def of_judge(self, **patience: Any) -> dict[str, Any]:
        """Arguments of `eval_commands.make_judge`."""
        limits = ServiceOptions(
            requests_per_minute=self.judge_requests_per_minute, tokens_per_minute=self.judge_tokens_per_minute,
            price=self.judge_price,
        )  # fmt: skip
        return {
            "service": limits.settings(**patience), "graded": self.judge_check,
            "least_agreement": self.judge_agreement, "workers": self.judge_batch_size,
        }  # fmt: skip


NO_LIMITS, PLAIN_JUDGE = ServiceOptions(), JudgeOptions()

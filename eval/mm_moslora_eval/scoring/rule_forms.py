"""What rules of benchmarks are made of: functions of texts as extractions and metrics, and how judges grade."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from mm_moslora_eval.metrics.exact_match import best
from mm_moslora_eval.metrics.metric_text import letters
from mm_moslora_eval.metrics.multiple_choice import Options, vlmevalkit
from mm_moslora_eval.scoring.named_parts import Extractor, Metric
from mm_moslora_eval.sources.document import Document

T = TypeVar("T")
R = TypeVar("R", bound=Callable[..., Any])
BETWEEN_LETTERS = ", "
"""Between several letters of which any counts."""


def documented(rule: R, meaning: str | None) -> R:
    """A rule with its meaning, which `eval list` shows."""
    rule.__doc__ = meaning
    return rule


def of_text(read: Callable[[str], str]) -> Extractor:
    """An extraction that reads the answer alone."""
    return documented(lambda text, _: read(text), read.__doc__)


def of_options(read: Callable[[str, Options], str]) -> Extractor:
    """An extraction that knows the options."""
    return documented(lambda text, document: read(text, document.options), read.__doc__)


def of_letters(read: Callable[[str, Options], list[str]]) -> Extractor:
    """An extraction of several letters, for the metric `one_of_letters`."""
    return documented(lambda text, document: BETWEEN_LETTERS.join(read(text, document.options)), read.__doc__)


def with_usual(found: list[str], text: str, options: Options) -> list[str]:
    """Letters, with the one that VLMEvalKit's usual rule reads."""
    usual = vlmevalkit(text, options)
    return [*found, usual] if usual and usual not in found else found


def first_match(patterns: Sequence[re.Pattern[str]], text: str) -> str:
    """The first group of the first pattern that is found."""
    return next((match[1] for pattern in patterns if (match := pattern.search(text))), "")


def best_of(metric: Callable[[str, str], float]) -> Metric:
    """The best score over the references."""
    return documented(lambda parsed, document: best(metric, parsed, document.answers), metric.__doc__)


def all_of(metric: Callable[[str, Sequence[str]], float]) -> Metric:
    """The score by all references at once."""
    return documented(lambda parsed, document: metric(parsed, document.answers), metric.__doc__)


@dataclass(frozen=True, kw_only=True)
class AggregationFacts:
    """What a run and its pages must know of an aggregation, besides its numbers."""

    reads_answers: bool = False
    """It uses the answers themselves instead of the scores of single samples."""
    one_answer: bool = False
    """It asks whether an answer is right, or what it says, so that a mean of scores is nothing to it."""
    by_split: bool = False
    """The category of a document names all splits that it counts in, with commas."""
    captions: bool = False
    """Answers are captions, which are neither right nor wrong."""
    is_sum: bool = False
    """Its headline is a sum instead of a share."""
    beyond_1: bool = False
    """Its headline is no share."""
    score: str = ""
    """Name of its headline where that is no share of right answers."""
    full_marks: float = 1.0
    """The largest headline, of which comparisons show a sum as a share."""


@dataclass(frozen=True, kw_only=True)
class Grade:
    """A judge's grade of one answer."""

    score: float
    """0 to 1."""
    parsed: str
    """The reply, or the answer that a judge found."""
    numbers: tuple[float, ...] = ()
    """Further numbers for the aggregation, such as the ratings of the reference and of the model."""
    fault: str = ""
    """The error of a grader of others on this answer, whose score is then nan."""


class AskedJudge(Protocol):
    """What rules need of a judge, see `llm_judge.Judge`."""

    def ask(self, prompt: str, read: Callable[[str], T | None], *, max_tokens: int) -> tuple[T, str] | None:
        """What `read` makes of the reply, and the reply; None: it cannot be read."""


@dataclass(frozen=True, kw_only=True)
class JudgeRule(Generic[T]):
    """A grader of a benchmark; None: the judge's replies cannot be read."""

    wording: str
    """The prompt without the document, which results hash."""
    prompt: Callable[[Document, str], str]
    read: Callable[[str], T | None]
    grade: Callable[[T, str], Grade]
    max_tokens: int

    def __call__(self, judge: AskedJudge, document: Document, answer: str) -> Grade | None:
        """Ask the judge."""
        graded = judge.ask(self.prompt(document, answer), self.read, max_tokens=self.max_tokens)
        return None if graded is None else self.grade(*graded)


FINAL_ANSWER = """\
Below are a question and what somebody answered. Copy out the final answer, and nothing else: the letter of the \
choice, the number, or the list. If there is no final answer, reply with the word none.

Question: {question}
Choices: {choices}
Response: {answer}
Final answer:"""


def final_answer(judge: AskedJudge, document: Document, answer: str, choices: Sequence[str]) -> str | None:
    """The answer that the judge copies out, empty if it finds none; None if its replies cannot be read."""
    named = zip(letters(len(choices)), choices, strict=True)
    written = "; ".join(f"({letter}) {text}" for letter, text in named) or "none"
    prompt = FINAL_ANSWER.format(question=document.question, choices=written, answer=answer)
    copied = judge.ask(prompt, str.strip, max_tokens=64)
    if copied is None:
        return None
    return "" if copied[0].lower().rstrip(".") == "none" else copied[0]

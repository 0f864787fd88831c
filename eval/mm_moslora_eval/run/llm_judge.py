"""Judges: language models behind an endpoint that grade free answers, or find the final answer in them.

A reply is data from a service: it counts only if it can be read in the form that the prompt asks for. Such replies are
cached as JSON files by address, model and request, so that scoring again costs nothing. Calls and tokens are counted,
and grading stops before the budget is exceeded. All protocols use this project's own wording of the judge's prompts;
results name it (`WORDING`).
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.files import make_subfolder, read_json, replace_text
from mm_moslora.utils.redaction import redact_text
from mm_moslora_eval.backends.openai_endpoint import Endpoint, in_parallel, is_cut_off, reply_text
from mm_moslora_eval.metrics import judge_scores
from mm_moslora_eval.metrics.metric_text import letters
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, mathvista_question, score_answer
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.scoring.visible_text import without_thinking
from mm_moslora_eval.sources.document import Document, digest

logger = logging.getLogger(__name__)

MOST_UNREADABLE = 0.05
"""Share of the graded answers without a readable reply, above which a task stays unscored."""
THINKING_TOKENS = 2048
"""Default room for a judge's thinking before its reply."""
_TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)  # VLMEvalKit's schedule: one further request per unreadable reply
_WORKERS = 4
_SHOWN = 100

_T = TypeVar("_T")


class BudgetError(EvalError):
    """The judge's budget is used up."""


class Judge:
    """A judge with a cache and a budget.

    Args:
        endpoint: the judge's endpoint.
        cache: folder of the replies.
        budget_tokens: most tokens (prompt and completion) used by this process; None: no limit.
        thinking_tokens: tokens of a reply besides those of its own form, for judges that think first.
    """

    def __init__(
        self, endpoint: Endpoint, *, cache: Path, budget_tokens: int | None = None,
        thinking_tokens: int = THINKING_TOKENS,
    ) -> None:  # fmt: skip
        if thinking_tokens < 0:
            raise EvalError(f"thinking_tokens of the judge is {thinking_tokens}, expected 0 or more.")
        self.endpoint, self._cache, self._budget = endpoint, cache, budget_tokens
        self._thinking = thinking_tokens
        self.cached = self.unreadable = 0
        self.last_unreadable = ""
        self._counting = threading.Lock()
        make_subfolder(cache)

    def ask(self, prompt: str, read: Callable[[str], _T | None], *, max_tokens: int) -> tuple[_T, str] | None:
        """The first of up to five replies that can be read, from the cache if it is there.

        Args:
            prompt: the user's text.
            read: the value of a reply, from which thinking was removed; None if it has another form than asked for.
            max_tokens: most tokens of the reply without thinking.

        Returns:
            The value and the reply; None if no reply can be read.

        Raises:
            BudgetError: the budget is used up.
            EvalError: the endpoint refuses the request.
            RuntimeError: the request failed.
        """
        messages = [{"role": "user", "content": prompt}]
        requests = [
            {"messages": messages, "max_tokens": max_tokens, "temperature": temperature}
            for temperature in _TEMPERATURES
        ]
        endpoint = {"url": self.endpoint.url, "model": self.endpoint.model}
        cache_files = [self._cache / f"{digest(endpoint | {'request': request})}.json" for request in requests]
        for cache_file in cache_files:
            value = _read(_cached_reply(cache_file), read)
            if value is not None:
                with self._counting:
                    self.cached += 1
                return value
        for cache_file, request in zip(cache_files, requests, strict=True):
            text = self._request(request)
            value = _read(text, read)
            if value is not None:
                stored = endpoint | {"url": redact_text(self.endpoint.url), "request": request, "reply": text}
                replace_text(cache_file, json.dumps(stored, indent=2) + "\n")  # half a surrogate pair is no UTF-8
                return value
            with self._counting:
                self.unreadable, self.last_unreadable = self.unreadable + 1, text
        return None

    def _request(self, request: dict[str, Any]) -> str:
        """A new reply; one that was cut off loses its last line, which may be incomplete."""
        usage = self.endpoint.usage
        spent = usage.prompt_tokens + usage.completion_tokens
        if self._budget is not None and spent >= self._budget:
            raise BudgetError(
                f"The judge has used {spent} of {self._budget} tokens; nothing more is asked. Its replies are kept: "
                "score again with a larger --judge-budget."
            )
        reply = self.endpoint.chat(request | {"max_tokens": request["max_tokens"] + self._thinking})
        text = reply_text(reply)
        return text.rpartition("\n")[0] if is_cut_off(reply) else text

    def to_dict(self) -> dict[str, Any]:
        """For the result file: the judge, and its calls, tokens and unreadable replies."""
        return {
            "model": self.endpoint.model, "url": redact_text(self.endpoint.url), "wording": WORDING,
            "thinking_tokens": self._thinking, "cached": self.cached, "unreadable": self.unreadable,
            **self.endpoint.usage.to_dict(),
        }  # fmt: skip


def _read(reply: str | None, read: Callable[[str], _T | None]) -> tuple[_T, str] | None:
    text = without_thinking(reply).text if reply is not None else ""
    value = read(text) if text.strip() else None
    return None if value is None else (value, text)


def _cached_reply(cache_file: Path) -> str | None:
    """A cached reply; None if there is none, or if it is damaged and will be requested again."""
    try:
        return str(read_json(cache_file)["reply"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s is damaged (%s: %s); the judge is asked again.", cache_file, type(error).__name__, error)
        return None


@dataclass(frozen=True, kw_only=True)
class Grade:
    """A judge's grade of one answer."""

    score: float
    """0 to 1."""
    parsed: str
    """The reply, or the answer that a judge found."""
    numbers: tuple[float, ...] = ()
    """llavabench: the scores of the reference and of the model, 1 to 10."""


WORDING = "mm_moslora 2"
"""Name of the prompts below in result files; they are this project's own in every protocol."""

_MMVET = """\
You grade answers to questions about pictures. Compare the answer with the reference and give a score between 0.0 (all \
wrong) and 1.0 (all right) in steps of 0.1. <AND> in the reference joins parts that must all be there; <OR> joins \
alternatives of which one is enough. Judge what is said, not how it is worded. Complete the last row of the table with \
its score, a number and nothing else.

question | reference | answer | score
--- | --- | --- | ---
What is in the bowl and what is beside it? | an apple <AND> a spoon | There is an apple in the bowl. | 0.5
What does the sign say? | stop <OR> halt | The sign reads "STOP". | 1.0
How many birds are on the wire? | 4 | There are seven birds. | 0.0
"""

_LLAVABENCH = """\
A person asked a question about a picture. The picture is described to you in words, because you cannot see it. Two \
assistants answered. Rate how helpful, relevant, accurate and detailed each answer is on a scale from 1 to 10. On the \
first line write two numbers separated by a space: the rating of assistant 1, then that of assistant 2. Explain below.

[Picture]
{caption}

[Question]
{question}

[Assistant 1]
{reference}

[Assistant 2]
{answer}
"""

_MATHVISTA = """\
Below are a question and what somebody answered. Copy out the final answer, and nothing else: the letter of the \
choice, the number, or the list. If there is no final answer, reply with the word none.

Question: {question}
Choices: {choices}
Response: {answer}
Final answer:"""


GradeOf = Callable[[str], float | None]
Ratings = Callable[[str], tuple[float, float]]


def _grade_mmvet(judge: Judge, document: Document, answer: str, *, read: GradeOf) -> Grade | None:
    """MM-Vet: the grade, 0 to 1."""
    prompt = _MMVET + judge_scores.mmvet_table_row(document.question, "<OR>".join(document.answers), answer)
    graded = judge.ask(prompt, read, max_tokens=8)
    return None if graded is None else Grade(score=graded[0], parsed=graded[1])


def _grade_llavabench(judge: Judge, document: Document, answer: str, *, read: Ratings) -> Grade | None:
    """LLaVA-Bench: ratings of the reference and of the answer; the score is the answer's divided by ten."""
    reference = document.extra.get("gpt4_ans") or " <OR> ".join(document.answers)
    prompt = _LLAVABENCH.format(
        caption=document.extra.get("caption", "(no description)"), question=document.question, reference=reference,
        answer=answer,
    )  # fmt: skip
    rated = judge.ask(prompt, partial(judge_scores.ratings_within, read=read), max_tokens=1024)
    return None if rated is None else Grade(score=rated[0][1] / 10, parsed=rated[1], numbers=rated[0])


def _extract_mathvista(judge: Judge, document: Document, answer: str) -> str | None:
    """MathVista: the final answer within a long one; an answer that already fits is not sent."""
    question = mathvista_question(document)
    stripped = answer.strip()
    short = stripped in (*question.choices, *document.options)
    if not stripped or short or (question.answer_type in ("integer", "float") and _is_number(stripped)):
        return answer
    return _copied_answer(judge, document, answer)


def _copied_answer(judge: Judge, document: Document, answer: str) -> str | None:
    """The answer that the judge copies out, empty if it finds none; None if its replies cannot be read."""
    named = zip(letters(len(choices := mathvista_question(document).choices)), choices, strict=True)
    written = "; ".join(f"({letter}) {text}" for letter, text in named) or "none"
    prompt = _MATHVISTA.format(question=document.question, choices=written, answer=answer)
    copied = judge.ask(prompt, str.strip, max_tokens=64)
    if copied is None:
        return None
    return "" if copied[0].lower().rstrip(".") == "none" else copied[0]


JUDGE_EXTRACTIONS: dict[str, tuple[Callable[[Judge, Document, str], str | None], str]] = {
    "mathvista": (_extract_mathvista, "mathvista_extracted"),
    "mathvista_vlmevalkit": (
        # VLMEvalKit's check comes first: an answer that it can read needs no judge.
        lambda judge, document, answer: (
            EXTRACTORS["mathvista_vlmevalkit"](answer, document) or _copied_answer(judge, document, answer)
        ),
        "text",
    ),
}
"""Extraction of a task -> function with which a judge finds the answer, and the extraction that parses it."""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


Grader = Callable[["Judge", Document, str], Grade | None]

GRADERS: dict[str, Grader] = {
    "judge_mmvet": partial(_grade_mmvet, read=judge_scores.mmvet_grade),
    "judge_mmvet_vlmevalkit": partial(_grade_mmvet, read=judge_scores.mmvet_grade_vlmevalkit),
    "judge_mmvet_lmms_eval": partial(_grade_mmvet, read=judge_scores.mmvet_grade_lmms_eval),
    "judge_llavabench": partial(_grade_llavabench, read=judge_scores.llavabench_scores),
    "judge_llavabench_lmms_eval": partial(_grade_llavabench, read=judge_scores.llavabench_scores_lmms_eval),
}
"""Metric of a task -> function with which a judge grades one answer; None: its replies cannot be read."""


def reads(task: Task) -> bool:
    """Whether a judge grades the answers to a task or finds them."""
    return task.metric in GRADERS or task.extraction in JUDGE_EXTRACTIONS


def judged(judge: Judge, task: Task, samples: Sequence[Scored]) -> list[Scored]:
    """Score samples with a judge.

    A missing answer and an unfinished thinking block score 0 without the judge. The score of an answer to which the
    judge gives no readable reply is nan.

    Raises:
        BudgetError: see `Judge.ask`.
        EvalError: the judge cannot be reached, or too many of its replies cannot be read.
    """
    grader = GRADERS.get(task.metric) or partial(_grade_extracted, task=task)
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
        grade = grader(judge, samples[index].document, seen[index].text)
        if grade is None:
            unread.append(index)
        return grade

    try:
        for number, grade in in_parallel(grade_of, answered, workers=_WORKERS, fatal=Exception):
            ungraded += grade is None
            if ungraded > most:
                raise EvalError(
                    f"The judge's replies to {ungraded} of {len(answered)} answers cannot be read, so nothing more is "
                    f"asked; the last one is {judge.last_unreadable[:_SHOWN]!r}. Replies that can be read are kept: "
                    "mend the judge (more room for its thinking: --judge-thinking-tokens), then score again."
                )
            final = grade or Grade(score=math.nan, parsed="")
            result[answered[number]] = replace(
                result[answered[number]], score=final.score, parsed=final.parsed, numbers=final.numbers
            )
    except EvalError:
        raise
    except Exception as error:  # any error: the stored answers must stay usable
        raise EvalError(f"The judge failed: {error}. Its replies so far are kept; score again.") from error
    return result


def _grade_extracted(judge: Judge, document: Document, answer: str, *, task: Task) -> Grade | None:
    """The score of the answer that a judge finds."""
    find, then = JUDGE_EXTRACTIONS[task.extraction]
    text = find(judge, document, answer)
    if text is None:
        return None
    scored = score_answer(document, text, extraction=then, metric=task.metric)
    return Grade(score=scored.score, parsed=scored.parsed)

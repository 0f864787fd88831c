"""Judges: grade free answers with a language model behind an OpenAI-compatible endpoint.

Replies are cached as JSON files by address, model and request, so that scoring again costs nothing. Calls and tokens
are counted, and grading stops before the budget is exceeded. All protocols use this project's own wording of the
judge's prompts; results name it (`WORDING`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.files import read_json, replace_text
from mm_moslora.utils.redaction import redact_text
from mm_moslora_eval.backends.openai_endpoint import Endpoint, in_parallel
from mm_moslora_eval.metrics import judge_scores
from mm_moslora_eval.metrics.metric_text import letters
from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, mathvista_question, without_thinking
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document, digest

logger = logging.getLogger(__name__)

_TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)  # VLMEvalKit's schedule: one further request per unreadable reply
_WORKERS = 4

_T = TypeVar("_T")


class BudgetError(EvalError):
    """The judge's budget is used up."""


class Judge:
    """A judge with a cache and a budget.

    Args:
        endpoint: the judge's endpoint.
        cache: folder of the replies.
        budget_tokens: most tokens (prompt and completion) used by this process; None: no limit.
    """

    def __init__(self, endpoint: Endpoint, *, cache: Path, budget_tokens: int | None = None) -> None:
        self.endpoint, self._cache, self._budget = endpoint, cache, budget_tokens
        self.cached = 0
        cache.mkdir(parents=True, exist_ok=True)

    def ask(self, prompt: str, *, max_tokens: int = 256, temperature: float = 0.0) -> str:
        """The judge's reply, from the cache if it is there.

        Raises:
            BudgetError: the budget is used up.
            EvalError: the endpoint refuses the request.
            RuntimeError: the request failed.
        """
        messages = [{"role": "user", "content": prompt}]
        payload: dict[str, Any] = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        asked = {"url": self.endpoint.url, "model": self.endpoint.model, "request": payload}
        place = self._cache / f"{digest(asked)}.json"
        known = _kept_reply(place)
        if known is not None:
            self.cached += 1
            return known
        usage = self.endpoint.usage
        spent = usage.prompt_tokens + usage.completion_tokens
        if self._budget is not None and spent >= self._budget:
            raise BudgetError(
                f"The judge has used {spent} of {self._budget} tokens; nothing more is asked. Its replies are kept: "
                "score again with a larger --judge-budget."
            )
        reply = self.endpoint.chat(payload)
        text = str(reply["choices"][0]["message"].get("content") or "")
        stored = asked | {"url": redact_text(self.endpoint.url), "reply": text, "usage": reply.get("usage")}
        replace_text(place, json.dumps(stored, indent=2, ensure_ascii=False) + "\n")
        return text

    def to_dict(self) -> dict[str, Any]:
        """For the result file: the judge, and its calls and tokens."""
        about = {
            "model": self.endpoint.model,
            "url": redact_text(self.endpoint.url),
            "wording": WORDING,
            "cached": self.cached,
        }
        return about | self.endpoint.usage.to_dict()


def _kept_reply(place: Path) -> str | None:
    """A cached reply; None if there is none, or if it is damaged and will be requested again."""
    try:
        return str(read_json(place)["reply"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s is damaged (%s: %s); the judge is asked again.", place, type(error).__name__, error)
        return None


@dataclass(frozen=True, kw_only=True)
class Grade:
    """A judge's grade of one answer."""

    score: float
    """0 to 1."""
    reply: str
    """The reply that was parsed; the last reply if none could be."""
    readable: bool
    numbers: tuple[float, ...] = ()
    """llavabench: the scores of the reference and of the model, 1 to 10, or -1."""


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


def _grade_mmvet(judge: Judge, document: Document, answer: str, *, read: GradeOf) -> Grade:
    """MM-Vet: the first readable grade of up to five replies; without one the grade is 0 and marked as unreadable."""
    prompt = _MMVET + judge_scores.mmvet_table_row(document.question, "<OR>".join(document.answers), answer)
    reply = ""
    for temperature in _TEMPERATURES:
        reply = judge.ask(prompt, max_tokens=8, temperature=temperature)
        grade = read(reply)
        if grade is not None:
            return Grade(score=grade, reply=reply, readable=True)
    return Grade(score=0.0, reply=reply, readable=False)


def _grade_llavabench(judge: Judge, document: Document, answer: str, *, read: Ratings) -> Grade:
    """LLaVA-Bench: ratings of the reference and of the answer; the score is the answer's divided by ten."""
    reference = document.extra.get("gpt4_ans") or " <OR> ".join(document.answers)
    prompt = _LLAVABENCH.format(
        caption=document.extra.get("caption", "(no description)"), question=document.question, reference=reference,
        answer=answer,
    )  # fmt: skip
    reply = judge.ask(prompt, max_tokens=1024)
    numbers = read(reply)
    readable = numbers != judge_scores.UNPARSED
    return Grade(score=min(1.0, max(0.0, numbers[1] / 10)), reply=reply, readable=readable, numbers=numbers)


def _extract_mathvista(judge: Judge, document: Document, answer: str) -> str:
    """MathVista: the final answer within a long one; an answer that already fits is not sent."""
    question = mathvista_question(document)
    stripped = answer.strip()
    short = stripped in (*question.choices, *document.options)
    if not stripped or short or (question.answer_type in ("integer", "float") and _is_number(stripped)):
        return answer
    return _asked_for_answer(judge, document, answer)


def _extract_mathvista_vlmevalkit(judge: Judge, document: Document, answer: str) -> str:
    """The same after VLMEvalKit's check for answers that need no judge."""
    return EXTRACTORS["mathvista_vlmevalkit"](answer, document) or _asked_for_answer(judge, document, answer)


def _asked_for_answer(judge: Judge, document: Document, answer: str) -> str:
    named = zip(letters(len(choices := mathvista_question(document).choices)), choices, strict=True)
    written = "; ".join(f"({letter}) {text}" for letter, text in named) or "none"
    reply = judge.ask(_MATHVISTA.format(question=document.question, choices=written, answer=answer), max_tokens=64)
    return "" if reply.strip().lower().rstrip(".") == "none" else reply.strip()


JUDGE_EXTRACTIONS: dict[str, tuple[Callable[[Judge, Document, str], str], str]] = {
    "mathvista": (_extract_mathvista, "mathvista_extracted"),
    "mathvista_vlmevalkit": (_extract_mathvista_vlmevalkit, "text"),
}
"""Extraction of a task -> function with which a judge finds the answer, and the extraction that parses it."""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


GRADERS: dict[str, Callable[[Judge, Document, str], Grade]] = {
    "judge_mmvet": partial(_grade_mmvet, read=judge_scores.mmvet_grade),
    "judge_mmvet_vlmevalkit": partial(_grade_mmvet, read=judge_scores.mmvet_grade_vlmevalkit),
    "judge_mmvet_lmms_eval": partial(_grade_mmvet, read=judge_scores.mmvet_grade_lmms_eval),
    "judge_llavabench": partial(_grade_llavabench, read=judge_scores.llavabench_scores),
    "judge_llavabench_lmms_eval": partial(_grade_llavabench, read=judge_scores.llavabench_scores_lmms_eval),
}
"""Metric of a task -> function with which a judge grades one answer."""


def graded(judge: Judge, metric: str, samples: Sequence[Scored]) -> list[Scored]:
    """Grade answers; a missing answer and an unreadable grade score 0.

    Raises:
        BudgetError: see `Judge.ask`.
        EvalError: the judge cannot be reached, or its response is not valid.
    """
    grader = GRADERS[metric]
    given = [(sample.document, None if sample.failed else sample.text) for sample in samples]
    grades = _each(lambda document, answer: grader(judge, document, answer), _visible(given))
    return [
        replace(
            sample, score=grade.score if grade else 0.0, parsed=grade.reply if grade and grade.readable else "",
            numbers=grade.numbers if grade else (),
        )
        for sample, grade in zip(samples, grades, strict=True)
    ]  # fmt: skip


def extract_all(
    judge: Judge, extraction: str, given: Sequence[tuple[Document, str | None]]
) -> tuple[Sequence[tuple[Document, str | None]], str]:
    """The answers found by a judge, for extractions that use one, and the extraction that parses them.

    Raises:
        EvalError: see `graded`.
    """
    given = _visible(given)
    if extraction not in JUDGE_EXTRACTIONS:
        return given, extraction
    find, then = JUDGE_EXTRACTIONS[extraction]
    found = _each(lambda document, answer: find(judge, document, answer), given)
    return [(document, text) for (document, _), text in zip(given, found, strict=True)], then


def _visible(given: Sequence[tuple[Document, str | None]]) -> list[tuple[Document, str | None]]:
    """Answers for the judge, without thinking; an answer with an unfinished thinking block is left out."""
    seen = [None if text is None else without_thinking(text) for _, text in given]
    return [
        (document, None if answer is None or answer.unclosed else answer.text)
        for (document, _), answer in zip(given, seen, strict=True)
    ]


def _each(ask: Callable[[Document, str], _T], given: Sequence[tuple[Document, str | None]]) -> list[_T | None]:
    found: list[_T | None] = [None] * len(given)
    asked = [index for index, (_, answer) in enumerate(given) if answer is not None]

    def call(index: int) -> _T:
        document, answer = given[index]
        return ask(document, answer or "")

    try:
        for number, result in in_parallel(call, asked, workers=_WORKERS):
            found[asked[number]] = result
    except EvalError:
        raise
    except Exception as error:  # any error: the stored answers must stay usable
        raise EvalError(f"The judge failed: {error}. Its replies so far are kept; score again.") from error
    return found

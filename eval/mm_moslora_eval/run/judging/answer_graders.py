"""Prompts of judges, and the functions that grade an answer or find the final answer in it.

The built-in prompts are worded by this project in every protocol (`WORDING`); a task with `metric: judge` has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mm_moslora_eval.metrics import judge_scores
from mm_moslora_eval.metrics.metric_text import letters
from mm_moslora_eval.protocol.grading import BY_PROMPT
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.judging.llm_judge import Judge
from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, JUDGED, METRICS, mathvista_question, score_answer
from mm_moslora_eval.scoring.named_parts import NamedParts
from mm_moslora_eval.sources.document import Document


@dataclass(frozen=True, kw_only=True)
class Grade:
    """A judge's grade of one answer."""

    score: float
    """0 to 1."""
    parsed: str
    """The reply, or the answer that a judge found."""
    numbers: tuple[float, ...] = ()
    """llavabench: the scores of the reference and of the model, 1 to 10."""
    fault: str = ""
    """The error of a grader of others on this answer, whose score is then nan."""


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


def _extract_mathvision(judge: Judge, document: Document, answer: str) -> str | None:
    """MATH-Vision in VLMEvalKit: an answer with a letter, or that is the right one as a whole, is not sent."""
    name = "mathvision_vlmevalkit"
    read = EXTRACTORS[name](answer, document)
    if not read or (not mathvista_question(document).choices and METRICS[name](read, document) < 1):
        return _copied_answer(judge, document, answer)
    return answer


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
    "mathvision_vlmevalkit": (_extract_mathvision, "mathvision_vlmevalkit"),
}
"""Extraction of a task -> function with which a judge finds the answer, and the extraction that parses it."""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


Grader = Callable[["Judge", Document, str], Grade | None]

GRADERS: NamedParts[Grader] = NamedParts(
    "grader",
    {
        "judge_mmvet": partial(_grade_mmvet, read=judge_scores.mmvet_grade),
        "judge_mmvet_vlmevalkit": partial(_grade_mmvet, read=judge_scores.mmvet_grade_vlmevalkit),
        "judge_mmvet_lmms_eval": partial(_grade_mmvet, read=judge_scores.mmvet_grade_lmms_eval),
        "judge_llavabench": partial(_grade_llavabench, read=judge_scores.llavabench_scores),
        "judge_llavabench_lmms_eval": partial(_grade_llavabench, read=judge_scores.llavabench_scores_lmms_eval),
    },
    beside=JUDGED,
)
"""Metric of a task -> function with which a judge grades one answer; None: its replies cannot be read. An imported
file adds some; an attribute `prompt` of theirs is the text that is hashed."""


def needs_judge(task: Task) -> bool:
    """Whether a judge grades the answers to a task or finds them."""
    return task.metric in GRADERS or task.metric == BY_PROMPT or task.extraction in JUDGE_EXTRACTIONS


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
        return WORDING, _MATHVISTA
    if origin := GRADERS.origin(task.metric):
        return " ".join(origin.values()), str(getattr(GRADERS.find(task.metric), "prompt", ""))
    return WORDING, _MMVET if "mmvet" in task.metric else _LLAVABENCH


def grade_by_prompt(judge: Judge, document: Document, answer: str, *, task: Task) -> Grade | None:
    """The grade that a judge gives by the prompt of the task file (`grading`), whose replies alone count."""
    grading = task.grading
    assert grading is not None
    graded = judge.ask(grading.text(document, answer), grading.read, max_tokens=grading.max_tokens)
    return None if graded is None else Grade(score=graded[0], parsed=graded[1])


def _grade_extracted(judge: Judge, document: Document, answer: str, *, task: Task) -> Grade | None:
    """The score of the answer that a judge finds."""
    find, then = JUDGE_EXTRACTIONS[task.extraction]
    text = find(judge, document, answer)
    if text is None:
        return None
    scored = score_answer(document, text, extraction=then, metric=task.metric)
    return Grade(score=scored.score, parsed=scored.parsed)
